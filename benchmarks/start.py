"""How long a start takes, from a new process to the first token: the first one and the next ones.

    python benchmarks/start.py CHECKPOINT [--threads N] [--repeats N] [--first N] [--json FILE]

Beside another engine's start: peers/compare.py.

The first start packs the checkpoint and keeps the result, in a folder of its own below --cache; the
next ones read it. Checkpoint and pack are in the page cache. The bar for the next starts is the
time of their imports + bytes / (a fifth of the read bandwidth) + 0.5 s, bandwidth measured in this
run.

A hypervisor may take memory that its guest has freed, and is slow to give it back: then a start
measures the hypervisor. So the next starts are measured twice, in turn: with as much memory as they
need held by this process until they have done their imports (`at hand`), and with what the system
happens to have (`as it comes`). How long touching that memory took is shown beside them.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from latentcore import LLM, SamplingParams
from latentcore.bench.machine import describe_machine, watched
from latentcore.config import EngineConfig, ModelConfig
from latentcore.engine.bandwidth import measure_read_bandwidth
from latentcore.models.checkpoint import Checkpoint as Tensors
from latentcore.models.packed_cache import Pack, pack_of
from latentcore.models.resolve import resolve
from latentcore.ops import runtime, storage
from latentcore.quant.packed import huge_buffer

PROMPT = list(range(2, 10))


@dataclass(frozen=True)
class Start:
    """Seconds of one start, and what it takes of memory.

    imports      from the start of the process to the last import
    loading      its parts, as `LoadedModel.load_seconds` names them
    first_token  from the last import to the first token, loading included
    beyond       bytes that the process then has in memory (its resident set) beyond packed weights
    """

    imports: float
    loading: dict[str, float]
    first_token: float
    beyond: int

    @property
    def whole(self) -> float:
        """From the start of the process to the first token."""
        return self.imports + self.first_token


def one(checkpoint: Path, threads: int, began: float) -> None:
    """One start in this process, told on standard output, with a pause behind the imports."""
    importlib.import_module("latentcore.engine.preflight")  # else it would count as loading
    imports = time.monotonic() - began
    print("imported", flush=True)
    sys.stdin.readline()
    again = time.monotonic()
    with LLM(checkpoint, threads=threads, max_model_len=4096) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate({"prompt_token_ids": PROMPT}, greedy)
        seconds = time.monotonic() - again
        beyond = resident() - llm.loaded.runner.weight_bytes
        found = Start(imports, llm.loaded.load_seconds, seconds, beyond)
    print(json.dumps(asdict(found)), flush=True)


def resident() -> int:
    """Bytes of this process in memory, those of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
    return int(found) * 1024


def start(checkpoint: Path, threads: int, held: int) -> tuple[Start, float]:
    """One start in a process of its own, and the seconds that touching `held` bytes took here."""
    began = time.monotonic()
    memory = huge_buffer(held) if held else None
    if memory is not None:
        storage.touch(memory, 1)
    touching = time.monotonic() - began
    command = [sys.executable, __file__, str(checkpoint), "--threads", str(threads)]
    began = time.monotonic()
    with subprocess.Popen(
        [*command, "--one", str(began)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        del memory
        print(file=process.stdin, flush=True)
        answer = process.stdout.readline()
    if process.returncode != 0:
        raise SystemExit(f"a start ended with {process.returncode}")
    return Start(**json.loads(answer)), touching


def pack_at(checkpoint: Path) -> Pack:
    """Where its packed weights are kept."""
    with Tensors.open(checkpoint) as tensors:
        plan = resolve(ModelConfig.from_dir(checkpoint), tensors, EngineConfig().quantization)
        return pack_of(plan, tensors)


def read_through(path: Path) -> None:
    """Brings a file into the page cache."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def row(name: str, starts: list[Start]) -> list[str]:
    """Medians of several starts."""
    loading = {
        part: statistics.median(s.loading[part] for s in starts) for part in starts[0].loading
    }
    return [
        name,
        str(len(starts)),
        f"{statistics.median(s.imports for s in starts):.2f}",
        *(f"{seconds:.2f}" for seconds in loading.values()),
        f"{statistics.median(s.first_token for s in starts):.2f}",
        f"{statistics.median(s.whole for s in starts):.2f}",
        f"{min(s.whole for s in starts):.2f} to {max(s.whole for s in starts):.2f}",
        f"{max(s.beyond for s in starts) / 1e6:.0f}",
    ]


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--repeats", type=int, default=5, help="next starts of each kind")
    parser.add_argument("--first", type=int, default=1, help="first starts")
    parser.add_argument("--cache", type=Path, help="a folder with room for the packed weights")
    parser.add_argument("--json", type=Path, help="where to keep all times")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        one(args.checkpoint, args.threads, args.one)
        return
    runtime.set_threads(args.threads)
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(dir=args.cache))
    os.environ["LATENTCORE_CACHE"] = str(cache)
    try:
        for shard in args.checkpoint.glob("*.safetensors"):
            read_through(shard)
        with watched() as disturbance:
            measure(args)
        if disturbance.stolen > 0.02:
            print(f"warning: the host took {disturbance.stolen:.0%} of the time", file=sys.stderr)
    finally:
        shutil.rmtree(cache)


def measure(args: argparse.Namespace) -> None:
    """All starts."""
    pack = pack_at(args.checkpoint)
    first: list[Start] = []
    for _ in range(args.first):
        pack.path.unlink(missing_ok=True)
        first.append(start(args.checkpoint, args.threads, 0)[0])
    if not pack.exists():
        start(args.checkpoint, args.threads, 0)
    read_through(pack.path)
    at_hand: list[Start] = []
    as_it_comes: list[Start] = []
    touching: list[float] = []
    for _ in range(args.repeats):
        found, touched = start(args.checkpoint, args.threads, pack.nbytes + pack.nbytes // 8)
        at_hand.append(found)
        touching.append(touched)
        as_it_comes.append(start(args.checkpoint, args.threads, 0)[0])
    bandwidth = measure_read_bandwidth(1.0)
    imports = statistics.median(s.imports for s in at_hand)
    bar = imports + pack.nbytes / (bandwidth / 5) + 0.5
    print(describe_machine().line(), file=sys.stderr)
    print(
        f"{pack.nbytes / 1e9:.2f} GB, read bandwidth {bandwidth / 1e9:.1f} GB/s; touching memory "
        f"took {min(touching):.2f} to {max(touching):.2f} s; bar {bar:.2f} s\n"
    )
    head = ["start", "of", "imports", *at_hand[0].loading, "imports to first token", "in all, s"]
    lines = [[*head, "range", "beyond weights, MB"], ["---"] * (len(head) + 2)]
    if first:
        lines.append(row("first", first))
    lines.append(row("next, memory at hand", at_hand))
    lines.append(row("next, memory as it comes", as_it_comes))
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if args.json is not None:
        kept = {"bar": bar, "read_bandwidth": bandwidth, "nbytes": pack.nbytes}
        starts = {"first": first, "at hand": at_hand, "as it comes": as_it_comes}
        times = {name: [asdict(s) for s in found] for name, found in starts.items()}
        args.json.write_text(json.dumps({**kept, "touching": touching, **times}, indent=1))


if __name__ == "__main__":
    main()
