"""Threads, instruction set, captured graphs, measurements."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentcore.errors import UnsupportedCpuError, UserError
from latentcore.ops import control
from latentcore.quant.packed import Format

logger = logging.getLogger(__name__)

_MEETING_SECONDS = 0.02
_SLOW_MEETING = 3e-4
"""Seconds that threads take to meet from which on they are taken not to run at the same time: four
times what 48 threads took on the average, a twentieth of what was seen where 64 did not."""

_FEW_THREADS = 8
"""Fewer are not measured: another program that is busy for a moment would weigh too much."""


def isa_tier() -> str:
    """The instruction set tier in use: `avx2`, `avx512` or `amx`.

    Raises UnsupportedCpuError where the CPU lacks AVX2, or what LATENTCORE_FORCE_ISA asks for.
    """
    try:
        return control.isa_tier()
    except RuntimeError as error:
        raise UnsupportedCpuError(str(error).splitlines()[0]) from None


@contextmanager
def forced_tier(name: str) -> Iterator[None]:
    """Runs a block in another tier than the best. Raises UserError where the CPU lacks it.

    Besides the tiers there are `avx512-cascadelake`, `avx512-icelake` and `avx512-cooperlake`: the
    avx512 tier as those processors run it, without BF16 and VBMI, without BF16, without VBMI.
    Packed weights are the same for all tiers; results need not be.
    """
    try:
        control.force_isa_tier(name)
    except RuntimeError as error:
        raise UserError(str(error).splitlines()[0]) from None
    try:
        yield
    finally:
        control.force_isa_tier("")


def cpu_features() -> frozenset[str]:
    """What this CPU and operating system offer: avx2, avx512, avx512_bf16, avx512_vbmi, amx."""
    return frozenset(control.cpu_features().split())


def default_threads() -> int:
    """Physical cores within the affinity mask and the cgroup's quota; fewer where they do not run
    at the same time.

    The host of a virtual machine may have fewer processors than its guests believe in. It then
    takes some away for milliseconds, for which all threads wait at the next barrier, thousands of
    times a second. Eight threads or more are measured, the first time that this is asked while no
    other team is at work: in 20 ms where all is well. A number that is less than the cores is
    logged.
    """
    here = topology()
    if here not in _found_threads and here.threads >= _FEW_THREADS and num_threads() == 1:
        try:
            _found_threads[here] = threads_that_meet(here.threads, _meeting_of)
        finally:
            set_threads(1)
    return _found_threads.get(here, here.threads)


def threads_that_meet(most: int, meeting: Callable[[int], float]) -> int:
    """The largest number, in eighths of `most` down to a quarter, whose threads run at the same
    time: `meeting(threads)` measures how long they take to meet. `most` where no number does."""
    slow = 0.0
    for eighths in range(8, 1, -1):
        threads = most * eighths // 8
        for _ in range(3):  # a busy moment is no reason
            seconds = meeting(threads)
            if seconds < _SLOW_MEETING:
                break
        else:
            slow = slow or seconds
            continue
        if threads < most:
            logger.warning(
                "%d threads do not run at the same time here, but take %.1f ms to meet: the host "
                "of this machine has fewer processors free, or other programs are busy; using "
                "%d (--threads chooses)",
                most,
                slow * 1e3,
                threads,
            )
        return threads
    return most


def _meeting_of(threads: int) -> float:
    set_threads(threads)
    return control.meeting_seconds(_MEETING_SECONDS)


@dataclass(frozen=True)
class Core:
    """A physical core, by the first of its logical processors that may be used."""

    cpu: int
    socket: int
    node: int


@dataclass(frozen=True)
class Topology:
    """The cores that a process may use, node by node: threads with consecutive numbers share one.

    quota    processors' worth of time that the control groups grant; None without a limit
    logical  logical processors in the affinity mask
    threads  what runs best: a thread a core, within the quota
    """

    cores: tuple[Core, ...]
    quota: int | None
    logical: int
    threads: int

    @property
    def nodes(self) -> int:
        """Memory nodes."""
        return len({core.node for core in self.cores})

    @property
    def sockets(self) -> int:
        """Sockets."""
        return len({core.socket for core in self.cores})

    def line(self) -> str:
        """One line for people."""

        def count(n: int, what: str) -> str:
            return f"{n} {what}{'s' * (n != 1)}"

        text = f"{count(len(self.cores), 'core')} in {count(self.sockets, 'socket')}"
        text += f" and {count(self.nodes, 'memory node')}"
        return text + (f", {self.quota} granted by the control group" if self.quota else "")

    def oversubscribed(self, threads: int) -> str | None:
        """What to tell the user where `threads` are more than run well."""
        if threads <= self.threads:
            return None
        return (
            f"{threads} threads on {self.line()}: they wait for each other; "
            f"{self.threads} is the fastest"
        )


_found_threads: dict[Topology, int] = {}


def topology() -> Topology:
    """The cores that this process may use now."""
    return _parsed(control.topology())


def topology_below(root: Path, allowed: Sequence[int]) -> Topology:
    """The same from copies of sysfs and procfs below `root`, with an affinity mask of `allowed`."""
    return _parsed(control.topology_below(str(root), list(allowed)))


def help_below(root: Path, allowed: Sequence[int], threads: int) -> list[list[int]]:
    """Whose work each of `threads` threads takes on the machine of `topology_below`, in order: its
    own, then that of a few threads of its memory node. At most one thread a core."""
    lines = control.help_below(str(root), list(allowed), threads).splitlines()
    return [list(map(int, line.split())) for line in lines]


def _parsed(text: str) -> Topology:
    first, *lines = text.splitlines()
    quota, logical, threads = map(int, first.split())
    cores = tuple(Core(*map(int, line.split())) for line in lines)
    return Topology(cores, quota or None, logical, threads)


def owned_ranges(n: int, threads: int, turn: int) -> list[range]:
    """Which of `n` units each thread owns; `turn` shifts who carries the remainder."""
    return _ranges(control.owned_ranges(n, threads, turn))


def owned_lists(what: str, n: int, lists: int, threads: int) -> list[list[range]]:
    """Which panels each thread owns of each of `lists` equal experts, at few rows.

    what  "gate_up": `n` pairs of panels, a panel of gate and one of up by turns; "down": `n` panels
    """
    return [_ranges(control.owned_lists(what, n, at, lists, threads)) for at in range(lists)]


def owned_pieces(panels: int, pieces: int, threads: int) -> list[range]:
    """Which pieces each thread owns of one int8 or FP8 matrix at few rows; a panel is `pieces` of
    them along K."""
    return _ranges(control.owned_pieces(panels, pieces, threads))


def _ranges(text: str) -> list[range]:
    return [range(*map(int, line.split())) for line in text.splitlines()]


def num_threads() -> int:
    """Threads of the team, the caller's included."""
    return control.num_threads()


def set_threads(n: int) -> None:
    """Makes the team `n` threads, 1..1024; 1 gives all worker threads back."""
    control.set_threads(n)


def release_scratch() -> None:
    """Gives the team's scratch memory back; the next op takes what it needs."""
    control.release_scratch()


def last_level_cache() -> int:
    """Bytes of all last-level caches of this machine; 0 where the system does not say."""
    return control.last_level_cache()


def read_bandwidth(seconds: float, most_bytes: int) -> float:
    """Bytes a second that the team reads from memory, measured for about `seconds`.

    The memory that is read is eight times the last-level caches, 512 MiB at least and 4 GiB at
    most, but never more than `most_bytes` (1 MiB or more); where that is less than eight times the
    caches, they are emptied of it before each pass. (Of twice its size a last-level cache still
    holds a part, since it does not replace by age.)
    """
    return control.read_bandwidth(seconds, most_bytes)


def peak_ops(fmt: Format, seconds: float) -> float:
    """Operations a second that the team reaches in registers with this tier's best instruction.

    For INT8 that is an int8 product, for F32 an fp32 one, for all others bf16 (fp32 where the tier
    has no bf16 instruction). A multiplication and an addition count as two.
    """
    return control.peak_ops(int(fmt), seconds)


@dataclass(frozen=True)
class KernelRun:
    """One run of a kernel, in seconds.

    seconds   from its start to the barrier behind it
    own       the time that a thread worked, the mean over threads; waiting at barriers excluded
    slowest   the time that the slowest thread worked, added over the stretches between barriers
    phases    how many such stretches there are
    """

    kernel: str
    seconds: float
    own: float
    slowest: float
    phases: int


@dataclass(frozen=True)
class Region:
    """One parallel region: an op called eagerly, or the replay of a graph."""

    seconds: float
    kernels: tuple[KernelRun, ...]


@contextmanager
def profiled() -> Iterator[list[Region]]:
    """Notes where the team's time goes inside the block; the list is filled at its end.

    Regions of all threads of the program count. Raises RuntimeError where another profile is under
    way. The number of threads must not change in the block. Costs two reads of the time-stamp
    counter a barrier.
    """
    regions: list[Region] = []
    control.profile_begin()
    try:
        yield regions
    finally:
        for seconds, kernels in json.loads(control.profile_end()):
            runs = tuple(
                KernelRun(
                    name, time, sum(p[0] for p in phases), sum(p[1] for p in phases), len(phases)
                )
                for name, time, phases in kernels
            )
            regions.append(Region(seconds, runs))


class Graph:
    """Ops recorded once and replayed in one parallel region.

    Ops called inside `with Graph.capture() as graph` are recorded, not run. Their tensors must stay
    alive, at the same addresses, as long as the graph is replayed.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = 0

    @classmethod
    @contextmanager
    def capture(cls) -> Iterator["Graph"]:
        """Records this thread's ops. An op that cannot be captured raises, and nothing is kept."""
        graph = cls(control.graph_begin())
        try:
            yield graph
        except BaseException:
            control.graph_end()
            graph.free()
            raise
        graph.size = control.graph_end()

    def replay(self) -> None:
        """Runs the recorded ops in order."""
        control.graph_replay(self._handle)

    def free(self) -> None:
        """Forgets the recorded ops."""
        if self._handle:
            control.graph_free(self._handle)
            self._handle = 0
