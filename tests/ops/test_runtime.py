"""Threads, tiers, captured graphs, measurements."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentcore.errors import UserError
from latentcore.ops import control, dense, runtime
from latentcore.quant.packed import Format
from tests.ops import reference, samples
from tests.ops.reference import BF16
from tests.ops.samples import LINEAR, bits


def best_tier() -> str:
    features = runtime.cpu_features()
    return next(name for name in ("amx", "avx512", "avx2") if name in features)


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter with these environment variables."""
    environment = {k: v for k, v in os.environ.items() if k != "LATENTCORE_FORCE_ISA"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@dataclass(frozen=True)
class Job:
    """Calls of ops that write `out` from `x`."""

    x: torch.Tensor
    out: torch.Tensor
    run: Callable[[torch.Tensor], None]

    def alone(self) -> torch.Tensor:
        """What they give in eager execution, in memory of its own."""
        out = samples.poison(self.out.shape, BF16)
        self.run(out)
        return out


def linear_job(fmt: Format, n: int = 5, rows: int = 83, cols: int = 200) -> Job:
    g = torch.Generator().manual_seed(n)
    x, w = samples.activations(g, n, cols), samples.one(samples.matrix(g, fmt, rows, cols))
    out = samples.poison((n, rows), BF16)
    return Job(x, out, lambda to: dense.linear(x, w, to))


def mlp_job(fmt: Format, n: int = 5, hidden: int = 96, width: int = 150) -> Job:
    g = torch.Generator().manual_seed(n)
    x = samples.activations(g, n, hidden)
    gate_up = reference.pack(
        [[samples.matrix(g, fmt, width, hidden), samples.matrix(g, fmt, width, hidden)]]
    )
    down = samples.one(samples.matrix(g, fmt, hidden, width))
    out = samples.poison((n, hidden), BF16)
    return Job(x, out, lambda to: dense.mlp(x, gate_up, down, to))


CPUID = """
inline int __get_cpuid(unsigned, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *d = 0;
  *c = LEAF_1_C;
  return 1;
}
inline int __get_cpuid_count(unsigned, unsigned, unsigned* a, unsigned* b, unsigned* c,
                             unsigned* d) {
  *a = *c = *d = 0;
  *b = LEAF_7_B;
  return 1;
}
"""
TIER = """
#include <cstdio>
#include <stdexcept>
#include "isa/isa.h"
#include "kernels/kernels.h"
namespace lc {
static KernelTable none;
const KernelTable& kernels_avx2() { return none; }
const KernelTable& kernels_avx512() { return none; }
const KernelTable& kernels_avx512_vbmi() { return none; }
const KernelTable& kernels_avx512_bf16() { return none; }
const KernelTable& kernels_avx512_bf16_vbmi() { return none; }
const KernelTable& kernels_amx() { return none; }
}
int main() {
  try {
    std::puts(lc::tier_name(lc::tier()));
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
"""
OSXSAVE, FMA, F16C, AVX2 = 1 << 27, 1 << 12, 1 << 29, 1 << 5
LACKS_AVX2 = "this CPU lacks AVX2, FMA or F16C"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("leaf_1", "leaf_7", "forced", "expected"),
    [
        (0, 0, "", LACKS_AVX2),  # Nehalem
        (OSXSAVE | F16C, 0, "", LACKS_AVX2),  # Ivy Bridge
        (OSXSAVE | F16C, 0, "avx2", LACKS_AVX2),
        (OSXSAVE | F16C | FMA, AVX2, "", "avx2"),  # Haswell
        (OSXSAVE | F16C | FMA, AVX2, "avx512", "this CPU lacks it; the best tier here is avx2"),
    ],
)
def test_older_processors(
    tmp_path: Path, leaf_1: int, leaf_7: int, forced: str, expected: str
) -> None:
    """The choice of the tier, compiled against what such a processor says of itself."""
    (tmp_path / "cpuid.h").write_text(CPUID)
    (tmp_path / "tier.cpp").write_text(TIER)
    sources = Path(__file__).parents[2] / "csrc"
    subprocess.run(
        [
            *("g++", "-std=c++20", f"-DLEAF_1_C={leaf_1}u", f"-DLEAF_7_B={leaf_7}u"),
            *(f"-I{tmp_path}", f"-I{sources}", "-o", str(tmp_path / "tier")),
            *(str(tmp_path / "tier.cpp"), str(sources / "isa" / "dispatch.cpp")),
        ],
        check=True,
    )
    done = subprocess.run(
        [tmp_path / "tier"],
        env={"LATENTCORE_FORCE_ISA": forced},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stdout


JOBS: Mapping[str, Callable[[Format], Job]] = {"linear": linear_job, "mlp": mlp_job}


# ---- tiers -------------------------------------------------------------------------------------


def test_best_tier_is_used() -> None:
    expected = os.environ.get("LATENTCORE_FORCE_ISA") or best_tier()
    assert runtime.isa_tier() == expected


def test_features_are_the_kernels_own_account() -> None:
    found = runtime.cpu_features()
    assert "avx2" in found
    assert found <= {"avx2", "avx512", "avx512_bf16", "avx512_vbmi", "amx"}
    with open("/proc/cpuinfo") as file:
        flags = next(set(line.split()) for line in file if line.startswith("flags"))
    assert {"avx2", "fma", "f16c"} <= flags
    base = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
    assert ("avx512" in found) == (base <= flags)
    assert ("avx512_bf16" in found) == (base <= flags and "avx512_bf16" in flags)
    assert ("avx512_vbmi" in found) == (base <= flags and "avx512vbmi" in flags)
    if "amx" in found:
        assert {"amx_tile", "amx_int8", "amx_bf16"} <= flags


def test_forced_tier_holds_inside_the_block(tier: str) -> None:
    assert runtime.isa_tier() == tier.partition("-")[0]
    for fmt in LINEAR:
        job = linear_job(fmt)
        job.run(job.out)
        assert not bool(job.out.isnan().any())


def test_forced_tier_ends_with_the_block() -> None:
    before = runtime.isa_tier()
    with runtime.forced_tier("avx2"):
        assert runtime.isa_tier() == "avx2"
    assert runtime.isa_tier() == before
    with pytest.raises(ZeroDivisionError), runtime.forced_tier("avx2"):
        _ = 1 // 0
    assert runtime.isa_tier() == before


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx10", "avx512-zen4", " "])
def test_unknown_tier(name: str) -> None:
    before = runtime.isa_tier()
    with (
        pytest.raises(UserError, match=f"tier={name}: expected avx2, avx512 or amx"),
        runtime.forced_tier(name),
    ):
        pytest.fail("the block must not run")
    assert runtime.isa_tier() == before


def test_tier_that_the_cpu_lacks() -> None:
    lacking = [t for t in ("avx512", "amx") if t not in runtime.cpu_features()]
    if not lacking:
        pytest.skip("this CPU has all tiers")
    for name in lacking:
        message = f"tier={name}: this CPU lacks it; the best tier here is {best_tier()}"
        with pytest.raises(UserError, match=message), runtime.forced_tier(name):
            pytest.fail("the block must not run")


SHOW_TIER = """
from latentcore.errors import LatentcoreError
from latentcore.ops import runtime
try:
    print(runtime.isa_tier())
except LatentcoreError as error:
    print(type(error).__name__, error)
"""


def test_environment_forces_a_tier() -> None:
    script = """
from latentcore.ops import runtime
print(runtime.isa_tier())
with runtime.forced_tier("BEST"):
    print(runtime.isa_tier())
print(runtime.isa_tier())
"""
    shown = python(script.replace("BEST", best_tier()), LATENTCORE_FORCE_ISA="avx2")
    assert shown.stdout.split() == ["avx2", best_tier(), "avx2"], shown.stderr


def test_environment_asks_for_an_unknown_tier() -> None:
    shown = python(SHOW_TIER, LATENTCORE_FORCE_ISA="avx3")
    assert shown.stdout == (
        "UnsupportedCpuError LATENTCORE_FORCE_ISA=avx3: expected avx2, avx512 or amx\n"
    )


def test_environment_asks_for_a_tier_that_the_cpu_lacks() -> None:
    if "amx" in runtime.cpu_features():
        pytest.skip("this CPU has all tiers")
    shown = python(SHOW_TIER, LATENTCORE_FORCE_ISA="amx")
    assert shown.stdout == (
        "UnsupportedCpuError LATENTCORE_FORCE_ISA=amx: this CPU lacks it; the best tier here is "
        f"{best_tier()}\n"
    )


# ---- threads -----------------------------------------------------------------------------------


def own_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("fmt", LINEAR, ids=lambda f: f.name)
def test_any_number_of_threads_gives_the_same_bits(main_tier: str, fmt: Format, name: str) -> None:
    job = JOBS[name](fmt)
    assert runtime.num_threads() == 1
    plain = job.alone()
    for n in (1, 2, 3, 4, 2, 1):
        runtime.set_threads(n)
        assert runtime.num_threads() == n
        assert torch.equal(bits(job.alone()), bits(plain))


def test_one_thread_gives_the_others_back() -> None:
    before = own_threads()
    for n in (4, 2, 3):
        runtime.set_threads(n)
        assert own_threads() == before + n - 1
    runtime.set_threads(1)
    assert own_threads() == before


@pytest.mark.parametrize("n", [0, -1, 1025, 2**31, -(2**63)])
def test_numbers_of_threads_that_cannot_be(n: int) -> None:
    runtime.set_threads(2)
    with pytest.raises(RuntimeError, match=rf"set_threads: .*'n': expected 1\.\.1024, found {n}"):
        runtime.set_threads(n)
    assert runtime.num_threads() == 2


def test_default_is_within_the_affinity_mask() -> None:
    assert 1 <= runtime.default_threads() <= len(os.sched_getaffinity(0))
    script = """
import os
import shutil
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from latentcore.ops import runtime
print(runtime.default_threads())
"""
    shown = python(script)
    assert shown.stdout == "1\n", shown.stderr


def test_threads_meet() -> None:
    for threads in (1, 2):
        runtime.set_threads(threads)
        assert 1e-7 < control.meeting_seconds(0.001) < 1
    with pytest.raises(RuntimeError, match="seconds"):
        control.meeting_seconds(0)


@pytest.mark.parametrize(
    ("cores", "together", "expected"),
    [(64, 64, 64), (64, 55, 48), (64, 16, 16), (64, 15, 64), (9, 8, 7), (8, 2, 2), (1, 1, 1)],
)
def test_as_many_threads_as_run_at_the_same_time(
    cores: int, together: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def meeting(threads: int) -> float:
        asked.append(threads)
        busy = len(asked) == 1  # a moment that passes
        return 6e-3 if busy or threads > together else 3e-5

    assert runtime.threads_that_meet(cores, meeting) == expected
    assert bool(caplog.records) == (expected < cores)
    if expected < cores:
        assert f"{cores} threads do not run at the same time" in caplog.text
        assert f"using {expected} " in caplog.text


def test_the_default_is_measured_once_and_not_beside_a_team(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = runtime.Topology((runtime.Core(0, 0, 0),) * 16, None, 16, 16)
    monkeypatch.setattr(runtime, "topology", lambda: here)
    monkeypatch.setattr(runtime, "_found_threads", {})
    asked: list[int] = []

    def meeting(threads: int) -> float:
        runtime.set_threads(2)
        asked.append(threads)
        return 6e-3 if threads > 12 else 3e-5

    monkeypatch.setattr(runtime, "_meeting_of", meeting)
    runtime.set_threads(2)
    assert runtime.default_threads() == 16
    runtime.set_threads(1)
    assert runtime.default_threads() == 12
    assert runtime.num_threads() == 1
    runtime.set_threads(2)
    assert runtime.default_threads() == 12
    assert asked == [16, 16, 16, 14, 14, 14, 12]


def test_a_forked_child_starts_with_one_thread() -> None:
    script = """
import os, warnings
import torch
torch.set_num_threads(1)
from latentcore.ops import dense, runtime
warnings.simplefilter("ignore")
x, weight = torch.ones(3, 64).bfloat16(), torch.ones(64)
def normed():
    out = torch.zeros(3, 64).bfloat16()
    dense.rms_norm(x, weight, 1e-6, out)
    return out.tolist()
runtime.set_threads(3)
expected = normed()
child = os.fork()
if child == 0:
    fine = runtime.num_threads() == 1 and normed() == expected
    runtime.set_threads(2)
    os._exit(0 if fine and normed() == expected else 1)
_, status = os.waitpid(child, 0)
assert runtime.num_threads() == 3 and normed() == expected
print("child", os.waitstatus_to_exitcode(status))
"""
    shown = python(script)
    assert shown.stdout == "child 0\n", shown.stderr


def test_callers_from_several_threads_take_turns() -> None:
    runtime.set_threads(2)
    jobs = [linear_job(Format.INT8, n) for n in (1, 3, 5, 7)]
    expected = [job.alone() for job in jobs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(100):
            if not torch.equal(bits(jobs[i].alone()), bits(expected[i])):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(jobs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_scratch_comes_back_when_needed() -> None:
    job = mlp_job(Format.BF16, n=40)
    plain = job.alone()
    for _ in range(3):
        runtime.release_scratch()
        assert torch.equal(bits(job.alone()), bits(plain))


# ---- graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("fmt", LINEAR, ids=lambda f: f.name)
def test_replay_is_eager(tier: str, fmt: Format, name: str) -> None:
    job = JOBS[name](fmt)
    with runtime.Graph.capture() as graph:
        job.run(job.out)
    assert graph.size == 1
    assert bool(job.out.isnan().all()), "capture must not run anything"
    g = torch.Generator().manual_seed(1)
    for threads in (1, 2, 3, 4):
        runtime.set_threads(threads)
        job.x.copy_(samples.activations(g, *job.x.shape))
        job.out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(bits(job.out), bits(job.alone()))
    graph.free()


def test_a_graph_keeps_the_ops_in_order() -> None:
    """Each op's input is the last one's output; one replay runs them all."""
    g = torch.Generator().manual_seed(2)
    w = samples.one(samples.matrix(g, Format.BF16, 64, 64))
    steps = [samples.activations(g, 4, 64), *(samples.poison((4, 64), BF16) for _ in range(20))]
    with runtime.Graph.capture() as graph:
        for before, after in itertools.pairwise(steps):
            dense.linear(before, w, after)
    assert graph.size == 20
    runtime.set_threads(2)
    graph.replay()
    expected = steps[0]
    for step in steps[1:]:
        out = samples.poison((4, 64), BF16)
        dense.linear(expected, w, out)
        expected = out
        assert torch.equal(bits(step), bits(expected))
    graph.free()


def test_a_captured_graph_keeps_its_tier() -> None:
    """Kernels are chosen at capture, not at replay."""
    if best_tier() == "avx2":
        pytest.skip("this CPU has one tier")
    g = torch.Generator().manual_seed(3)
    x = samples.activations(g, 7, 1000)
    w = samples.one(samples.matrix(g, Format.BF16, 300, 1000))
    here, there, replayed = (samples.poison((7, 300), torch.float32) for _ in range(3))
    dense.logits(x, w, here)
    with runtime.forced_tier("avx2"):
        dense.logits(x, w, there)
        with runtime.Graph.capture() as graph:
            dense.logits(x, w, replayed)
    assert not torch.equal(bits(here), bits(there))
    graph.replay()
    assert torch.equal(bits(replayed), bits(there))
    graph.free()


def test_an_empty_graph() -> None:
    with runtime.Graph.capture() as graph:
        pass
    assert graph.size == 0
    graph.replay()
    graph.free()


def test_a_bad_call_ends_the_capture() -> None:
    job = linear_job(Format.BF16)

    def good_then_bad() -> None:
        job.run(job.out)
        job.run(job.out[:1].clone())

    with (
        pytest.raises(RuntimeError, match="latentcore::linear: argument 'out'"),
        runtime.Graph.capture(),
    ):
        good_then_bad()
    assert bool(job.out.isnan().all())
    job.run(job.out)  # eager again
    assert not bool(job.out.isnan().any())


def test_an_exception_ends_the_capture() -> None:
    job = linear_job(Format.BF16)

    def unrelated() -> None:
        job.run(job.out)
        raise KeyError

    with pytest.raises(KeyError), runtime.Graph.capture():
        unrelated()
    job.run(job.out)
    assert not bool(job.out.isnan().any())


def test_captures_do_not_nest() -> None:
    with (
        pytest.raises(RuntimeError, match=r"graph_begin: .*expected no capture under way"),
        runtime.Graph.capture(),
        runtime.Graph.capture(),
    ):
        pytest.fail("the block must not run")
    with runtime.Graph.capture() as graph:
        pass
    graph.free()


def test_other_threads_run_while_one_captures() -> None:
    inside, outside = linear_job(Format.INT8), mlp_job(Format.INT8)
    with runtime.Graph.capture() as graph:
        inside.run(inside.out)
        other = threading.Thread(target=outside.run, args=(outside.out,))
        other.start()
        other.join()
    assert graph.size == 1
    assert bool(inside.out.isnan().all())
    assert torch.equal(bits(outside.out), bits(outside.alone()))
    graph.free()


def test_a_graph_that_was_freed() -> None:
    job = linear_job(Format.BF16)
    with runtime.Graph.capture() as graph:
        job.run(job.out)
    graph.free()
    graph.free()  # nothing left to do
    with pytest.raises(RuntimeError, match=r"graph_replay: .*'handle': expected a live graph"):
        graph.replay()
    assert bool(job.out.isnan().all())


def test_graphs_are_apart() -> None:
    jobs = [linear_job(Format.BF16), mlp_job(Format.INT8)]
    graphs = []
    for job in jobs:
        with runtime.Graph.capture() as graph:
            job.run(job.out)
        graphs.append(graph)
    graphs[1].replay()
    assert bool(jobs[0].out.isnan().all())
    assert torch.equal(bits(jobs[1].out), bits(jobs[1].alone()))
    graphs[1].free()
    graphs[0].replay()
    assert torch.equal(bits(jobs[0].out), bits(jobs[0].alone()))
    graphs[0].free()


# ---- profiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_profile_names_what_ran(threads: int) -> None:
    runtime.set_threads(threads)
    linear, mlp = linear_job(Format.INT8), mlp_job(Format.BF16)
    plain = [linear.alone(), mlp.alone()]
    with runtime.Graph.capture() as graph:
        linear.run(linear.out)
        mlp.run(mlp.out)
        linear.run(linear.out)
    with runtime.Graph.capture() as empty:
        pass
    with runtime.profiled() as regions:
        mlp.run(mlp.out)
        empty.replay()
        graph.replay()
        empty.replay()
        linear.run(linear.out)
        assert regions == []
    names = [[k.kernel for k in region.kernels] for region in regions]
    assert names == [["mlp"], [], ["linear", "mlp", "linear"], [], ["linear"]]
    assert torch.equal(bits(linear.out), bits(plain[0]))
    assert torch.equal(bits(mlp.out), bits(plain[1]))
    for region in regions:
        assert region.seconds >= sum(k.seconds for k in region.kernels) - 1e-8
        for k in region.kernels:
            assert k.phases >= 1
            assert 0 < k.own <= k.slowest + 1e-8 * k.phases
            if threads == 1:
                assert k.own == k.slowest <= k.seconds + 1e-8 * k.phases
    phases = {k.kernel: k.phases for region in regions for k in region.kernels}
    assert all(phases[k.kernel] == k.phases for region in regions for k in region.kernels)
    graph.free()
    empty.free()


def test_a_profile_holds_the_number_of_threads() -> None:
    runtime.set_threads(2)
    with runtime.profiled(), pytest.raises(RuntimeError, match="number of threads must stay"):
        runtime.set_threads(3)
    runtime.set_threads(3)


def test_profiles_do_not_nest() -> None:
    job = linear_job(Format.BF16)
    with runtime.profiled() as regions:
        with pytest.raises(RuntimeError, match="a profile is under way"), runtime.profiled():
            pytest.fail("the block must not run")
        job.run(job.out)
    assert len(regions) == 1
    with pytest.raises(ZeroDivisionError), runtime.profiled() as after:
        _ = 1 // 0
    assert after == []
    with runtime.profiled():
        pass


# ---- measurements ------------------------------------------------------------------------------


def test_read_bandwidth() -> None:
    for threads in (1, 2):
        runtime.set_threads(threads)
        assert 1e8 < runtime.read_bandwidth(0.1, 1 << 40) < 1e14
        assert 1e8 < runtime.read_bandwidth(0.001, 1 << 20) < 1e14  # caches emptied of it
    with pytest.raises(RuntimeError, match="most_bytes"):
        runtime.read_bandwidth(0.001, (1 << 20) - 1)


def test_last_level_cache_is_what_the_system_lists() -> None:
    shared: dict[tuple[int, str], int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, cpus, size = (
            (folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
        )
        shared[int(level), cpus] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in shared), default=0)
    expected = sum(size for (level, _), size in shared.items() if level == last)
    assert runtime.last_level_cache() == expected


@pytest.mark.parametrize("fmt", Format, ids=lambda f: f.name)
def test_peak_ops(main_tier: str, fmt: Format) -> None:
    assert 1e8 < runtime.peak_ops(fmt, 0.01) < 1e15


@pytest.mark.skipif("amx" not in runtime.cpu_features(), reason="this CPU lacks amx")
def test_tiles_that_another_library_released_are_set_up_again() -> None:
    """PyTorch's own bf16 products configure and release the calling thread's tiles."""
    job = linear_job(Format.INT8, n=40)
    with runtime.forced_tier("amx"):
        before = job.alone()
        for shape in (64, 300):
            torch.randn(shape, shape).to(BF16) @ torch.randn(shape, shape).to(BF16)
            assert torch.equal(bits(job.alone()), bits(before))
