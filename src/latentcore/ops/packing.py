"""Packing ops: stored matrices to panels. Each uses all threads; sources may be memory-mapped."""

import torch

from latentcore.ops.native import op, unpack
from latentcore.quant.packed import FP8_BLOCK, PackedWeight

_init_packed = op("init_packed")
_pack_f32 = op("pack_f32")
_pack_bf16 = op("pack_bf16")
_pack_int8 = op("pack_int8")
_pack_fp8 = op("pack_fp8")
_pack_int8_wide = op("pack_int8_wide")

_FP8_MAX = 448.0
_ROWS_AT_ONCE = 64
"""Rows that a conversion holds in fp32 at a time: few, so that they stay in the cache."""


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


def quantize_rows_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w, bf16 [rows, cols], to int8 codes and f32 [rows] scales.

    Scale max|w| / 127 a row; codes round half to even, within +-127; a row of zeros gives zeros.
    """
    codes = torch.empty(w.shape, dtype=torch.int8)
    scale = torch.empty(w.shape[0], dtype=torch.float32)
    for start in range(0, w.shape[0], _ROWS_AT_ONCE):
        part = w[start : start + _ROWS_AT_ONCE].to(torch.float32)
        s = part.abs().amax(dim=1) / 127.0
        divisor = torch.where(s > 0, s, torch.ones_like(s))
        codes[start : start + part.shape[0]] = (
            (part / divisor[:, None]).round().clamp(-127, 127).to(torch.int8)
        )
        scale[start : start + part.shape[0]] = s
    return codes, scale


def quantize_blocks_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w, bf16 [rows, cols], to float8_e4m3fn codes and f32 [ceil(rows/128), ceil(cols/128)] scales.

    Scale max|w| / 448 a block, values clamped to +-448 before the cast; zeros give zeros.
    """
    rows, cols = w.shape
    grid = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(grid, dtype=torch.float32)
    for i in range(grid[0]):
        strip = w[i * FP8_BLOCK : (i + 1) * FP8_BLOCK].to(torch.float32)
        padded = torch.nn.functional.pad(strip, (0, grid[1] * FP8_BLOCK - cols))
        top = padded.view(strip.shape[0], grid[1], FP8_BLOCK).abs().amax(dim=(0, 2))
        s = top / _FP8_MAX
        divisor = torch.where(s > 0, s, torch.ones_like(s)).repeat_interleave(FP8_BLOCK)[:cols]
        codes[i * FP8_BLOCK : (i + 1) * FP8_BLOCK] = (
            (strip / divisor).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        )
        scale[i] = s
    return codes, scale


def dequantize_fp8(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """code x block scale, rounded once to bf16 [rows, cols]."""
    rows, cols = codes.shape
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    columns = scale_inv.repeat_interleave(FP8_BLOCK, dim=1)[:, :cols]
    for i in range(scale_inv.shape[0]):
        span = slice(i * FP8_BLOCK, min(rows, (i + 1) * FP8_BLOCK))
        out[span] = (codes[span].to(torch.float32) * columns[i]).to(torch.bfloat16)
    return out


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code x row scale, rounded once to bf16 [rows, cols]."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):
        span = slice(start, start + _ROWS_AT_ONCE)
        out[span] = (codes[span].to(torch.float32) * scale[span, None]).to(torch.bfloat16)
    return out
