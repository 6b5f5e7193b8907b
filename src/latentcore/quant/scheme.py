"""What a weight format is: one frozen `QuantScheme` value, and the tensors of one weight."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from latentcore.quant.packed import Format, PackedWeight

StoredTensors = Mapping[str, torch.Tensor]
"""The tensors of one weight by the last part of their name: `weight`, and the scheme's companions.

`weight` is [rows, cols] (out features, in features), contiguous, and may be memory-mapped.
"""


@dataclass(frozen=True)
class Companion:
    """A tensor that stands beside `weight`, such as its scales.

    suffix     last part of its name: `weight_scale` beside `weight`
    dtype      what it must be stored as
    shape      its shape for a weight of (rows, cols)
    layout     that rule in words, for messages
    """

    suffix: str
    dtype: torch.dtype
    shape: Callable[[int, int], tuple[int, ...]]
    layout: str


@dataclass(frozen=True)
class QuantScheme:
    """One way in which a linear weight is stored, packed and understood.

    name          as in `--quantization`
    weight_dtype  dtype of `X.weight`
    companions    the tensors that must stand beside it; no others may
    format        packed format of a linear weight
    kv_b_format   packed format of the per-head halves of `kv_b_proj` (w_kc and w_vc)
    pack          writes one stored matrix into (item, part) of a PackedWeight of `format`
    pack_kv_b     writes `kv_b_proj` [heads x (nope + v), rank] into w_kc and w_vc of `kv_b_format`
    dequantize    the exact meaning of the stored tensors: float32 [rows, cols] (oracle for tests)
    to_bf16       the same, rounded once to bfloat16 (native)
    quantize      bfloat16 [rows, cols] to stored tensors, by the exact quantizer (native)
    """

    name: str
    weight_dtype: torch.dtype
    companions: tuple[Companion, ...]
    format: Format
    kv_b_format: Format
    pack: Callable[[PackedWeight, int, int, StoredTensors], None]
    pack_kv_b: Callable[[PackedWeight, PackedWeight, StoredTensors, int, int], None]
    dequantize: Callable[[StoredTensors], torch.Tensor]
    to_bf16: Callable[[StoredTensors], torch.Tensor]
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]]

    def stored(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every stored tensor of a [rows, cols] weight, by suffix."""
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (self.weight_dtype, (rows, cols))
        }
        for companion in self.companions:
            tensors[companion.suffix] = (companion.dtype, companion.shape(rows, cols))
        return tensors

    def stored_nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all stored tensors of a [rows, cols] weight."""
        return sum(
            dtype.itemsize * math.prod(shape) for dtype, shape in self.stored(rows, cols).values()
        )

    def bad_companion(self, tensors: StoredTensors) -> str | None:
        """Names a companion (by suffix) that holds NaN or infinity, or returns None."""
        for companion in self.companions:
            if not bool(torch.isfinite(tensors[companion.suffix]).all()):
                return companion.suffix
        return None
