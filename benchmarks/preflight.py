"""How long preflight takes over published checkpoints at full size, and how much memory.

    python benchmarks/preflight.py [--cpus 2] [--repeat 3]

Each checkpoint is written as sparse files that hold headers and no weights, and checked in a
process of its own, on the processors named. Time is from the start of that process to its end, so
imports count; the median of the repeats is given. Peak memory is the process's own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from checkpoints import CONFIGS, Sparse, tensor_list

SHARDS = 163
CHECKPOINTS = (
    ("v3", "bf16"),
    ("v3", "fp8"),
    ("v3", "int8"),
    ("kimi-k2", "fp8"),
    ("v2", "bf16"),
    ("v2-lite", "bf16"),
    ("moonlight", "bf16"),
)
SECONDS, BYTES = 10.0, 1.5 * 2**30
"""What a preflight may take at most."""

# A machine that holds every model, so that all of them come out ready.
PROGRAM = """
import resource
import sys
from pathlib import Path
from latentcore.config import EngineConfig
from latentcore.engine.preflight import preflight
from latentcore.models import memory
memory.available_memory = lambda: 4 * 10**12
report = preflight(Path(sys.argv[1]), EngineConfig())
assert report.ready, report.problems
print(report.tensors, report.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measured(folder: Path, repeat: int) -> dict[str, Any]:
    """Tensors, seconds in all and of the checks alone, and peak memory."""
    whole, checks, peaks = [], [], []
    tensors = 0
    for _ in range(repeat):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        whole.append(time.perf_counter() - start)
        if done.returncode != 0:
            sys.exit(f"error: preflight failed: {done.stderr[-2000:]}")
        count, seconds, peak = done.stdout.split()
        tensors = int(count)
        checks.append(float(seconds))
        peaks.append(int(peak))
    return {
        "tensors": tensors,
        "seconds": statistics.median(whole),
        "checks": statistics.median(checks),
        "peak_bytes": max(peaks),
    }


def main() -> int:
    """Measures each checkpoint. Exit code 1 where one takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cpus", type=int, default=2, help="processors to use")
    parser.add_argument("--repeat", type=int, default=3, help="runs a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    rows = []
    for name, fmt in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder:
            config = CONFIGS[name]
            Sparse.plan(config, tensor_list(config, fmt), SHARDS).write(Path(folder))
            row = {"model": name, "format": fmt, **measured(Path(folder), options.repeat)}
        rows.append(row)
        if not options.json:
            print(
                f"{name:10} {fmt:5} {row['tensors']:7} tensors  {row['seconds']:5.1f} s "
                f"({row['checks']:.1f} s without starting Python)  "
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=2))
    over = [r for r in rows if r["seconds"] >= SECONDS or r["peak_bytes"] >= BYTES]
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
