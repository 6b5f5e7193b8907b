"""The machine that a measurement runs on: what it is, what it can do, and who else uses it."""

import os
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from latentcore import __version__
from latentcore.engine.bandwidth import keep_read_bandwidth, measure_read_bandwidth
from latentcore.models.cost import Cost
from latentcore.ops import runtime
from latentcore.quant.packed import Format

DISTURBED = 0.05
"""Share of the processors' time taken by others from which on figures are not to be trusted."""

_BANDWIDTH_SECONDS = 1.0
_BRIEF_SECONDS = 0.01  # three readings of the fastest ways
_PEAK_SECONDS = 0.4

_ARITHMETIC = {
    Format.F32: Format.F32,
    Format.BF16: Format.BF16,
    Format.INT8: Format.INT8,
    Format.FP8: Format.BF16,
    Format.INT8_WIDE: Format.BF16,
}
"""The format whose instructions multiply each format's weights."""


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on.

    cpu               the processor's name
    processors        logical processors of the system
    topology          cores, sockets and memory nodes that this process may use
    threads, tier     what runs the kernels
    last_level_cache  bytes, all of them together
    load              load average of the last minute when the measurement began
    """

    cpu: str
    processors: int
    topology: str
    threads: int
    tier: str
    features: tuple[str, ...]
    last_level_cache: int
    load: float
    latentcore: str
    torch: str

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.cpu}, {self.processors} logical processors, {self.topology}; "
            f"{self.threads} threads, "
            f"tier {self.tier}; load {self.load:.2f}; latentcore {self.latentcore}"
        )


def describe_machine() -> Machine:
    """The machine, with the team of threads and the tier as they are set now."""
    return Machine(
        cpu=_cpu_name(),
        processors=os.cpu_count() or 1,
        topology=runtime.topology().line(),
        threads=runtime.num_threads(),
        tier=runtime.isa_tier(),
        features=tuple(sorted(runtime.cpu_features())),
        last_level_cache=runtime.last_level_cache(),
        load=os.getloadavg()[0],
        latentcore=__version__,
        torch=torch.__version__,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


@dataclass(frozen=True)
class Ceilings:
    """What the team of threads can do at most.

    read_bandwidth  bytes a second
    peaks           operations a second, by the format of the instruction
    """

    read_bandwidth: float
    peaks: dict[Format, float]

    def peak(self, fmt: Format) -> float:
        """Operations a second with weights of this format."""
        return self.peaks[_ARITHMETIC[fmt]]

    def least_seconds(self, cost: Cost) -> float:
        """The least time that this work can take: the larger of reading and arithmetic."""
        arithmetic = sum(count / self.peak(fmt) for fmt, count in cost.operations.items())
        return max(cost.nbytes / self.read_bandwidth, arithmetic)

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of two measurements of each."""
        peaks = {fmt: max(peak, other.peaks[fmt]) for fmt, peak in self.peaks.items()}
        return Ceilings(max(self.read_bandwidth, other.read_bandwidth), peaks)


def measure_ceilings(formats: Iterable[Format]) -> Ceilings:
    """Measures with the team of threads and the tier as they are set now; takes a few seconds.

    The peak of bf16 is the faster of this tier's bf16 instruction and fp32 multiply-add. Where more
    bandwidth is found than is kept for this machine, it is kept from now on.
    """
    needed = {_ARITHMETIC[fmt] for fmt in formats}
    peaks = {fmt: runtime.peak_ops(fmt, _PEAK_SECONDS) for fmt in sorted(needed | {Format.F32})}
    if Format.BF16 in peaks:
        peaks[Format.BF16] = max(peaks[Format.BF16], peaks[Format.F32])
    bandwidth = measure_read_bandwidth(_BANDWIDTH_SECONDS)
    keep_read_bandwidth(bandwidth)
    return Ceilings(bandwidth, peaks)


def measure_bandwidth() -> float:
    """Bytes a second that the threads read now, measured as briefly as `measure_ceilings` can."""
    return measure_read_bandwidth(_BRIEF_SECONDS)


@dataclass
class Disturbance:
    """What others took of the processors' time during a measurement, as shares of all of it.

    others  other programs
    stolen  other guests of the same host
    """

    others: float = 0.0
    stolen: float = 0.0

    def warning(self) -> str | None:
        """What to tell the user, if anything."""
        if self.others + self.stolen < DISTURBED:
            return None
        return (
            f"other programs took {self.others:.0%} of the processors' time while this was "
            f"measured, other guests of the host {self.stolen:.0%}: the figures are too low; "
            "measure again on an idle machine"
        )


@contextmanager
def watched() -> Iterator[Disturbance]:
    """Watches who else uses the processors inside the block; the answer is there at its end."""
    found = Disturbance()
    busy, stolen = _system_seconds()
    own, start = _own_seconds(), time.perf_counter()
    yield found
    elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
    busy_end, stolen_end = _system_seconds()
    found.stolen = (stolen_end - stolen) / elapsed
    found.others = max(0.0, busy_end - busy - (_own_seconds() - own)) / elapsed


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _system_seconds() -> tuple[float, float]:
    """Seconds that all processors were busy, and seconds taken by the host; 0 where not told."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick
