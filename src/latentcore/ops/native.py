"""Loads the native library and hands out its ops."""

from typing import TYPE_CHECKING, Any

import torch

import latentcore._C  # noqa: F401  (registers torch.ops.latentcore)
from latentcore.errors import UnsupportedCpuError

if TYPE_CHECKING:
    from latentcore.quant.packed import PackedWeight

NAMESPACE = "latentcore"


def op(name: str) -> Any:
    """The op `latentcore::name`, resolved once."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_isa_tier = op("isa_tier")
_init_packed = op("init_packed")


def require_cpu() -> str:
    """The instruction set tier in use: `avx2`, `avx512` or `amx`.

    Raises UnsupportedCpuError where the CPU lacks AVX2, or what LATENTCORE_FORCE_ISA asks for.
    """
    try:
        return str(_isa_tier())
    except RuntimeError as error:
        raise UnsupportedCpuError(str(error).splitlines()[0]) from None


def init_packed(dst: torch.Tensor, dst_desc: list[int]) -> None:
    """Writes the header of a packed weight into fresh memory `dst` (uint8, of the exact size)."""
    _init_packed(dst, dst_desc)


def unpack(name: str, argument: str, weight: "PackedWeight") -> tuple[torch.Tensor, list[int]]:
    """Data and descriptor of a packed weight, or TypeError naming op and argument."""
    try:
        return weight.data, weight.desc
    except AttributeError:
        raise TypeError(
            f"latentcore::{name}: argument '{argument}': expected a PackedWeight, "
            f"found {type(weight).__name__}"
        ) from None
