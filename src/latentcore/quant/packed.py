"""A packed weight is one object: its bytes, its format, its shape and its scales together."""

import contextlib
import mmap
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch


class Format(IntEnum):
    """How a packed matrix is stored and multiplied.

    F32        fp32 weights and activations (a router given in fp32)
    BF16       bf16 weights and activations, fp32 sums
    INT8       int8 weights, one scale a row; activations quantized per token, int32 sums
    FP8        e4m3 codes, one scale a 128x128 block; bf16 activations, fp32 sums
    INT8_WIDE  int8 codes widened to bf16, scales along rows and columns; bf16 activations
    """

    F32 = 1
    BF16 = 2
    INT8 = 3
    FP8 = 4
    INT8_WIDE = 5


PANEL_ROWS = 16
HEADER_BYTES = 256
FP8_BLOCK = 128

_K_MULTIPLE = {
    Format.F32: 16,
    Format.BF16: 32,
    Format.INT8: 64,
    Format.FP8: 32,
    Format.INT8_WIDE: 32,
}
_K_PER_LINE = {
    Format.F32: 1,
    Format.BF16: 2,
    Format.INT8: 4,
    Format.FP8: 4,
    Format.INT8_WIDE: 4,
}


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _panel_tail(fmt: Format, cols: int) -> int:
    if fmt == Format.INT8:
        return 128
    if fmt == Format.FP8:
        return _up(4 * -(-cols // FP8_BLOCK), 64)
    return 64 if fmt == Format.INT8_WIDE else 0


def packed_nbytes(fmt: Format, batch: int, parts: int, rows: int, cols: int) -> int:
    """Bytes of `batch` matrices of `parts` x [rows, cols], packed as `fmt`; nothing is allocated.

    The layout is that of csrc/formats/format.h.
    """
    padded = _up(cols, _K_MULTIPLE[fmt])
    panel = padded // _K_PER_LINE[fmt] * 64 + _panel_tail(fmt, cols)
    item = parts * -(-rows // PANEL_ROWS) * panel
    if fmt == Format.INT8_WIDE:
        item += _up(4 * padded, 64)
    return HEADER_BYTES + batch * item


def huge_buffer(nbytes: int) -> torch.Tensor:
    """Zeroed private memory of `nbytes`, on huge pages where the system gives them: uint8 [nbytes].

    Pages are placed when they are first written, so by the thread that packs them. The tensor's
    storage goes on to the end of the last page, for reading past the page cache. The memory goes
    back to the system with the last tensor that looks at it.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without transparent huge pages refuses: ordinary pages do.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """`batch` stacked matrices (experts, heads; 1 for a linear) of `parts` x [rows, cols].

    data    uint8 [nbytes], 64-byte aligned: header, then panels with their scales
    parts   1, or 2 for gate and up, whose panels alternate; `rows` counts one part
    desc    [format, batch, parts, rows, cols], what ops take beside the data

    Only this class makes descriptors, so data and description cannot come apart.
    """

    data: torch.Tensor
    format: Format
    batch: int
    parts: int
    rows: int
    cols: int

    @cached_property
    def desc(self) -> list[int]:
        """[format, batch, parts, rows, cols]."""
        return [int(self.format), self.batch, self.parts, self.rows, self.cols]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.numel()

    @property
    def item_nbytes(self) -> int:
        """Bytes of one of the stacked matrices."""
        return (self.nbytes - HEADER_BYTES) // self.batch

    @classmethod
    def allocate(cls, fmt: Format, batch: int, parts: int, rows: int, cols: int) -> "PackedWeight":
        """Memory for a packed weight, its header written; the matrices are zero until packed."""
        from latentcore.ops.packing import init_packed

        data = huge_buffer(packed_nbytes(fmt, batch, parts, rows, cols))
        weight = cls(data, fmt, batch, parts, rows, cols)
        init_packed(weight)
        return weight

    @classmethod
    def fake(cls, fmt: Format, batch: int, parts: int, rows: int, cols: int) -> "PackedWeight":
        """The same without memory, for checks on fake tensors: data is on the meta device."""
        nbytes = packed_nbytes(fmt, batch, parts, rows, cols)
        data = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        return cls(data, fmt, batch, parts, rows, cols)
