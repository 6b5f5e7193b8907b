"""The engine on the real runner and sampler, with a small random checkpoint."""

import asyncio
import gc
import threading
from pathlib import Path

import psutil
import pytest

from latentcore import LLM, AsyncEngine, SamplingParams
from latentcore.config import EngineConfig, ModelConfig
from latentcore.engine.request import Prompt
from latentcore.errors import RequestError
from latentcore.models.runner import cache_bytes_per_token
from tests.engine.test_engine import answers, random_work


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> list[list[list[int]]]:
    """Every request's answer when it runs by itself."""
    with LLM(tiny_model, threads=1, enable_prefix_caching=False) as llm:
        return [answers(llm.generate(prompt, params)[0]) for prompt, params in work()]


def work() -> list[tuple[Prompt, SamplingParams]]:
    return random_work(3, 12)


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
    options: dict[str, int], tiny_model: Path, alone: list[list[list[int]]]
) -> None:
    with LLM(tiny_model, threads=1, enable_prefix_caching=False, **options) as llm:  # type: ignore[arg-type]
        prompts, params = zip(*work(), strict=True)
        outputs = llm.generate(list(prompts), list(params))
    assert [answers(output) for output in outputs] == alone


@pytest.mark.parametrize("caching", [False, True])
def test_an_answer_does_not_depend_on_preemption(caching: bool, tiny_model: Path) -> None:
    params = SamplingParams(seed=1, max_tokens=99, ignore_eos=True)
    prompts: list[Prompt] = [
        {"prompt_token_ids": list(range(start, start + 50))} for start in range(10)
    ]
    block = cache_bytes_per_token(ModelConfig.from_dir(tiny_model)) * 64
    with LLM(tiny_model, threads=1) as llm:
        expected = [answers(llm.generate(prompt, params)[0]) for prompt in prompts]
    with LLM(
        tiny_model,
        threads=1,
        kv_cache_memory=9 * block,
        max_model_len=512,
        enable_prefix_caching=caching,
    ) as llm:
        outputs = llm.generate(prompts, params)
        assert llm._engine.scheduler.num_preemptions > 3
    assert [answers(output) for output in outputs] == expected


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


def test_the_checkpoints_own_defaults(tiny_model: Path) -> None:
    with LLM(tiny_model, threads=1) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_p) == (0.7, 0.9)
        assert llm.loaded.end_ids == (257, 258)
        assert llm.loaded.name == tiny_model.name


def test_one_after_another_gives_memory_and_threads_back(tiny_model: Path) -> None:
    process = psutil.Process()

    def use() -> None:
        with LLM(tiny_model, threads=2, kv_cache_memory=64 << 20) as llm:
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


def test_streams_on_the_real_model(tiny_model: Path, alone: list[list[list[int]]]) -> None:
    config = EngineConfig(threads=1, enable_prefix_caching=False, max_num_seqs=4)

    async def answer(engine: AsyncEngine, item: tuple[Prompt, SamplingParams]) -> list[list[int]]:
        final = [output async for output in engine.generate(*item)][-1]
        return answers(final)

    async def main() -> list[list[list[int]]]:
        engine = AsyncEngine(tiny_model, engine_config=config)
        try:
            return await asyncio.gather(*(answer(engine, item) for item in work()))
        finally:
            await asyncio.to_thread(engine.close)

    assert asyncio.run(asyncio.wait_for(main(), 120)) == alone
    assert not [t for t in threading.enumerate() if t.name == "latentcore-engine"]
