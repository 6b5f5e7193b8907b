"""The ops without tensors, one typed function each: threads, tier, graphs, profile, measurements.

They are as their schemas are; `runtime` makes Python's own objects of what goes in and comes out.
"""

from latentcore.ops.native import op

_set_threads = op("set_threads")
_num_threads = op("num_threads")
_topology = op("topology")
_topology_below = op("topology_below")
_help_below = op("help_below")
_owned_ranges = op("owned_ranges")
_owned_pieces = op("owned_pieces")
_owned_lists = op("owned_lists")
_isa_tier = op("isa_tier")
_force_isa_tier = op("force_isa_tier")
_cpu_features = op("cpu_features")
_packed_bytes = op("packed_bytes")
_pack_version = op("pack_version")
_release_scratch = op("release_scratch")
_graph_begin = op("graph_begin")
_graph_end = op("graph_end")
_graph_replay = op("graph_replay")
_graph_free = op("graph_free")
_profile_begin = op("profile_begin")
_profile_end = op("profile_end")
_peak_ops = op("peak_ops")
_last_level_cache = op("last_level_cache")
_meeting_seconds = op("meeting_seconds")
_read_bandwidth = op("read_bandwidth")


def set_threads(n: int) -> None:
    """Makes the team `n` threads, 1..1024."""
    _set_threads(n)


def num_threads() -> int:
    """Threads of the team."""
    return _num_threads()  # type: ignore[no-any-return]


def topology() -> str:
    """A line of quota, logical processors and threads, then one a core: processor, socket, node."""
    return _topology()  # type: ignore[no-any-return]


def topology_below(root: str, allowed: list[int]) -> str:
    """The same from copies of sysfs and procfs, with an affinity mask."""
    return _topology_below(root, allowed)  # type: ignore[no-any-return]


def help_below(root: str, allowed: list[int], threads: int) -> str:
    """`runtime.help_below` as text, a line a thread."""
    return _help_below(root, allowed, threads)  # type: ignore[no-any-return]


def owned_ranges(n: int, threads: int, turn: int) -> str:
    """Begin and end of what each thread owns of `n` units, one a line."""
    return _owned_ranges(n, threads, turn)  # type: ignore[no-any-return]


def owned_lists(what: str, n: int, at: int, lists: int, threads: int) -> str:
    """`runtime.owned_lists` as text."""
    return _owned_lists(what, n, at, lists, threads)  # type: ignore[no-any-return]


def owned_pieces(panels: int, pieces: int, threads: int) -> str:
    """`runtime.owned_pieces` as text."""
    return _owned_pieces(panels, pieces, threads)  # type: ignore[no-any-return]


def isa_tier() -> str:
    """The instruction set tier in use."""
    return _isa_tier()  # type: ignore[no-any-return]


def force_isa_tier(name: str) -> None:
    """Another tier, or one of avx512's variants; the best again for an empty name."""
    _force_isa_tier(name)


def cpu_features() -> str:
    """What CPU and operating system offer, parted by spaces."""
    return _cpu_features()  # type: ignore[no-any-return]


def packed_bytes(desc: list[int]) -> int:
    """Bytes of a packed weight with this descriptor."""
    return _packed_bytes(desc)  # type: ignore[no-any-return]


def pack_version() -> int:
    """The version of the packed weights' layout; it changes whenever their bytes do."""
    return _pack_version()  # type: ignore[no-any-return]


def release_scratch() -> None:
    """Gives the team's scratch memory back."""
    _release_scratch()


def graph_begin() -> int:
    """Begins to record this thread's ops; the new graph's handle."""
    return _graph_begin()  # type: ignore[no-any-return]


def graph_end() -> int:
    """Ends the recording; how many kernels it holds."""
    return _graph_end()  # type: ignore[no-any-return]


def graph_replay(handle: int) -> None:
    """Runs what was recorded."""
    _graph_replay(handle)


def graph_free(handle: int) -> None:
    """Forgets what was recorded."""
    _graph_free(handle)


def profile_begin() -> None:
    """Begins to note where the team's time goes."""
    _profile_begin()


def profile_end() -> str:
    """Ends that; regions, kernels and phases as JSON."""
    return _profile_end()  # type: ignore[no-any-return]


def peak_ops(fmt: int, seconds: float) -> float:
    """Operations a second in registers, measured for `seconds` (at most 60)."""
    return _peak_ops(fmt, seconds)  # type: ignore[no-any-return]


def last_level_cache() -> int:
    """Bytes of all last-level caches; 0 where the system does not say."""
    return _last_level_cache()  # type: ignore[no-any-return]


def meeting_seconds(seconds: float) -> float:
    """How long the team's threads take to meet, measured for about `seconds` (at most 60)."""
    return _meeting_seconds(seconds)  # type: ignore[no-any-return]


def read_bandwidth(seconds: float, most_bytes: int) -> float:
    """Bytes a second that the team reads, measured for about `seconds` (at most 60)."""
    return _read_bandwidth(seconds, most_bytes)  # type: ignore[no-any-return]
