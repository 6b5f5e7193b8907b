"""Memory as such: moved from and to files by the threads that own it, and where it lies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from latentcore.ops.native import op

_read_memory = op("read_memory")
_write_memory = op("write_memory")
_touch_memory = op("touch_memory")
_memory_placement = op("memory_placement")
_pack_version = op("pack_version")

ALIGN = 4096
"""Addresses, and offsets in files that are read or written directly, are multiples of this."""


@dataclass(frozen=True)
class Placement:
    """Where memory lies, from one page of every 256 KiB.

    pages    looked at and there
    unknown  not there, or the system would not tell
    own      in the memory node of the thread that owns them
    """

    pages: int = 0
    unknown: int = 0
    own: int = 0

    def __add__(self, other: "Placement") -> "Placement":
        return Placement(
            self.pages + other.pages, self.unknown + other.unknown, self.own + other.own
        )


def pack_version() -> int:
    """The version of the packed weights' layout; it changes whenever their bytes do."""
    return int(_pack_version())


def read(dst: torch.Tensor, groups: int, file: int, offset: int, *, direct: bool) -> int:
    """Fills `dst` from an open file; each thread reads what it owns. Returns a checksum.

    `dst` is memory of `huge_buffer`, of any shape, made of `groups` equal pieces, each owned by all
    threads. `direct` says that the file was opened with O_DIRECT. Raises OSError where the file
    cannot be read or ends too soon.
    """
    return _moved(_read_memory, dst, groups, file, offset, direct)


def write(src: torch.Tensor, groups: int, file: int, offset: int, *, direct: bool) -> int:
    """Writes `src` to an open file, otherwise as `read`. Returns the same checksum."""
    return _moved(_write_memory, src, groups, file, offset, direct)


def touch(dst: torch.Tensor, groups: int) -> None:
    """Makes fresh memory of `huge_buffer` lie with the threads that own it; bytes stay."""
    _touch_memory(*_memory(dst), groups)


def placement(memory: torch.Tensor, groups: int) -> Placement:
    """Where memory of `huge_buffer` lies, beside the threads that own it as the team is now."""
    return Placement(*map(int, str(_memory_placement(*_memory(memory), groups)).split()))


def _moved(
    move: Callable[..., object],
    memory: torch.Tensor,
    groups: int,
    file: int,
    offset: int,
    direct: bool,
) -> int:
    try:
        return int(str(move(*_memory(memory), groups, file, offset, direct)))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("expected contiguous memory of a CPU tensor, found another tensor")
    return tensor.data_ptr(), tensor.nbytes
