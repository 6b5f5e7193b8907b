"""A server among clients that come and go at random, for a moment and for long."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import psutil
import pytest

from latentcore.config import ModelConfig
from latentcore.models.hub import resolve_model
from latentcore.models.runner import cache_bytes_per_token
from tests.server.process import ServerProcess, serving
from tests.server.traffic import Answer, Visit, ask, ask_alone, visit

CLIENTS = 200
BLOCKS = 9
"""Blocks of the latent cache: the eight requests that may run at once want up to 32."""

HEX_LETTERS = str.maketrans("0123456789", "ghijklmnop")
"""Words of letters alone: digits would be words of their own."""

SOAK_SECONDS = 20 * 60
SOAK_CLIENTS = 24
"""Clients that come within half a second, round after round."""
SOAK_REST = 4.0
"""Seconds between two rounds."""


def options(model: Path | None) -> tuple[str, ...]:
    block = cache_bytes_per_token(ModelConfig.from_dir(resolve_model(model))) * 64
    return (
        *("--max-model-len", "512", "--max-num-seqs", "8", "--max-waiting", "400"),
        *("--max-num-batched-tokens", "64", "--kv-cache-memory", str(BLOCKS * block)),
    )


async def storm(server: ServerProcess, visits: Sequence[Visit]) -> list[Answer | None]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(ask(client, one) for one in visits))


def test_200_clients_get_what_each_gets_alone(
    server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    """A fifth leaves mid-stream, the cache overflows; answers are whole and nothing is left.

    `server` has a large cache; asked there one by one, no prompt finds another's blocks.
    """
    generator = random.Random(5)
    visits = [visit(generator, number, within=1.5) for number in range(CLIENTS)]
    warm_up = [visit(generator, number, within=0.5) for number in range(1000, 1040)]
    with serving(tiny_model, *options(tiny_model), cache=tmp_path) as small:
        process = psutil.Process(small.process.pid)
        asyncio.run(storm(small, warm_up))
        small.wait_idle()
        memory = process.memory_info().rss
        answers = asyncio.run(storm(small, visits))
        small.wait_idle()
        assert small.metric("num_preemptions_total") > 0
        assert process.memory_info().rss - memory < 16 << 20
        assert small.stop() == 0
    assert 20 <= sum(answer is None for answer in answers) <= 60
    with server.http() as client:
        for one, answer in zip(visits, answers, strict=True):
            if answer is not None:
                assert answer == ask_alone(client, one)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_a_long_soak_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty minutes of such clients: memory, threads and files stay what they were.

    The tokenizers library remembers up to 10,000 words a thread, for ever; hours of clients fill
    that, so it is filled first. (On the demo model: the small one's words are whole prompts.)
    """
    with serving(None, *options(None), cache=tmp_path) as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(fill_word_caches(server))
        samples: list[tuple[float, int, int, int]] = []
        served = asyncio.run(soak(server, process, samples))
        server.wait_idle()
        figures = {
            "preemptions": server.metric("num_preemptions_total"),
            "tokens": server.metric("generation_tokens_total"),
            "idle threads": process.num_threads(),
            "idle files": process.num_fds(),
        }
        assert server.stop() == 0
    # The first quarter warms up: pools of threads, compiled grammars, allocators.
    settled = samples[len(samples) // 4 :]
    third = len(settled) // 3
    early, late = (
        statistics.median(sample[1] for sample in part)
        for part in (settled[:third], settled[-third:])
    )
    with capsys.disabled():
        print(f"\n{served} {figures}")
        for seconds, rss, threads, files in samples[:: max(1, len(samples) // 20)]:
            print(f"{seconds:6.0f} s {rss / 2**20:8.1f} MiB {threads:4} threads {files:4} files")
        print(f"resident set, median early {early / 2**20:.1f}, late {late / 2**20:.1f} MiB")
    assert late - early < 4 << 20
    assert max(at[2] for at in settled[-third:]) <= max(at[2] for at in settled[:third])
    assert max(at[3] for at in settled[-third:]) <= max(at[3] for at in settled[:third])


async def fill_word_caches(server: ServerProcess) -> None:
    """Has every thread of the server tokenize some 10,000 words that it has not seen, as many a
    request as `options` allow."""
    generator = random.Random(7)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120) as client:

        async def tokenize() -> None:
            words = (f"{generator.getrandbits(40):x}" for _ in range(60))
            text = " ".join(word.translate(HEX_LETTERS) for word in words)
            (await client.post("/tokenize", json={"prompt": text})).raise_for_status()

        for _ in range(750):
            await asyncio.gather(*(tokenize() for _ in range(32)))


async def soak(
    server: ServerProcess, process: psutil.Process, samples: list[tuple[float, int, int, int]]
) -> dict[str, int]:
    """Round after round of clients until the time is over; how many were answered and cut."""
    started = time.monotonic()
    generator = random.Random(6)
    served = {"answered": 0, "cut": 0}
    while True:
        seconds = time.monotonic() - started
        memory = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
        samples.append((seconds, memory, process.num_threads(), process.num_fds()))
        if seconds >= SOAK_SECONDS:
            return served
        first = SOAK_CLIENTS * len(samples)
        visits = [visit(generator, first + i, within=0.5) for i in range(SOAK_CLIENTS)]
        for answer in await storm(server, visits):
            served["cut" if answer is None else "answered"] += 1
        await asyncio.sleep(SOAK_REST)
