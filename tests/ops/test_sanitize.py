"""Only under `make sanitize`: the sanitizers are there, and see into kernels."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.sanitize

PROGRAM = """
import numpy, torch
from latentcore.ops import dense, runtime
runtime.set_threads(2)
room = numpy.ones(4 * 64 - {short}, dtype=numpy.int16)
rows = numpy.lib.stride_tricks.as_strided(room, (4, 64), (128, 2))
outside = torch.from_numpy(rows).view(torch.bfloat16)
inside = torch.empty(4, 64, dtype=torch.bfloat16)
with runtime.forced_tier("{tier}"):
    dense.rms_norm({x}, torch.ones(64), 1e-6, {out})
"""


@pytest.mark.parametrize(("x", "out"), [("outside", "inside"), ("inside", "outside")])
@pytest.mark.parametrize("short", [0, 1, 64])
def test_a_tensor_that_is_larger_than_its_memory(
    short: int, x: str, out: str, main_tier: str
) -> None:
    """One element too many is enough, read or written. Without a finding the test fails."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(short=short, x=x, out=out, tier=main_tier)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if short == 0:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0
        # A wide access that begins inside and ends outside is an "unknown crash" to it.
        found = re.search(r"SUMMARY: AddressSanitizer: (\S+) .*", done.stderr)
        assert found, done.stderr[-3000:]
        assert found[1] in ("heap-buffer-overflow", "unknown-crash"), found[0]
