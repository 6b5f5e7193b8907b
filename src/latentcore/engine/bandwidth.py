"""This machine's read bandwidth, measured once and kept for the next time.

What else runs can only lower what is measured, so the most that was ever measured is kept.
"""

import hashlib
import json
import os
import platform
from pathlib import Path

from latentcore.envs import cache_dir
from latentcore.models.memory import available_memory

_SECONDS = 0.5
_LEAST_BYTES = 64 << 20
_FORMAT = 4


def machine_read_bandwidth() -> float:
    """Bytes a second that the team of threads, as it is set now, reads from memory.

    Measured in about a second, then kept in the cache folder for this kind of
    processor, set of cores and number of threads. A cache folder that cannot be written is no
    error; the next call measures again.
    """
    from latentcore.ops import runtime

    found = _kept(_read(_path()), _machine_key(runtime.num_threads()))
    return found or keep_read_bandwidth(measure_read_bandwidth(_SECONDS))


def measure_read_bandwidth(seconds: float) -> float:
    """Bytes a second that the team of threads reads from memory now.

    Takes about `seconds`, and for the time a quarter of the memory that is free, if it needs as
    much: the buffer has to be many times larger than the caches.
    """
    from latentcore.ops import runtime

    return runtime.read_bandwidth(seconds, max(available_memory() // 4, _LEAST_BYTES))


def keep_read_bandwidth(measured: float) -> float:
    """Keeps what was measured with the team of threads as it is set now, if it is more than was
    known: a first measurement may have come at a busy moment. Returns the larger of the two."""
    from latentcore.ops import runtime

    key = _machine_key(runtime.num_threads())
    known = _read(_path())
    found = _kept(known, key)
    if found is not None and found >= measured:
        return found
    _write(_path(), {**known, key: measured})
    return measured


def _path() -> Path:
    return cache_dir() / "bandwidth.json"


def _kept(known: dict[str, object], key: str) -> float | None:
    found = known.get(key)
    return float(found) if isinstance(found, int | float) and found > 0 else None


def _machine_key(threads: int) -> str:
    cpu = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = platform.processor()
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    text = f"{_FORMAT}|{platform.node()}|{cpu}|{cores}|{threads}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(values))
        temporary.replace(path)
    except OSError:
        return
