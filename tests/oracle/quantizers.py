"""The quantizers that a checkpoint's formats are defined by, exactly, in plain PyTorch.

Activations, per token: s = max|x| / 127 in fp32, q = round-half-even(x / s) clamped to +-127, and a
row of zeros gives zeros. Weights: channels of max|w| / 127, or 128x128 blocks of max|w| / 448 with
the clamp before the cast, since PyTorch's cast to e4m3 does not saturate.
"""

import torch

Tensors = dict[str, torch.Tensor]

INT8_MAX = 127.0
FP8_MAX = 448.0
BLOCK = 128


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, and 0 where the scale is 0, infinity or NaN."""
    divides = (scale > 0) & scale.isfinite()
    return torch.where(divides, x / torch.where(divides, scale, 1.0), 0.0)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (fp32, whole numbers) and fp32 scales [rows, 1] of the rows of `x`."""
    x = x.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / INT8_MAX
    return _divide(x, scale).round().clamp(-INT8_MAX, INT8_MAX), scale


def blocks(grid: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A grid of block scales spread over the [rows, cols] elements that they belong to."""
    return grid.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]


def quantize_int8(weight: torch.Tensor) -> Tensors:
    """bf16 [rows, cols] as a `w8a8_int8` checkpoint stores it."""
    codes, scale = int8_rows(weight)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}


def quantize_fp8(weight: torch.Tensor) -> Tensors:
    """bf16 [rows, cols] as an FP8 checkpoint stores it."""
    rows, cols = weight.shape
    high, wide = -(-rows // BLOCK), -(-cols // BLOCK)
    padded = torch.zeros(high * BLOCK, wide * BLOCK)
    padded[:rows, :cols] = weight.to(torch.float32).abs()
    grid = padded.view(high, BLOCK, wide, BLOCK).amax(dim=(1, 3)) / FP8_MAX
    scaled = _divide(weight.to(torch.float32), blocks(grid, rows, cols))
    codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": grid}


def dequantize(tensors: Tensors) -> torch.Tensor:
    """What the stored tensors of one weight mean: fp64 [rows, cols]."""
    weight = tensors["weight"]
    exact = weight.to(torch.float32).to(torch.float64)
    if "weight_scale" in tensors:
        return exact * tensors["weight_scale"].to(torch.float64)
    if "weight_scale_inv" in tensors:
        return exact * blocks(tensors["weight_scale_inv"].to(torch.float64), *weight.shape)
    return exact
