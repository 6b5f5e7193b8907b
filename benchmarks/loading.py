"""Loads a model and tells the most memory that loading took, beside what it may take.

    python benchmarks/loading.py MODEL [--quantization w8a8_int8]

Counted is anonymous and shared memory of this process, sampled every 2 ms, more than before; pages
of mapped files are page cache and are not counted. The bound is the packed weights, the largest
shard and 1 GiB.
"""

import argparse
import json
import threading
import time
from pathlib import Path

from latentcore.config import EngineConfig
from latentcore.engine.loading import checked_model
from latentcore.models.hub import resolve_model

GIB = 1 << 30
CACHE_BYTES = 64 << 20
"""The latent cache is counted along, so it is kept small."""


def resident() -> int:
    """Bytes of anonymous and shared memory of this process."""
    total = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon", "RssShmem")):
            total += int(line.split()[1]) * 1024
    return total


class Peak:
    """The largest `resident()` within a `with` block, above that at its start, in bytes."""

    def __enter__(self) -> "Peak":
        self.start = resident()
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident() - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident() - self.start)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-model-len", type=int, default=1024)
    args = parser.parse_args()
    folder = resolve_model(args.model)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    config = EngineConfig(
        quantization=args.quantization,
        threads=args.threads,
        max_model_len=args.max_model_len,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=CACHE_BYTES,
    )
    with checked_model(args.model, config) as checked, Peak() as peak:
        began = time.perf_counter()
        loaded = checked.load()
        seconds = time.perf_counter() - began
    packed = loaded.runner.weight_bytes
    loaded.runner.close()
    bound = packed + shard + GIB
    figures = {
        "packed_bytes": packed,
        "largest_shard_bytes": shard,
        "bound_bytes": bound,
        "peak_bytes": peak.bytes,
        "peak_beyond_packed_bytes": peak.bytes - packed,
        "peak_over_bound": round(peak.bytes / bound, 3),
        "seconds": round(seconds, 2),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
