"""Int8 weights with one scale an output channel; activations are quantized per token as they come.

`X.weight` I8 [out, in] and `X.weight_scale` F32 [out, 1]: the layout of the published `w8a8_int8`
checkpoints and of compressed-tensors `int-quantized`. The weight is code x scale of its row.
"""

import torch

from latentcore.ops import packing
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import Companion, QuantScheme, StoredTensors


def _scale_shape(rows: int, cols: int) -> tuple[int, ...]:
    return (rows, 1)


def _pack(dst: PackedWeight, item: int, part: int, tensors: StoredTensors) -> None:
    packing.pack_int8(dst, item, part, tensors["weight"], tensors["weight_scale"].view(-1))


def _pack_kv_b(
    w_kc: PackedWeight, w_vc: PackedWeight, tensors: StoredTensors, nope: int, v: int
) -> None:
    scale = tensors["weight_scale"].view(-1)
    packing.pack_kv_b_int8(w_kc, w_vc, tensors["weight"], scale, nope, v)


def _dequantize(tensors: StoredTensors) -> torch.Tensor:
    return tensors["weight"].to(torch.float32) * tensors["weight_scale"]


def _to_bf16(tensors: StoredTensors) -> torch.Tensor:
    codes = tensors["weight"]
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    packing.dequantize_int8(codes, tensors["weight_scale"].view(-1), out)
    return out


def _quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.int8)
    scale = torch.empty(_scale_shape(rows, cols), dtype=torch.float32)
    packing.quantize_int8(weight, codes, scale.view(-1))
    return {"weight": codes, "weight_scale": scale}


W8A8_INT8 = QuantScheme(
    name="w8a8_int8",
    weight_dtype=torch.int8,
    companions=(Companion("weight_scale", torch.float32, _scale_shape, "[out, 1]"),),
    format=Format.INT8,
    kv_b_format=Format.INT8_WIDE,
    pack=_pack,
    pack_kv_b=_pack_kv_b,
    dequantize=_dequantize,
    to_bf16=_to_bf16,
    quantize=_quantize,
)
