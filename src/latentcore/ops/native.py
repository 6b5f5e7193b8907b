"""Loads the native library and hands out its ops."""

from typing import TYPE_CHECKING, Any

import torch

import latentcore._C  # noqa: F401  (registers torch.ops.latentcore)

if TYPE_CHECKING:
    from latentcore.quant.packed import PackedWeight

NAMESPACE = "latentcore"


def op(name: str) -> Any:
    """The op `latentcore::name`, resolved once."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def unpack(name: str, argument: str, weight: "PackedWeight") -> tuple[torch.Tensor, list[int]]:
    """Data and descriptor of a packed weight, or TypeError naming op and argument."""
    try:
        return weight.data, weight.desc
    except AttributeError:
        raise TypeError(
            f"latentcore::{name}: argument '{argument}': expected a PackedWeight, "
            f"found {type(weight).__name__}"
        ) from None


def flag(name: str, argument: str, value: bool) -> bool:
    """The value itself if it is a bool, or TypeError: PyTorch would take None for False."""
    if value is True or value is False:
        return value
    raise TypeError(
        f"latentcore::{name}: argument '{argument}': expected a bool, found {type(value).__name__}"
    )
