"""How much memory this process may still take: the machine's, the control group's, the user's."""

import resource
from collections.abc import Iterator
from pathlib import Path

from latentcore.errors import InsufficientMemoryError

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60


def available_memory(proc: Path = Path("/proc"), cgroup: Path = _CGROUP_ROOT) -> int:
    """Bytes of anonymous memory that can still be had without swapping or being killed.

    The least of: the kernel's MemAvailable, what is left of every enclosing control group's limit
    (page cache inside it counts as free: it is given up first), and RLIMIT_AS and RLIMIT_DATA.
    `proc` and `cgroup` are the places of those file systems.
    """
    limits = [_meminfo(proc / "meminfo")]
    limits += _cgroup_headroom(proc / "self" / "cgroup", cgroup)
    status = _table(proc / "self" / "status")
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - status.get(used, 0) * 1024)
    return max(0, min(limits))


def require_memory(needed: int, what: str) -> None:
    """Raises InsufficientMemoryError when `needed` bytes for `what` cannot be had."""
    available = available_memory()
    if needed > available:
        raise InsufficientMemoryError(
            f"not enough memory for {what}: needed {format_bytes(needed)}, available "
            f"{format_bytes(available)}"
        )


def format_bytes(count: float) -> str:
    """A size as people read it, in powers of 1000: 674.0 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _meminfo(path: Path) -> int:
    table = _table(path)
    kib = table.get("MemAvailable", table.get("MemFree", _NO_LIMIT // 1024))
    return kib * 1024


def _table(path: Path) -> dict[str, int]:
    """The numbers of a `Name: value kB` file of /proc, as they stand."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    table = {}
    for line in lines:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            table[name] = int(fields[0])
    return table


def _cgroup_headroom(membership: Path, root: Path) -> Iterator[int]:
    """What is left of each limit between this process's control group and the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the group's own folder may be mounted as the root.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            bound, current = _number(folder / limit), _number(folder / used)
            if bound is None or current is None or bound >= _NO_LIMIT:
                continue
            yield bound - current + _page_cache(folder / "memory.stat")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _page_cache(path: Path) -> int:
    """Bytes of page cache in a control group, not dirty and not shared memory."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    total = 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "active_file") and value.isdigit():
            total += int(value)
    return total
