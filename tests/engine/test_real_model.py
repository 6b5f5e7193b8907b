"""The engine on the real runner and sampler, with a small random checkpoint."""

import asyncio
import functools
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from latentcore import LLM, AsyncEngine, SamplingParams
from latentcore.config import EngineConfig, ModelConfig
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.request import Prompt
from latentcore.errors import RequestError
from latentcore.models.runner import cache_bytes_per_token
from tests.engine.test_engine import random_work

every_format = pytest.mark.parametrize("fmt", ["auto", "w8a8_int8", "fp8"])


def bits(output: RequestOutput) -> list[tuple[list[int], list[dict[int, float]] | None]]:
    """A request's tokens, and to the last bit the log-probabilities that it asked for."""
    return [
        (
            list(choice.token_ids),
            choice.logprobs
            and [{token: one.logprob for token, one in at.items()} for at in choice.logprobs],
        )
        for choice in output.outputs
    ]


def work() -> list[tuple[Prompt, SamplingParams]]:
    return random_work(3, 12)


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Callable[[str], list[RequestOutput]]:
    """Every request's answer in a format when it runs by itself, on one thread."""

    @functools.cache
    def answer(fmt: str) -> list[RequestOutput]:
        with LLM(tiny_model, quantization=fmt, threads=1, enable_prefix_caching=False) as llm:
            return [llm.generate(prompt, params)[0] for prompt, params in work()]

    return answer


@every_format
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 19, "max_num_seqs": 8},
        {"enforce_eager": True},
    ],
    ids=["together", "small chunks", "eager"],
)
def test_an_answer_does_not_depend_on_its_company(
    options: dict[str, Any],
    fmt: str,
    tiny_model: Path,
    alone: Callable[[str], list[RequestOutput]],
) -> None:
    with LLM(
        tiny_model, quantization=fmt, threads=2, enable_prefix_caching=False, **options
    ) as llm:
        prompts, params = zip(*work(), strict=True)
        outputs = llm.generate(list(prompts), list(params))
    assert list(map(bits, outputs)) == list(map(bits, alone(fmt)))


@every_format
@pytest.mark.parametrize("caching", [False, True])
def test_an_answer_does_not_depend_on_preemption(caching: bool, fmt: str, tiny_model: Path) -> None:
    params = SamplingParams(seed=1, max_tokens=99, ignore_eos=True, logprobs=1)
    prompts: list[Prompt] = [
        {"prompt_token_ids": list(range(start, start + 50))} for start in range(10)
    ]
    block = cache_bytes_per_token(ModelConfig.from_dir(tiny_model)) * 64
    with LLM(tiny_model, quantization=fmt, threads=1) as llm:
        expected = [bits(llm.generate(prompt, params)[0]) for prompt in prompts]
    with LLM(
        tiny_model,
        quantization=fmt,
        threads=2,
        kv_cache_memory_bytes=9 * block,
        max_model_len=512,
        max_num_batched_tokens=70,
        enable_prefix_caching=caching,
    ) as llm:
        outputs = llm.generate(prompts, params)
        assert llm._engine.scheduler.num_preemptions > 3
    assert [bits(output) for output in outputs] == expected


def test_prompt_logprobs_are_the_same_in_chunks_and_after_a_hit(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=2, temperature=0)
    prompt: Prompt = {"prompt_token_ids": [number % 250 for number in range(300)]}
    with LLM(tiny_model, threads=1) as llm:
        first, second = (llm.generate(prompt, params)[0] for _ in range(2))
    with LLM(tiny_model, threads=1, max_num_batched_tokens=33, max_num_seqs=8) as llm:
        third = llm.generate(prompt, params)[0]
    assert first.prompt_logprobs == second.prompt_logprobs == third.prompt_logprobs


def test_the_next_turn_reuses_the_conversation(tiny_model: Path) -> None:
    with LLM(tiny_model, threads=1) as llm:
        messages = [{"role": "user", "content": "word " * 40}]
        params = SamplingParams(max_tokens=20, temperature=0)
        (first,) = llm.chat(messages, params)
        messages.append({"role": "assistant", "content": first.outputs[0].text})
        messages.append({"role": "user", "content": "more"})
        (second,) = llm.chat(messages, params)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 192


@every_format
def test_a_short_prompt_asked_again_gives_the_same_bits(fmt: str, tiny_model: Path) -> None:
    """All but its last token come from the cache, within a block, and its path stays."""
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3)
    prompts: list[Prompt] = [
        {"prompt_token_ids": [*range(40), *range(start, start + 15)]} for start in (100, 90)
    ]
    with LLM(tiny_model, quantization=fmt, threads=2) as llm:
        outputs = [llm.generate(prompt, params)[0] for prompt in (*prompts, *prompts)]
    assert [output.num_cached_tokens for output in outputs] == [0, 40, 54, 54]
    assert list(map(bits, outputs[2:])) == list(map(bits, outputs[:2]))
    with LLM(tiny_model, quantization=fmt, threads=1, enable_prefix_caching=False) as llm:
        afresh = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert list(map(bits, afresh)) == list(map(bits, outputs[:2]))


def test_the_checkpoints_own_defaults(tiny_model: Path) -> None:
    with LLM(tiny_model, threads=1) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_p) == (0.7, 0.9)
        assert llm.loaded.end_ids == (257, 258)
        assert llm.loaded.name == tiny_model.name


def test_one_after_another_gives_memory_and_threads_back(tiny_model: Path) -> None:
    process = psutil.Process()

    def use() -> None:
        with LLM(tiny_model, threads=2, kv_cache_memory_bytes=64 << 20) as llm:
            llm.generate("Hi", SamplingParams(max_tokens=2))

    use()
    gc.collect()
    memory, threads = process.memory_info().rss, process.num_threads()
    for _ in range(8):
        use()
    gc.collect()
    assert process.num_threads() <= threads
    assert process.memory_info().rss - memory < 48 << 20


def test_what_does_not_fit_is_refused_with_the_numbers(tiny_model: Path) -> None:
    with (
        LLM(tiny_model, threads=1, max_model_len=64) as llm,
        pytest.raises(RequestError, match="has 70 tokens, max_model_len is 64"),
    ):
        llm.generate("a" * 70)


def test_streams_on_the_real_model(
    tiny_model: Path, alone: Callable[[str], list[RequestOutput]]
) -> None:
    config = EngineConfig(threads=1, enable_prefix_caching=False, max_num_seqs=4)

    async def answer(engine: AsyncEngine, item: tuple[Prompt, SamplingParams]) -> RequestOutput:
        return [output async for output in engine.generate(*item)][-1]

    async def main() -> list[RequestOutput]:
        engine = AsyncEngine(tiny_model, engine_config=config)
        try:
            return await asyncio.gather(*(answer(engine, item) for item in work()))
        finally:
            await asyncio.to_thread(engine.close)

    outputs = asyncio.run(asyncio.wait_for(main(), 120))
    assert list(map(bits, outputs)) == list(map(bits, alone("auto")))
    assert not [t for t in threading.enumerate() if t.name == "latentcore-engine"]
