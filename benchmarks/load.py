"""A server under load: rates, waiting times, and what the server costs beside the engine.

    python benchmarks/load.py                       # the demo model
    python benchmarks/load.py /tmp/int8 --parts load,overhead,gap,turn,sampling

Parts, each measured over HTTP on a server process of its own unless it says otherwise:

load      streams that start together: output tokens/s, time to first token (TTFT), and time between
          tokens, at several numbers of streams.
overhead  8 streams on the server beside the same requests on an engine in this process, in turns:
          the server's share of the engine's output tokens/s.
gap       8 streams generate while a prompt of 4,096 tokens (or what the model holds) is read: the
          99th percentile of the waits for their tokens, over the mean time of a chunk of that
          prompt alone.
turn      a conversation of 4,000 tokens (or what the model holds) goes on: TTFT of the second
          turn, over TTFT of its new tokens alone plus what attending to the prefix adds to a
          forward pass over them.
sampling  8 sequences on an engine in this process: shares of a step that sampling takes, and that
          all passes outside of the model's native step.
restart   a server is killed with SIGKILL while 8 streams generate, and started again: seconds until
          it is ready, over those of a start after a clean end, both with packed weights on disk.

The parts that use an engine hold the model twice. Random token ids are as good as text here.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from latentcore import LLM, SamplingParams
from latentcore.config import ModelConfig
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.sampling_params import RequestOutputKind
from latentcore.models.chunk import SequenceChunk
from latentcore.models.hub import resolve_model
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime

PARTS = ("load", "overhead", "gap", "turn", "sampling", "restart")
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {},
    "top_k and min_p": {"top_p": 1.0, "top_k": 50, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"logprobs": 5},
}
STREAMS = 8
NEW_TOKENS = 128
"""Of the second turn of a conversation."""


Report = Callable[..., None]
"""Takes a figure's name, its value, and a unit."""


@dataclass
class Stream:
    """When a request was sent and when each of its tokens came, in seconds."""

    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    cached: int = 0

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Waits for the tokens that came between two times."""
        return [
            after - before
            for before, after in zip(self.tokens, self.tokens[1:], strict=False)
            if begin <= after and before <= end
        ]


@dataclass(frozen=True)
class Server:
    """A running server. `started`: seconds until it was ready."""

    url: str
    process: subprocess.Popen[str]
    started: float


@contextmanager
def serving(command: Sequence[str]) -> Iterator[Server]:
    """Runs a server, until it is ready and to the end of the block."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on (http://[^\"\s]+)", line):
                break
        else:
            sys.exit("the server did not start:\n" + "".join(lines))
        # Its log must be read, or the pipe fills up.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            # The socket is bound, but the first answer comes once the server takes connections.
            httpx2.get(f"{found.group(1)}/ready", timeout=60).raise_for_status()
            yield Server(found.group(1), process, time.perf_counter() - begin)
        finally:
            process.terminate()


async def ask(
    client: httpx2.AsyncClient, stream: Stream, prompt: list[int], answer: int, seed: int = 0
) -> None:
    """One completion, token by token, into `stream`."""
    body = {
        "prompt": prompt,
        "max_tokens": answer,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **SAMPLING,
    }
    stream.sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            sys.exit(f"the server answered {response.status_code}: {await response.aread()!r}")
        async for line in response.aiter_lines():
            now = time.perf_counter()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"]:
                stream.tokens.append(now)
            elif usage := event.get("usage"):
                stream.cached = usage["prompt_tokens_details"]["cached_tokens"]


class Load:
    """Requests for one model, new random prompts each time."""

    def __init__(self, url: str, vocab_size: int, prompt: int, answer: int) -> None:
        self._url = url
        self._vocab_size = vocab_size
        self._prompt = prompt
        self._answer = answer
        self._random = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(length)]

    def prompts(self, count: int) -> list[list[int]]:
        return [self.prompt(self._prompt) for _ in range(count)]

    def client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self._url, timeout=600, limits=limits)

    async def together(self, count: int) -> list[Stream]:
        """Streams that start together."""
        streams = [Stream() for _ in range(count)]
        async with self.client() as client:
            await asyncio.gather(
                *(
                    ask(client, stream, prompt, self._answer, seed)
                    for seed, (stream, prompt) in enumerate(
                        zip(streams, self.prompts(count), strict=True)
                    )
                )
            )
        return streams

    async def one(self, prompt: list[int]) -> Stream:
        """A stream by itself, of one token."""
        stream = Stream()
        async with self.client() as client:
            await ask(client, stream, prompt, 1)
        return stream

    @asynccontextmanager
    async def generating(
        self, count: int
    ) -> AsyncIterator[tuple[httpx2.AsyncClient, list[Stream]]]:
        """`count` streams, each past its first tokens; they are dropped at the block's end."""
        streams = [Stream() for _ in range(count)]
        async with self.client() as client:
            tasks = [
                asyncio.ensure_future(ask(client, stream, self.prompt(self._prompt), 1000))
                for stream in streams
            ]
            while not all(len(stream.tokens) > 2 for stream in streams):
                await asyncio.sleep(0.01)
            yield client, streams
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def beside(self, prompt: list[int], count: int) -> list[float]:
        """Waits of `count` streams for their tokens while a long prompt is read."""
        long = Stream()
        async with self.generating(count) as (client, streams):
            await ask(client, long, prompt, 1)
            await asyncio.sleep(0.5)
        return [gap for stream in streams for gap in stream.gaps(long.sent, long.tokens[0])]

    async def cut_off(self, count: int, kill: Callable[[], None]) -> None:
        """Kills the server while `count` streams generate."""
        async with self.generating(count):
            kill()


def rate(streams: Sequence[Stream]) -> float:
    """Output tokens a second, from the first request to the last token."""
    seconds = max(one.tokens[-1] for one in streams) - min(one.sent for one in streams)
    return sum(len(one.tokens) for one in streams) / seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100 * len(ordered)) // 100) - 1)]


class Alone:
    """The engine by itself, in this process."""

    def __init__(self, llm: LLM, load: Load, answer: int) -> None:
        self._engine, self._preparer = llm._engine, llm._preparer
        self._load = load
        self._answer = answer
        self._numbers = iter(range(1 << 30))

    def start(self, count: int, **changes: Any) -> None:
        """Queues `count` requests."""
        for seed, prompt in enumerate(self._load.prompts(count)):
            params = SamplingParams(
                max_tokens=self._answer,
                ignore_eos=True,
                seed=seed,
                output_kind=RequestOutputKind.DELTA,
                **{**SAMPLING, **changes},
            )
            prepared = self._preparer.prepare({"prompt_token_ids": prompt}, params)
            self._engine.add_request(str(next(self._numbers)), prepared)

    def rate(self, count: int) -> float:
        """Output tokens a second of `count` requests."""
        begin = time.perf_counter()
        self.start(count)
        tokens = sum(len(choice.token_ids) for out in self._run() for choice in out.outputs)
        return tokens / (time.perf_counter() - begin)

    def shares(self, count: int, **changes: Any) -> tuple[float, float, float]:
        """Median decode step (seconds), and the shares of sampling and of all but the model."""
        engine = self._engine
        steps: list[tuple[float, float, float]] = []
        with timed(engine._sampler, "sample") as sampling, timed(runtime.Graph, "replay") as model:
            self.start(count, **changes)
            while engine.has_unfinished:
                before = sampling[0], model[0]
                begin = time.perf_counter()
                engine.step()
                seconds = time.perf_counter() - begin
                if engine.last_step.pure_decode and engine.last_step.num_sequences == count:
                    steps.append((seconds, sampling[0] - before[0], model[0] - before[1]))
        return (
            statistics.median(seconds for seconds, _, _ in steps),
            statistics.median(sampled / seconds for seconds, sampled, _ in steps),
            statistics.median(1 - native / seconds for seconds, _, native in steps),
        )

    def _run(self) -> Iterator[RequestOutput]:
        while self._engine.has_unfinished:
            yield from self._engine.step().outputs


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Adds up the time that calls of owner.name take."""
    total = [0.0]
    call = getattr(owner, name)

    def timing(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args)
        finally:
            total[0] += time.perf_counter() - begin

    setattr(owner, name, timing)
    try:
        yield total
    finally:
        setattr(owner, name, call)


def prefix_seconds(runner: ModelRunner, load: Load, prefix: int, repeats: int) -> float:
    """What attending to the prefix adds to a forward pass over the new tokens."""
    blocks = list(range(2 * -(-(prefix + NEW_TOKENS) // runner.block_size)))
    held, fresh = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    ids = load.prompt(prefix)
    for at in range(0, prefix, runner.max_num_batched_tokens):
        part = ids[at : at + runner.max_num_batched_tokens]
        runner.forward([SequenceChunk(part, at, held, "prefill", "none")])

    def seconds(start: int, table: list[int]) -> float:
        path = runner.choose_path(NEW_TOKENS, start + NEW_TOKENS)
        chunk = SequenceChunk(load.prompt(NEW_TOKENS), start, table, path, "last")
        begin = time.perf_counter()
        runner.forward([chunk])
        return time.perf_counter() - begin

    added = [seconds(prefix, held) - seconds(0, fresh) for _ in range(repeats + 1)]
    return statistics.median(added[1:])


def measure_load(load: Load, counts: Sequence[int], rounds: int, report: Report) -> None:
    """Rates and waiting times at several numbers of streams."""
    for count in counts:
        runs = [asyncio.run(load.together(count)) for _ in range(rounds)]
        streams = [stream for run in runs for stream in run]
        ttfts = [stream.ttft * 1e3 for stream in streams]
        gaps = [gap * 1e3 for stream in streams for gap in stream.gaps()]
        name = f"{count} streams" if count > 1 else "1 stream"
        report(f"{name}: output tokens/s", statistics.median(map(rate, runs)))
        for share in (0.5, 0.99):
            report(f"{name}: TTFT p{share:.0%}"[:-1], percentile(ttfts, share), "ms")
        for share in (0.5, 0.99):
            report(f"{name}: between tokens p{share:.0%}"[:-1], percentile(gaps, share), "ms")


def measure_overhead(load: Load, alone: Alone, rounds: int, report: Report) -> None:
    """The server beside the engine, in turns, so that both see the same machine."""
    engine, server = [], []
    for _ in range(rounds):
        engine.append(alone.rate(STREAMS))
        server.append(rate(asyncio.run(load.together(STREAMS))))
    report("engine alone, 8 sequences: output tokens/s", statistics.median(engine))
    report("server, 8 streams: output tokens/s", statistics.median(server))
    ratios = [one / other for one, other in zip(server, engine, strict=True)]
    report("server over engine (at least 0.95)", statistics.median(ratios))


def measure_gap(load: Load, long: int, chunk: int, rounds: int, report: Report) -> None:
    """Streams beside a long prompt."""
    alone = [asyncio.run(load.one(load.prompt(long))).ttft for _ in range(rounds)]
    own = statistics.median(alone) / -(-long // chunk)
    gaps: list[float] = []
    for _ in range(rounds):
        gaps += asyncio.run(load.beside(load.prompt(long), STREAMS))
    report("tokens of the long prompt", long)
    report(f"a chunk of {chunk} tokens alone", own * 1e3, "ms")
    report("wait for tokens beside it, p50", percentile(gaps, 0.5) * 1e3, "ms")
    report("wait for tokens beside it, p99", percentile(gaps, 0.99) * 1e3, "ms")
    report("p99 over a chunk's time (below 2.5)", percentile(gaps, 0.99) / own)


def measure_turn(load: Load, llm: LLM, prefix: int, rounds: int, report: Report) -> None:
    """The second turn of a conversation."""
    runner = llm.loaded.runner
    assert isinstance(runner, ModelRunner)
    attention = prefix_seconds(runner, load, prefix, rounds)
    second, fresh, read = [], [], 0
    for _ in range(rounds):
        before = load.prompt(prefix)
        asyncio.run(load.one(before))
        turn = [*before, *load.prompt(NEW_TOKENS)]
        stream = asyncio.run(load.one(turn))
        read = len(turn) - stream.cached
        second.append(stream.ttft)
        fresh.append(asyncio.run(load.one(load.prompt(NEW_TOKENS))).ttft)
    report("tokens of the first turn", prefix)
    report("tokens of the second turn that were read", read)
    report(f"TTFT of {NEW_TOKENS} tokens alone", statistics.median(fresh) * 1e3, "ms")
    report("attending to the prefix", attention * 1e3, "ms")
    report("TTFT of the second turn", statistics.median(second) * 1e3, "ms")
    ratios = [one / (other + attention) for one, other in zip(second, fresh, strict=True)]
    report("second turn over both (at most 1.25)", statistics.median(ratios))


def measure_restart(
    command: Sequence[str], make_load: Callable[[str], Load], rounds: int, report: Report
) -> None:
    """Starts after a clean end and after SIGKILL, in turns."""

    def start(*, kill: bool) -> float:
        with serving(command) as server:
            if kill:
                load = make_load(server.url)
                asyncio.run(load.cut_off(STREAMS, server.process.kill))
            return server.started

    start(kill=False)
    clean, killed = [], []
    for _ in range(rounds):
        clean.append(start(kill=True))
        killed.append(start(kill=False))
    report("ready after a clean end", statistics.median(clean), "s")
    report("ready after SIGKILL", statistics.median(killed), "s")
    ratios = [one / other for one, other in zip(killed, clean, strict=True)]
    report("after SIGKILL over after a clean end", statistics.median(ratios))


def measure_sampling(alone: Alone, report: Report) -> None:
    """Shares of a decode step."""
    for name, changes in SAMPLERS.items():
        seconds, sampling, outside = alone.shares(STREAMS, **changes)
        report(f"{name}: step", seconds * 1e3, "ms")
        report(f"{name}: sampling's share (below 0.02)", sampling)
        report(f"{name}: share outside of the model", outside)


def measure_parts(
    parts: Sequence[str],
    load: Load,
    llm: LLM | None,
    args: argparse.Namespace,
    length: int,
    report: Report,
) -> None:
    """The parts that share one server, and one engine where they need it."""
    asyncio.run(load.together(2))
    if "load" in parts:
        measure_load(load, list(map(int, args.streams.split(","))), args.rounds, report)
    if "gap" in parts:
        measure_gap(load, min(4096, length - 64), args.chunk, args.rounds, report)
    if llm is None:
        return
    alone = Alone(llm, load, args.answer)
    alone.rate(2)
    if "overhead" in parts:
        measure_overhead(load, alone, args.rounds, report)
    if "turn" in parts:
        measure_turn(load, llm, min(4000, length - 2 * NEW_TOKENS), args.rounds, report)
    if "sampling" in parts:
        measure_sampling(alone, report)


def main() -> None:
    """Measures and prints one line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: the demo model")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--chunk", type=int, default=512, help="--max-num-batched-tokens")
    parser.add_argument("--rounds", type=int, default=5, help="repeats; medians are given")
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")

    figures: dict[str, float] = {}

    def report(name: str, value: float, unit: str = "") -> None:
        figures[name] = value
        print(f"{name:44}{value:10.3f} {unit}", flush=True)

    length = 4096 if args.folder is None else 8192
    options: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": 32,
        "max_num_batched_tokens": args.chunk,
        "threads": args.threads,
    }
    command = [sys.executable, "-m", "latentcore", "serve"]
    if args.folder is not None:
        command.append(str(args.folder))
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--port", "0"]
    vocab = ModelConfig.from_dir(resolve_model(args.folder and str(args.folder))).vocab_size
    print(
        f"{args.folder or 'the demo model'}, {runtime.isa_tier()}, {args.threads} threads, "
        f"prompts of {args.prompt} tokens, answers of {args.answer}"
    )

    def make_load(url: str) -> Load:
        return Load(url, vocab, args.prompt, args.answer)

    if "restart" in parts:
        measure_restart(command, make_load, args.rounds, report)
        parts.remove("restart")
    if parts:
        llm = LLM(args.folder, **options) if {"overhead", "turn", "sampling"} & set(parts) else None
        with serving(command) as server:
            measure_parts(parts, make_load(server.url), llm, args, length, report)
        if llm is not None:
            llm.close()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
