"""Recognising, converting and understanding stored weights."""

import itertools

import pytest
import torch

from latentcore.errors import QuantizationError
from latentcore.quant.bf16 import BF16
from latentcore.quant.fp8_block import FP8_BLOCK
from latentcore.quant.packed import Format
from latentcore.quant.scheme import QuantScheme, StoredTensors
from latentcore.quant.schemes import (
    COMPANION_SUFFIXES,
    SCHEMES,
    convert,
    dtype_name,
    scheme_of,
    target_scheme,
)
from latentcore.quant.w8a8_int8 import W8A8_INT8

SHAPES = [(1, 1), (16, 64), (36, 72), (130, 257), (576, 128), (257, 384)]


def random_weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).to(torch.bfloat16)


# ---------------------------------------------------------------------------------------------
# Detection


def test_each_scheme_is_recognised_by_its_own_tensors() -> None:
    for scheme in SCHEMES.values():
        suffixes = [companion.suffix for companion in scheme.companions]
        assert scheme_of(scheme.weight_dtype, suffixes) is scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_plain_weights_count_as_bf16(dtype: torch.dtype) -> None:
    assert scheme_of(dtype, []) is BF16


def test_every_other_combination_is_refused() -> None:
    dtypes = [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float32, torch.uint8]
    dtypes += [torch.float8_e5m2, torch.int32]
    accepted = 0
    for dtype in dtypes:
        for count in range(len(COMPANION_SUFFIXES) + 1):
            for companions in itertools.combinations(COMPANION_SUFFIXES, count):
                scheme = scheme_of(dtype, companions)
                if isinstance(scheme, QuantScheme):
                    accepted += 1
                    assert {c.suffix for c in scheme.companions} == set(companions)
                else:
                    assert dtype_name(dtype) in scheme
                    assert "expected" in scheme
                    assert "found" in scheme
    assert accepted == 4


# ---------------------------------------------------------------------------------------------
# Quantizers, against the definitions


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int8_quantizer(rows: int, cols: int) -> None:
    weight = random_weight(rows, cols)
    weight[rows // 2] = 0
    tensors = W8A8_INT8.quantize(weight)
    assert tensors.keys() == W8A8_INT8.stored(rows, cols).keys()
    codes, scale = tensors["weight"], tensors["weight_scale"]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == (rows, 1)
    wide = weight.float()
    assert torch.equal(scale[:, 0], wide.abs().amax(1) / 127)
    for row in range(rows):
        if scale[row] == 0:
            assert not codes[row].any()
        else:
            expected = torch.round(wide[row] / scale[row]).clamp(-127, 127)
            assert torch.equal(codes[row].float(), expected)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_fp8_quantizer(rows: int, cols: int) -> None:
    weight = random_weight(rows, cols) * 3
    weight[:128, :128] = 0
    tensors = FP8_BLOCK.quantize(weight)
    codes, grid = tensors["weight"], tensors["weight_scale_inv"]
    assert (codes.dtype, grid.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert grid.shape == (-(-rows // 128), -(-cols // 128))
    wide = weight.float()
    for i, j in itertools.product(*map(range, grid.shape)):
        block = wide[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        found = codes[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
        assert grid[i, j] == block.abs().max() / 448
        if grid[i, j] == 0:
            assert not found.any()
        else:
            scaled = (block / grid[i, j]).clamp(-448, 448)
            assert torch.equal(found, scaled.to(torch.float8_e4m3fn).float())
    assert torch.isfinite(codes.float()).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_quantized_weights_mean_about_the_same(scheme: QuantScheme, rows: int, cols: int) -> None:
    weight = random_weight(rows, cols)
    tensors = scheme.quantize(weight)
    for suffix, (dtype, shape) in scheme.stored(rows, cols).items():
        assert tensors[suffix].dtype is dtype
        assert tuple(tensors[suffix].shape) == shape
    assert scheme.stored_nbytes(rows, cols) == sum(t.nbytes for t in tensors.values())
    error = (scheme.dequantize(tensors) - weight.float()).abs().max()
    bound = {"bf16": 0.0, "w8a8_int8": 0.51 / 127, "fp8": 0.07}[scheme.name]
    assert error <= bound * weight.float().abs().max()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_bf16_is_the_dequantized_weight_rounded_once(
    scheme: QuantScheme, rows: int, cols: int
) -> None:
    tensors = scheme.quantize(random_weight(rows, cols))
    expected = scheme.dequantize(tensors).to(torch.bfloat16)
    assert torch.equal(scheme.to_bf16(tensors), expected)


def test_every_fp8_code_is_dequantized() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv": torch.tensor([[0.5, 3.0]])}
    found = FP8_BLOCK.dequantize(tensors)
    scale = torch.tensor([0.5] * 128 + [3.0] * 128)
    torch.testing.assert_close(found[0], codes[0].float() * scale, equal_nan=True)
    assert found.isnan().sum() == 2
    torch.testing.assert_close(
        FP8_BLOCK.to_bf16(tensors), found.to(torch.bfloat16), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_named(value: float) -> None:
    for scheme in (W8A8_INT8, FP8_BLOCK):
        tensors = scheme.quantize(random_weight(130, 257))
        assert scheme.bad_companion(tensors) is None
        suffix = scheme.companions[0].suffix
        tensors[suffix][-1, -1] = value
        assert scheme.bad_companion(tensors) == suffix


# ---------------------------------------------------------------------------------------------
# Conversion


def _stored(scheme: QuantScheme) -> StoredTensors:
    return scheme.quantize(random_weight(130, 257, seed=3))


@pytest.mark.parametrize("stored", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("quantization", ["auto", "unquant", "w8a8_int8", "fp8"])
def test_conversion_goes_through_bf16(stored: QuantScheme, quantization: str) -> None:
    tensors = _stored(stored)
    target = target_scheme(stored, quantization)
    if target is None:
        assert (stored.name, quantization) == ("w8a8_int8", "fp8")
        with pytest.raises(QuantizationError, match="w8a8_int8 cannot be turned into fp8"):
            convert(tensors, stored, FP8_BLOCK)
        return
    found = convert(tensors, stored, target)
    if target is stored:
        assert found is tensors
        return
    expected = target.quantize(stored.dequantize(tensors).to(torch.bfloat16))
    assert found.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert torch.equal(found[suffix].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_weights_are_rounded_to_bf16(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = convert({"weight": weight}, BF16, BF16)
    assert torch.equal(found["weight"], weight.to(torch.bfloat16))
    int8 = convert({"weight": weight}, BF16, W8A8_INT8)
    assert int8["weight"].dtype is torch.int8


def test_packed_formats() -> None:
    assert [s.format for s in SCHEMES.values()] == [Format.BF16, Format.INT8, Format.FP8]
    assert [s.kv_b_format for s in SCHEMES.values()] == [
        Format.BF16,
        Format.INT8_WIDE,
        Format.BF16,
    ]
