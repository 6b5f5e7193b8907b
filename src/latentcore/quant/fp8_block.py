"""FP8 (e4m3fn) weights with one scale a 128 x 128 block; activations stay bfloat16.

`X.weight` F8_E4M3 [out, in] and `X.weight_scale_inv` F32 [ceil(out / 128), ceil(in / 128)]; the
last block row and column may be partial. Despite its name the companion multiplies: the weight is
code x scale of its block.
"""

import torch

from latentcore.ops import packing
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import Companion, QuantScheme, StoredTensors

BLOCK = 128
"""Rows and columns that share a scale."""


def _grid_shape(rows: int, cols: int) -> tuple[int, ...]:
    return (-(-rows // BLOCK), -(-cols // BLOCK))


def _pack(dst: PackedWeight, item: int, part: int, tensors: StoredTensors) -> None:
    packing.pack_fp8(dst, item, part, tensors["weight"], tensors["weight_scale_inv"])


def _pack_kv_b(
    w_kc: PackedWeight, w_vc: PackedWeight, tensors: StoredTensors, nope: int, v: int
) -> None:
    # A block may cross heads, so the halves are packed from the dequantized matrix.
    packing.pack_kv_b_bf16(w_kc, w_vc, _to_bf16(tensors), nope, v)


def _dequantize(tensors: StoredTensors) -> torch.Tensor:
    codes = tensors["weight"]
    rows, cols = codes.shape
    scale = tensors["weight_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.to(torch.float32) * scale[:rows, :cols]


def _to_bf16(tensors: StoredTensors) -> torch.Tensor:
    codes = tensors["weight"]
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    packing.dequantize_fp8(codes, tensors["weight_scale_inv"], out)
    return out


def _quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scale = torch.empty(_grid_shape(rows, cols), dtype=torch.float32)
    packing.quantize_fp8(weight, codes, scale)
    return {"weight": codes, "weight_scale_inv": scale}


FP8_BLOCK = QuantScheme(
    name="fp8",
    weight_dtype=torch.float8_e4m3fn,
    companions=(
        Companion(
            "weight_scale_inv", torch.float32, _grid_shape, "[ceil(out / 128), ceil(in / 128)]"
        ),
    ),
    format=Format.FP8,
    kv_b_format=Format.BF16,
    pack=_pack,
    pack_kv_b=_pack_kv_b,
    dequantize=_dequantize,
    to_bf16=_to_bf16,
    quantize=_quantize,
)
