"""Plain bfloat16 weights: `X.weight` BF16 [out, in], nothing beside it."""

import torch

from latentcore.ops import packing
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import QuantScheme, StoredTensors


def _pack(dst: PackedWeight, item: int, part: int, tensors: StoredTensors) -> None:
    packing.pack_bf16(dst, item, part, tensors["weight"])


def _pack_kv_b(
    w_kc: PackedWeight, w_vc: PackedWeight, tensors: StoredTensors, nope: int, v: int
) -> None:
    packing.pack_kv_b_bf16(w_kc, w_vc, tensors["weight"], nope, v)


def _dequantize(tensors: StoredTensors) -> torch.Tensor:
    return tensors["weight"].to(torch.float32)


def _to_bf16(tensors: StoredTensors) -> torch.Tensor:
    return tensors["weight"]


def _quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight}


BF16 = QuantScheme(
    name="bf16",
    weight_dtype=torch.bfloat16,
    companions=(),
    format=Format.BF16,
    kv_b_format=Format.BF16,
    pack=_pack,
    pack_kv_b=_pack_kv_b,
    dequantize=_dequantize,
    to_bf16=_to_bf16,
    quantize=_quantize,
)
