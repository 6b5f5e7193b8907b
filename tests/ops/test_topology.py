"""Cores, sockets and memory nodes from sysfs trees; who owns what; where memory lies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from latentcore.ops import runtime, storage
from latentcore.ops.runtime import Core, topology_below
from latentcore.quant.packed import huge_buffer


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@dataclass
class Machine:
    """A sysfs tree of a machine: sockets x clusters (memory nodes) x cores x SMT siblings.

    Linux numbers the first siblings of all cores first, then the second ones.
    """

    root: Path
    sockets: int
    clusters: int
    cores: int
    smt: int
    siblings_file: str | None = "core_cpus_list"

    def __post_init__(self) -> None:
        physical = self.sockets * self.clusters * self.cores
        nodes: dict[int, list[int]] = {}
        for core in range(physical):
            node = core // self.cores
            siblings = [core + physical * i for i in range(self.smt)]
            nodes.setdefault(node, []).extend(siblings)
            for cpu in siblings:
                folder = self.root / f"sys/devices/system/cpu/cpu{cpu}/topology"
                write(folder / "physical_package_id", str(node // self.clusters))
                write(folder / "core_id", str(core % (self.clusters * self.cores)))
                if self.siblings_file:
                    write(folder / self.siblings_file, ",".join(map(str, siblings)))
        base = self.root / "sys/devices/system/node"
        write(base / "online", f"0-{len(nodes) - 1}")
        for node, cpus in nodes.items():
            write(base / f"node{node}/cpulist", as_list(cpus))

    @property
    def cpus(self) -> range:
        return range(self.sockets * self.clusters * self.cores * self.smt)


def as_list(cpus: Iterable[int]) -> str:
    """A kernel list: 0-3,8."""
    out: list[str] = []
    run: list[int] = []
    for cpu in [*sorted(cpus), -1]:
        if run and cpu != run[-1] + 1:
            out.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run = []
        run.append(cpu)
    return ",".join(out)


SHAPES = [(1, 1, 2, 1), (1, 1, 8, 2), (2, 1, 16, 2), (2, 4, 6, 2), (2, 3, 32, 2), (4, 2, 3, 1)]


@pytest.mark.parametrize("siblings_file", ["core_cpus_list", "thread_siblings_list", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_thread_a_core_node_by_node(
    tmp_path: Path, shape: tuple[int, int, int, int], siblings_file: str | None
) -> None:
    machine = Machine(tmp_path, *shape, siblings_file)
    sockets, clusters, cores, smt = shape
    found = topology_below(tmp_path, machine.cpus)
    assert [core.cpu for core in found.cores] == list(range(sockets * clusters * cores))
    assert [core.node for core in found.cores] == [
        node for node in range(sockets * clusters) for _ in range(cores)
    ]
    assert (found.sockets, found.nodes) == (sockets, sockets * clusters)
    assert found.logical == len(machine.cpus) == found.threads * smt
    assert found.quota is None


def test_cores_whose_numbers_alternate_between_nodes_are_sorted(tmp_path: Path) -> None:
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(folder / "physical_package_id", str(cpu % 2))
        write(folder / "core_cpus_list", str(cpu))
    base = tmp_path / "sys/devices/system/node"
    write(base / "online", "0-1")
    write(base / "node0/cpulist", "0,2,4,6")
    write(base / "node1/cpulist", "1,3,5,7")
    found = topology_below(tmp_path, range(8))
    assert [core.cpu for core in found.cores] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [core.node for core in found.cores] == [0] * 4 + [1] * 4


def test_only_what_the_affinity_mask_holds(tmp_path: Path) -> None:
    """taskset and cpusets: the second sibling stands for a core whose first is not allowed."""
    Machine(tmp_path, 2, 1, 4, 2)
    found = topology_below(tmp_path, [1, 9, 10, 6, 14])
    assert found.cores == (Core(1, 0, 0), Core(10, 0, 0), Core(6, 1, 1))
    assert (found.logical, found.threads) == (5, 3)


def test_a_node_without_processors_and_missing_files(tmp_path: Path) -> None:
    Machine(tmp_path, 1, 1, 4, 1)
    write(tmp_path / "sys/devices/system/node/online", "0-2,x,5")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "")
    assert topology_below(tmp_path, range(6)).cores == (
        *(Core(cpu, 0, 0) for cpu in range(4)),
        Core(4, 0, 0),
        Core(5, 0, 0),
    )


V1, V2 = "4:cpu,cpuacct:/docker/x\n2:memory:/docker/x", "0::/kube/pod/x"


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        (V2, {"kube/pod/x/cpu.max": "max 100000"}, None),
        (V2, {"kube/pod/x/cpu.max": "350000 100000"}, 3),
        (V2, {"kube/pod/x/cpu.max": "600000 100000", "kube/cpu.max": "200000 100000"}, 2),
        (V2, {"cpu.max": "50000 100000"}, 1),  # the group's own folder mounted as the root
        (V2, {"kube/pod/cpu.max": "nonsense"}, None),
        (V1, {"cpu/docker/x/cpu.cfs_quota_us": "-1"}, None),
        (
            V1,
            {
                "cpu/docker/x/cpu.cfs_quota_us": "450000",
                "cpu/docker/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "800000", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, membership: str, limits: dict[str, str], expected: int | None
) -> None:
    Machine(tmp_path, 1, 1, 6, 1)
    write(tmp_path / "proc/self/cgroup", membership)
    for path, text in limits.items():
        write(tmp_path / "sys/fs/cgroup" / path, text)
    found = topology_below(tmp_path, range(6))
    assert found.quota == expected
    assert found.threads == min(6, expected or 6)


def node_of_threads(cores: Sequence[Core], threads: int) -> list[int]:
    """Threads lie evenly over the cores."""
    return [cores[t * len(cores) // threads].node for t in range(threads)]


@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 2), (2, 1, 16, 2), (2, 3, 5, 1), (4, 2, 3, 1), (1, 1, 70, 1)], ids=str
)
def test_help_stays_in_the_memory_node(tmp_path: Path, shape: tuple[int, int, int, int]) -> None:
    """With every number of threads: own work first, then that of others of the node, and help
    reaches each of them, directly or by way of others."""
    machine = Machine(tmp_path, *shape)
    cores = topology_below(tmp_path, machine.cpus).cores
    for threads in range(1, len(cores) + 1):
        node = node_of_threads(cores, threads)
        found = runtime.help_below(tmp_path, machine.cpus, threads)
        assert len(found) == threads
        for t, helped in enumerate(found):
            mates = [other for other in range(threads) if node[other] == node[t]]
            assert helped[0] == t
            differs = {(other - mates[0]) ^ (t - mates[0]): other for other in mates}
            near = [d for d in sorted(differs) if d < 16 or d.bit_count() == 1]
            assert helped == [differs[d] for d in near]
            assert all(t in found[other] for other in helped), "help goes both ways"
            reached = {t}
            while more := {h for other in reached for h in found[other]} - reached:
                reached |= more
            assert reached == set(mates)


def test_oversubscription_is_told(tmp_path: Path) -> None:
    Machine(tmp_path, 2, 2, 2, 2)
    found = topology_below(tmp_path, range(16))
    assert found.line() == "8 cores in 2 sockets and 4 memory nodes"
    assert found.oversubscribed(8) is None
    told = found.oversubscribed(9)
    assert told is not None
    assert told.startswith("9 threads on 8 cores")
    assert "8 is the fastest" in told


def test_this_machine() -> None:
    found = runtime.topology()
    assert 1 <= runtime.default_threads() <= found.threads
    assert 1 <= len(found.cores) <= found.logical


# ---- who owns what -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 96, 127, 256, 1024])
@pytest.mark.parametrize("n", [0, 1, 7, 36, 64, 128, 129, 448, 8080])
def test_shares_are_contiguous_complete_and_stay_in_place(n: int, threads: int) -> None:
    plain = runtime.owned_ranges(n, threads, 0)
    for turn in (0, 1, 2, 7, 255, 10**6):
        found = runtime.owned_ranges(n, threads, turn)
        assert [i for share in found for i in share] == list(range(n))
        assert {len(share) for share in found} <= {n // threads, -(-n // threads)}
        # Turning the remainder moves no bound by more than a unit: rows stay in their node.
        assert all(abs(a.start - b.start) <= 1 for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("threads", [96, 128, 192, 256])
@pytest.mark.parametrize("units", [64, 128, 448])
def test_the_remainder_goes_round(units: int, threads: int) -> None:
    """Any 8 turns in a row give no thread more than about one unit above the mean."""
    for first in range(0, 300, 37):
        load = [0] * threads
        for turn in range(first, first + 8):
            for t, share in enumerate(runtime.owned_ranges(units, threads, turn)):
                load[t] += len(share)
        assert max(load) - sum(load) / threads < 1.7


@pytest.mark.parametrize("threads", [1, 3, 16, 96, 256, 1000])
@pytest.mark.parametrize("n", [7, 88, 128, 448])
@pytest.mark.parametrize("lists", [1, 8, 9])
def test_experts_share_out_evenly_over_all_of_them(n: int, lists: int, threads: int) -> None:
    """Complete, each share within a unit of its plain place, and nobody more than a unit above
    the mean over all, or a thirty-second."""
    for what, total, unit in (("gate_up", 2 * n, 2), ("down", n, 1)):
        plain = [
            range(unit * share.start, unit * share.stop)
            for share in runtime.owned_ranges(n, threads, 0)
        ]
        load = [0] * threads
        for found in runtime.owned_lists(what, n, lists, threads):
            assert [i for share in found for i in share] == list(range(total))
            for t, (share, place) in enumerate(zip(found, plain, strict=True)):
                assert abs(share.start - place.start) <= unit
                assert abs(share.stop - place.stop) <= unit
                load[t] += len(share)
        mean = lists * total / threads
        assert max(load) <= max(-(-lists * total // threads), mean * 33 / 32)


H, EXPERT, DENSE, VOCAB = 7168, 2048, 18432, 129280
Q_LORA, KV, HEADS = 1536, 576, 128


def panels(rows: int, parts: int = 1) -> int:
    return -(-rows // 16) * parts


def most(loads: Sequence[Sequence[range]]) -> tuple[float, float]:
    """Panels of the busiest thread, and of the mean one, over matrices without barriers between."""
    totals = [sum(map(len, of_thread)) for of_thread in zip(*loads, strict=True)]
    return max(totals), sum(totals) / len(totals)


def v3_phases(threads: int, fmt: str) -> dict[str, tuple[float, float, int]]:
    """DeepSeek-V3's decode step, by what stands between two barriers: panels of the busiest and of
    the mean thread, as they own them before any help, and the weight of a panel."""

    def own(n: int, turn: int = 0) -> list[range]:
        return runtime.owned_ranges(n, threads, turn)

    def experts(what: str, n: int, lists: int = 9) -> list[list[range]]:
        return runtime.owned_lists(what, n, lists, threads)

    def cut(n: int, cols: int) -> list[range]:
        """One matrix; bf16 chains are not cut along K."""
        if fmt == "bf16":
            return own(n)
        pieces = cols // 128
        found = runtime.owned_pieces(n, pieces, threads)
        assert [i for share in found for i in share] == list(range(n * pieces))
        return found

    return {
        "q_a and kv_a": (*most([own(panels(Q_LORA) + panels(KV))]), H),
        "q_b": (*most([own(panels(HEADS * 192), 1)]), Q_LORA),
        "w_kc": (*most([own(HEADS * panels(512))]), 128),
        "w_vc": (*most([own(HEADS * panels(128))]), 512),
        "o": (*most([cut(panels(H), HEADS * 128)]), HEADS * 128 if fmt == "bf16" else 128),
        "experts gate and up": (*most(experts("gate_up", panels(EXPERT))), H),
        "experts down": (*most(experts("down", panels(H))), EXPERT),
        "dense gate and up": (*most(experts("gate_up", panels(DENSE), 1)), H),
        "dense down": (*most([cut(panels(H), DENSE)]), DENSE if fmt == "bf16" else 128),
        "output head": (*most([own(panels(VOCAB))]), 2 * H),
    }


@pytest.mark.parametrize(
    ("fmt", "threads", "step"),
    [
        *(("int8", threads, 1.03) for threads in (64, 96, 128, 192, 256)),
        *(("bf16", threads, 1.06) for threads in (64, 96, 128, 256)),
        ("bf16", 192, 1.08),
    ],
)
def test_v3_splits_evenly(fmt: str, threads: int, step: float) -> None:
    """Bytes of the busiest thread over the mean one's, over a whole step at batch 1; experts within
    a thirty-second, over the nine that a token has. Matrices in int8, and FP8 alike, are cut along
    K where that evens them out, in bf16 they are not.

    What is left is the first projections, 132 panels beside as many threads and more, and in bf16
    `o`, whose 448 panels do not divide by 128 or 256.
    """
    phases = v3_phases(threads, fmt)
    times = {"output head": 1, "dense gate and up": 3, "dense down": 3}
    times |= {"experts gate and up": 58, "experts down": 58}
    busiest = mean = 0.0
    for name, (most_of, mean_of, nbytes) in phases.items():
        busiest += most_of * nbytes * times.get(name, 61)
        mean += mean_of * nbytes * times.get(name, 61)
        if "experts" in name or "gate and up" in name:
            assert most_of / mean_of <= 33 / 32, name
    assert busiest / mean <= step


# ---- where memory lies ---------------------------------------------------------------------------


@pytest.fixture
def _two_threads() -> Iterable[None]:
    runtime.set_threads(2)
    yield
    runtime.set_threads(1)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("groups", [1, 3])
def test_placement_counts_pages(groups: int) -> None:
    memory = huge_buffer(5_000_000)
    before = storage.placement(memory, groups)
    assert before.pages + before.unknown == 20
    memory[7], memory[4096] = 3, 5
    storage.touch(memory, groups)
    assert (int(memory[7]), int(memory[4096]), int(memory.sum())) == (3, 5, 8)
    after = storage.placement(memory, groups)
    if after.unknown:
        pytest.skip("this system does not tell where pages lie")
    assert after.pages == 20
    if runtime.topology().nodes == 1 and runtime.topology().logical >= 2:
        assert after.own == 20


def test_threads_that_outnumber_cores_own_no_node() -> None:
    threads = len(runtime.topology().cores) + 1
    runtime.set_threads(threads)
    memory = huge_buffer(1 << 20)
    storage.touch(memory, 1)
    assert storage.placement(memory, 1).own == 0
