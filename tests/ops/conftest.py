"""Fixtures of the ops' tests: every test begins and ends with one thread in the best tier."""

from collections.abc import Iterator

import pytest
import torch

from latentcore.ops import runtime

TIERS = ("avx2", "avx512", "amx", "avx512-cascadelake", "avx512-icelake", "avx512-cooperlake")
NEEDS = {"avx512-icelake": "avx512_vbmi", "avx512-cooperlake": "avx512_bf16"}
"""What a tier needs beyond the part of its name before the dash."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    runtime.set_threads(1)
    yield
    runtime.set_threads(1)


def _force(name: str) -> Iterator[str]:
    for feature in (name.partition("-")[0], NEEDS.get(name, "avx2")):
        if feature not in runtime.cpu_features():
            pytest.skip(f"this CPU lacks {feature}")
    with runtime.forced_tier(name):
        yield name


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test in each tier; skips those that this CPU lacks, by name."""
    yield from _force(str(request.param))


@pytest.fixture(params=TIERS[:3])
def main_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the three tiers alone, without the variants of AVX-512."""
    yield from _force(str(request.param))
