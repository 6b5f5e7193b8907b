"""The registered ops, read from the dispatcher, and their calls in the form of their schemas."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from latentcore.ops import control, dense, mla, moe, packing, sampling, storage
from latentcore.quant.packed import PackedWeight

MODULES = (control, dense, mla, moe, packing, sampling, storage)


def registered(key: str | None = None) -> frozenset[str]:
    """Names of our ops that have a kernel for this dispatch key; of all without one."""
    if key is None:
        names = torch._C._dispatch_get_all_op_names()
    else:
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(n.removeprefix("latentcore::") for n in names if n.startswith("latentcore::"))


def op(name: str) -> Any:
    """The op itself."""
    return getattr(torch.ops.latentcore, name).default


def schema(name: str) -> Any:
    """An op's schema."""
    return op(name)._schema


def takes_tensors(name: str) -> bool:
    """Whether an op has tensor arguments, in whatever form."""
    return any("Tensor" in str(a.type) for a in schema(name).arguments)


TENSOR_OPS = tuple(sorted(name for name in registered() if takes_tensors(name)))
PLAIN_OPS = tuple(sorted(registered() - set(TENSOR_OPS)))
ALL_OPS = TENSOR_OPS + PLAIN_OPS


def home(name: str) -> ModuleType:
    """The module of latentcore.ops that holds an op's wrapper."""
    found = [m for m in MODULES if getattr(getattr(m, name, None), "__module__", "") == m.__name__]
    if len(found) != 1:
        raise LookupError(
            f"latentcore::{name}: expected one function in latentcore.ops, found {found}"
        )
    return found[0]


def wrapper(name: str) -> Callable[..., Any]:
    """The Python function of an op."""
    function: Callable[..., Any] = getattr(home(name), name)
    return function


def expanded(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapper's arguments as the schema's: a packed weight is data and descriptor."""
    out: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, PackedWeight):
            out[key], out[key + "_desc"] = value.data, value.desc
        else:
            out[key] = value
    names = [a.name for a in schema(name).arguments]
    if list(out) != names:
        raise LookupError(f"latentcore::{name}: expected arguments {names}, found {list(out)}")
    return out
