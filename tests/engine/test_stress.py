"""Clients that come and go at random on the real model, with a cache that is far too small."""

import asyncio
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from latentcore import LLM, AsyncEngine, SamplingParams
from latentcore.config import EngineConfig, ModelConfig
from latentcore.engine.engine import StepStats
from latentcore.engine.outputs import RequestOutput, StepOutputs
from latentcore.engine.request import Prompt
from latentcore.models.chunk import Path as AttentionPath
from latentcore.models.runner import ModelRunner, cache_bytes_per_token
from tests.engine.test_real_model import bits

CLIENTS = 200
BLOCKS = 11
LONGEST = 320


@dataclass(frozen=True)
class Visit:
    """What a client asks, when it comes, and after how many outputs it leaves (None: never)."""

    prompt: list[int]
    params: SamplingParams
    arrives: float
    patience: int | None
    stays: bool
    """Goes on with the conversation once it is answered."""


def visits(seed: int, count: int, *, turns: bool) -> list[Visit]:
    """One in five is cut; many begin with the same words."""
    generator = random.Random(seed)
    shared = [generator.randrange(256) for _ in range(140)]
    found = []
    for number in range(count):
        begin = shared[: generator.choice([0, 0, 64, 100])]
        own = [generator.randrange(256) for _ in range(generator.randrange(1, 60))]
        params = SamplingParams(
            temperature=generator.choice([0.0, 0.8]),
            top_p=generator.choice([1.0, 0.9]),
            repetition_penalty=generator.choice([1.0, 1.1]),
            seed=number,
            max_tokens=generator.randrange(2, 120),
            ignore_eos=True,
            n=generator.choice([1, 1, 1, 2]),
            logprobs=generator.choice([None, 1]),
        )
        patience = generator.randrange(1, 20) if generator.random() < 0.2 else None
        stays = turns and generator.random() < 0.3
        found.append(Visit(begin + own, params, generator.random() * 1.5, patience, stays))
    return found


Answered = tuple[list[int], SamplingParams, RequestOutput]


async def receive(engine: AsyncEngine, visit: Visit, done: list[Answered]) -> None:
    """Comes, waits, perhaps leaves, perhaps asks again; notes what was answered in full."""
    await asyncio.sleep(visit.arrives)
    prompt, params = visit.prompt, visit.params
    for _ in range(2 if visit.stays else 1):
        stream = engine.generate({"prompt_token_ids": prompt}, params)
        outputs: list[RequestOutput] = []
        async for output in stream:
            outputs.append(output)
            if len(outputs) == visit.patience:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        if not outputs[-1].finished:
            return
        done.append((prompt, params, outputs[-1]))
        answer = list(outputs[-1].outputs[0].token_ids)
        prompt = [*prompt, *answer, 10, 11, 12]
        if len(prompt) + (params.max_tokens or 0) > LONGEST:
            return


CASES = {
    "int8, absorbed": ("w8a8_int8", "decode"),
    "fp8, absorbed": ("fp8", "decode"),
    "bf16, un-absorbed": ("auto", "prefill"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if number else ())
        for number, case in enumerate(CASES)
    ],
)
def test_200_clients_get_what_each_gets_alone(
    case: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attention path for all prompts, so that prefix hits change no bit either.

    Turns that go on hit blocks of generated tokens, which are always absorbed.
    """
    fmt, path = CASES[case]
    monkeypatch.setattr(ModelRunner, "choose_path", _always(path))  # type: ignore[arg-type]
    work = visits(11, CLIENTS, turns=path == "decode")
    block = cache_bytes_per_token(ModelConfig.from_dir(tiny_model)) * 64
    config = EngineConfig(
        quantization=fmt,
        threads=1,
        max_model_len=LONGEST,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=BLOCKS * block,
    )
    done: list[Answered] = []
    preemptions, hits = asyncio.run(asyncio.wait_for(_storm(tiny_model, config, work, done), 240))
    assert preemptions > 10
    assert hits > 1000
    assert len(done) >= 0.75 * CLIENTS
    with LLM(tiny_model, quantization=fmt, threads=1, enable_prefix_caching=False) as llm:
        for prompt, params, output in done:
            tokens: Prompt = {"prompt_token_ids": prompt}
            assert bits(output) == bits(llm.generate(tokens, params)[0])


async def _storm(
    model: Path, config: EngineConfig, work: list[Visit], done: list[Answered]
) -> tuple[int, int]:
    """Serves all of `work`; returns pre-emptions and prompt tokens found in the cache."""
    engine = await asyncio.to_thread(AsyncEngine, model, engine_config=config)

    def check(stats: StepStats, step: StepOutputs) -> None:
        engine._engine.check_integrity()

    engine.observe(check)
    # What a first storm leaves behind (threads, buffers, compiled patterns) is there to stay.
    await asyncio.gather(*(receive(engine, visit, []) for visit in work[:40]))
    memory = _memory()
    await asyncio.gather(*(receive(engine, visit, done) for visit in work))
    for _ in range(500):
        snapshot = engine.snapshot()
        if snapshot.num_running == snapshot.num_waiting == engine.num_unfinished == 0:
            break
        await asyncio.sleep(0.01)
    assert engine.dead is None
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.cache_usage) == (0, 0, 0)
    blocks = engine._engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks == BLOCKS
    held = sum(len(output.prompt_token_ids) for _, _, output in done)
    await asyncio.to_thread(engine.close)
    assert _memory() - memory < 4 * held + (12 << 20)
    return snapshot.num_preemptions, snapshot.prefix_hit_tokens


def _memory() -> int:
    gc.collect()
    rss: int = psutil.Process().memory_info().rss
    return rss


def _always(path: AttentionPath) -> Callable[[ModelRunner, int, int], AttentionPath]:
    def choose(runner: ModelRunner, uncached_tokens: int, context: int) -> AttentionPath:
        return path

    return choose
