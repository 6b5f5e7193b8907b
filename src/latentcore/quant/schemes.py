"""The schemes there are: how a stored weight is recognised, and into what it may be turned."""

from collections.abc import Collection, Mapping

import torch

from latentcore.errors import CheckpointError, QuantizationError
from latentcore.quant.bf16 import BF16
from latentcore.quant.fp8_block import FP8_BLOCK
from latentcore.quant.scheme import QuantScheme, StoredTensors
from latentcore.quant.w8a8_int8 import W8A8_INT8

SCHEMES: Mapping[str, QuantScheme] = {s.name: s for s in (BF16, W8A8_INT8, FP8_BLOCK)}
"""Every scheme by name."""

WIDER_DTYPES = (torch.float32, torch.float16)
"""Dtypes of plain weights that are accepted as bfloat16, rounded once, with a warning."""

COMPANION_SUFFIXES = tuple(
    companion.suffix for scheme in SCHEMES.values() for companion in scheme.companions
)
"""Last parts of the names of all companions of all schemes."""

_BY_DTYPE: Mapping[torch.dtype, QuantScheme] = {
    **{scheme.weight_dtype: scheme for scheme in SCHEMES.values()},
    **dict.fromkeys(WIDER_DTYPES, BF16),
}


def scheme_of(dtype: torch.dtype, companions: Collection[str]) -> QuantScheme | str:
    """The scheme of a weight stored as `dtype` with `companions` (suffixes) beside it.

    The tensors decide, never a config. Where nothing fits, returns what was expected and found as a
    text for an error message.
    """
    scheme = _BY_DTYPE.get(dtype)
    found = ", ".join(sorted(companions)) or "no companion"
    if scheme is None:
        known = ", ".join(dtype_name(known) for known in _BY_DTYPE)
        return f"expected a weight of dtype {known}, found {dtype_name(dtype)} with {found}"
    expected = {companion.suffix for companion in scheme.companions}
    if set(companions) == expected:
        return scheme
    wanted = " and ".join(f"{c.suffix} {c.layout}" for c in scheme.companions) or "no companion"
    return (
        f"expected {wanted} beside a weight of dtype {dtype_name(dtype)} "
        f"({scheme.name}), found {found}"
    )


def target_scheme(stored: QuantScheme, quantization: str) -> QuantScheme | None:
    """The scheme to run a weight in that is `stored`, for a value of `--quantization`.

    None where that pair is not supported: int8 to fp8 (it would add one rounding to another).
    """
    if quantization == "auto":
        return stored
    if quantization == "unquant":
        return BF16
    target = SCHEMES[quantization]
    if stored is target or stored is BF16:
        return target
    if stored is FP8_BLOCK and target is W8A8_INT8:
        return target
    return None


def convert(tensors: StoredTensors, stored: QuantScheme, target: QuantScheme) -> StoredTensors:
    """Turns the stored tensors of one weight into those of another scheme.

    By way of bfloat16: dequantized, rounded once, then quantized by the target's exact quantizer.
    Plain weights of a wider dtype become bfloat16. Raises QuantizationError for a pair that
    `target_scheme` never gives.
    """
    if stored is BF16 and tensors["weight"].dtype in WIDER_DTYPES:
        tensors = {"weight": tensors["weight"].to(torch.bfloat16)}
    if stored is target:
        return tensors
    if target is not BF16 and target_scheme(stored, target.name) is None:
        raise QuantizationError(
            f"weights stored as {stored.name} cannot be turned into {target.name}; "
            f"use --quantization auto or unquant"
        )
    return target.quantize(stored.to_bf16(tensors))


def convert_finite(
    name: str, where: str, tensors: StoredTensors, stored: QuantScheme, target: QuantScheme
) -> StoredTensors:
    """`convert` of the weight `name` (`X` of `X.weight`) from file `where`, its numbers checked.

    Raises CheckpointError naming a companion that holds NaN or infinity, or a weight that does and
    is to be quantized: no scale would suit it.
    """
    bad = stored.bad_companion(tensors)
    if bad is not None:
        raise CheckpointError(
            f"{name}.{bad}: expected finite scales, found NaN or infinity; the file is damaged",
            where=where,
        )
    made = convert(tensors, stored, target)
    if target is not stored and target.bad_companion(made) is not None:
        raise CheckpointError(
            f"{name}.weight: expected finite numbers to quantize as {target.name}, found NaN or "
            f"infinity; the file is damaged",
            where=where,
        )
    return made


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as safetensors spells it: BF16, F32, I8, F8_E4M3..."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
