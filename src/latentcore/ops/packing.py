"""Packing ops: stored matrices to panels, and from one stored format to another.

Each uses all threads; sources may be memory-mapped.
"""

import torch

from latentcore.ops.native import op, unpack
from latentcore.quant.packed import PackedWeight

_init_packed = op("init_packed")
_pack_f32 = op("pack_f32")
_pack_bf16 = op("pack_bf16")
_pack_int8 = op("pack_int8")
_pack_fp8 = op("pack_fp8")
_pack_int8_wide = op("pack_int8_wide")
_quantize_int8 = op("quantize_int8")
_quantize_fp8 = op("quantize_fp8")
_dequantize_int8 = op("dequantize_int8")
_dequantize_fp8 = op("dequantize_fp8")


def init_packed(dst: PackedWeight) -> None:
    """Writes the header of `dst` into its fresh memory."""
    _init_packed(*unpack("init_packed", "dst", dst))


def pack_f32(dst: PackedWeight, item: int, part: int, w: torch.Tensor) -> None:
    """Packs w, f32 [rows, cols], as matrix `item`, part `part` of `dst` (F32)."""
    _pack_f32(*unpack("pack_f32", "dst", dst), item, part, w)


def pack_bf16(dst: PackedWeight, item: int, part: int, w: torch.Tensor) -> None:
    """Packs w, bf16 [rows, cols], as matrix `item`, part `part` of `dst` (BF16)."""
    _pack_bf16(*unpack("pack_bf16", "dst", dst), item, part, w)


def pack_int8(
    dst: PackedWeight, item: int, part: int, w: torch.Tensor, scale: torch.Tensor
) -> None:
    """Packs w, int8 [rows, cols], with scale f32 [rows] into `dst` (INT8)."""
    _pack_int8(*unpack("pack_int8", "dst", dst), item, part, w, scale)


def pack_fp8(
    dst: PackedWeight, item: int, part: int, w: torch.Tensor, scale_inv: torch.Tensor
) -> None:
    """Packs w, float8_e4m3fn [rows, cols], and its f32 grid of 128x128 block scales to `dst` (FP8).

    scale_inv is [ceil(rows / 128), ceil(cols / 128)]; the weight is code x scale.
    """
    _pack_fp8(*unpack("pack_fp8", "dst", dst), item, part, w, scale_inv)


def pack_int8_wide(
    dst: PackedWeight,
    item: int,
    w: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
) -> None:
    """Packs w, int8 [rows, cols], with scales f32 [rows] and f32 [cols] into `dst` (INT8_WIDE)."""
    _pack_int8_wide(*unpack("pack_int8_wide", "dst", dst), item, w, row_scale, column_scale)


def pack_kv_b_bf16(
    w_kc: PackedWeight, w_vc: PackedWeight, kv_b: torch.Tensor, nope: int, v: int
) -> None:
    """Splits kv_b, bf16 [heads * (nope + v), rank], into its halves a head.

    w_kc: BF16, batch heads, [rank, nope] (absorbs the query); w_vc: BF16, batch heads, [v, rank].
    """
    for head in range(w_kc.batch):
        rows = kv_b[head * (nope + v) : (head + 1) * (nope + v)]
        pack_bf16(w_kc, head, 0, rows[:nope].t().contiguous())
        pack_bf16(w_vc, head, 0, rows[nope:].contiguous())


def pack_kv_b_int8(
    w_kc: PackedWeight,
    w_vc: PackedWeight,
    kv_b: torch.Tensor,
    scale: torch.Tensor,
    nope: int,
    v: int,
) -> None:
    """The same from int8 codes [heads * (nope + v), rank] with scale f32 [heads * (nope + v)].

    Formats INT8_WIDE. A row's scale lies along the contraction of w_kc: there it is a column scale.
    """
    ones = torch.ones(kv_b.shape[1], dtype=torch.float32)
    for head in range(w_kc.batch):
        start = head * (nope + v)
        codes = kv_b[start : start + nope + v]
        scales = scale[start : start + nope + v].contiguous()
        pack_int8_wide(w_kc, head, codes[:nope].t().contiguous(), ones, scales[:nope].contiguous())
        pack_int8_wide(w_vc, head, codes[nope:].contiguous(), scales[nope:].contiguous(), ones)


def quantize_int8(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """w, bf16 [rows, cols], to int8 codes [rows, cols] and scale f32 [rows].

    Scale max|w| / 127 a row; codes round half to even, within +-127. A row of zeros gives zeros;
    one that holds NaN or infinity gives zeros too, and that as its scale.
    """
    _quantize_int8(w, codes, scale)


def quantize_fp8(w: torch.Tensor, codes: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """w, bf16 [rows, cols], to float8_e4m3fn codes [rows, cols] and their grid of block scales.

    scale_inv is f32 [ceil(rows / 128), ceil(cols / 128)]: max|w| / 448 a block; values are clamped
    to +-448 and round half to even. A block of zeros gives zeros; one that holds NaN or infinity
    gives zeros too, and that as its scale.
    """
    _quantize_fp8(w, codes, scale_inv)


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """int8 codes [rows, cols] x scale f32 [rows], rounded once to out, bf16 [rows, cols]."""
    _dequantize_int8(codes, scale, out)


def dequantize_fp8(codes: torch.Tensor, scale_inv: torch.Tensor, out: torch.Tensor) -> None:
    """float8_e4m3fn codes [rows, cols] x scale of their block, rounded once to out, bf16.

    scale_inv is f32 [ceil(rows / 128), ceil(cols / 128)]; out is [rows, cols].
    """
    _dequantize_fp8(codes, scale_inv, out)
