"""What an op's entry checks cost.

    python benchmarks/entry_checks.py

For each op, the time of a call that is checked and recorded (in a capture, so that no kernel
runs; ops that refuse a capture are called on meta tensors) less the time of a call of the same
schema that does nothing. The empty ops are compiled here, into a temporary folder, with the
compiler on the path (or CXX). Prints a line an op; exits with 1 where a check takes 1 microsecond
or more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from latentcore.ops import runtime
from tests.ops import schemas
from tests.ops.samples import EAGER_ONLY, SAMPLES

LIMIT = 1e-6
CALLS = 200
ROUNDS = 150

TYPES = {
    "Tensor": "torch::stable::Tensor",
    "List[int]": "std::vector<int64_t>",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
}


def source(names: Sequence[str]) -> str:
    """C++ that defines latentcore_empty::op, of the op's own schema, for each name."""
    lines = ["#include <torch/csrc/stable/library.h>", "#include <torch/csrc/stable/tensor.h>"]
    for name in names:
        schema = schemas.schema(name)
        types = ", ".join(TYPES[str(a.type)] for a in schema.arguments)
        text = str(schema).removeprefix("latentcore::")
        lines += [
            f"static void empty_{name}({types}) {{}}",
            f'STABLE_TORCH_LIBRARY_FRAGMENT(latentcore_empty, m) {{ m.def("{text}"); }}',
            (
                "STABLE_TORCH_LIBRARY_IMPL(latentcore_empty, CompositeExplicitAutograd, m) "
                f'{{ m.impl("{name}", TORCH_BOX(&empty_{name})); }}'
            ),
        ]
    return "\n".join(lines) + "\n"


def load_empty_ops(names: Sequence[str]) -> None:
    """Compiles and loads them."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        cpp, library = Path(folder, "empty.cpp"), Path(folder, "empty.so")
        cpp.write_text(source(names))
        compiler = os.environ.get("CXX", "c++")
        flags = [
            "-std=c++20",
            "-O2",
            "-shared",
            "-fPIC",
            "-DTORCH_TARGET_VERSION=0x020B000000000000",
        ]
        paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu"]
        subprocess.run([compiler, *flags, str(cpp), "-o", str(library), *paths], check=True)
        torch.ops.load_library(str(library))


def timed(call: Callable[..., object], arguments: Sequence[Any]) -> float:
    """Seconds a call, the mean of one short round."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call(*arguments)
    return (time.perf_counter() - start) / CALLS


def checked(name: str, arguments: Sequence[Any]) -> float:
    """One round of the op itself."""
    call = schemas.op(name)
    if name in EAGER_ONLY:
        return timed(call, arguments)
    with runtime.Graph.capture() as graph:
        seconds = timed(call, arguments)
    graph.free()
    return seconds


def cost(name: str) -> tuple[float, int]:
    """Seconds that an op's checks take, and its number of arguments.

    Short rounds of both, in turns; the fastest of each is the one that nothing disturbed.
    """
    sample = max(SAMPLES[name], key=lambda s: s.shape.startswith("n3"))
    arguments = list(schemas.expanded(name, sample.case().fresh()).values())
    if name in EAGER_ONLY:
        arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    empty = getattr(torch.ops.latentcore_empty, name).default
    pairs = [(checked(name, arguments), timed(empty, arguments)) for _ in range(ROUNDS)]
    real, bare = (min(times) for times in zip(*pairs, strict=True))
    return real - bare, len(arguments)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    runtime.set_threads(1)
    names = schemas.TENSOR_OPS
    load_empty_ops(names)
    print(f"{'op':24} arguments  entry checks")
    worst = 0.0
    for name in names:
        seconds, count = cost(name)
        worst = max(worst, seconds)
        where = "on meta tensors" if name in EAGER_ONLY else ""
        print(f"{name:24} {count:9}  {seconds * 1e9:6.0f} ns  {where}".rstrip())
    print(f"worst {worst * 1e9:.0f} ns; the limit is {LIMIT * 1e9:.0f} ns")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
