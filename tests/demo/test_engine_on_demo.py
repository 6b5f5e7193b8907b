"""The engine on the demo model: what it writes and how well it predicts, beside transformers.

`fixtures/golden.json` holds greedy continuations by transformers in fp32, with the lead of each
token's logit over the runner-up's; `fixtures/held_out.json` passages that the training leaves out.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentcore import LLM, SamplingParams
from latentcore.models.hub import DEMO_MODEL
from latentcore.models.quantize import quantize_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN: list[dict[str, Any]] = json.loads((FIXTURES / "golden.json").read_text())["cases"]
HELD_OUT: list[str] = json.loads((FIXTURES / "held_out.json").read_text())["documents"]

CLEAR = {"auto": 1.0, "w8a8_int8": 3.0, "fp8": 5.0}
"""Leads, in logits, from which a token cannot be lost in each scheme.

About twice the median over positions of the largest error of any log-probability of the held-out
passages: 0.4, 1.4 and 2.9.
"""
SLACK = {"auto": 0.001, "w8a8_int8": 0.01, "fp8": 0.01}
"""Relative difference in bits a byte: of bf16 to transformers, of the others to bf16."""

schemes = pytest.mark.parametrize("scheme", list(CLEAR))


@pytest.fixture(scope="module")
def llms() -> Iterator[dict[str, LLM]]:
    """The demo model as it is stored (bf16) and quantized while loading."""
    opened = {
        scheme: LLM(
            quantization=scheme, threads=1, max_model_len=2048, kv_cache_memory_bytes=64 << 20
        )
        for scheme in CLEAR
    }
    yield opened
    for llm in opened.values():
        llm.close()


@pytest.fixture(scope="module")
def held_out_ids(llms: dict[str, LLM]) -> list[list[int]]:
    tokenizer = llms["auto"].get_tokenizer()
    assert tokenizer is not None
    return [tokenizer.encode(text, add_begin=True) for text in HELD_OUT]


def bits_per_byte(nats: float) -> float:
    return nats / math.log(2) / sum(len(text.encode()) for text in HELD_OUT)


@pytest.fixture(scope="module")
def ours(llms: dict[str, LLM], held_out_ids: list[list[int]]) -> dict[str, float]:
    """Bits a byte of the held-out passages, by scheme, from the engine's prompt_logprobs."""
    found = {}
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for scheme, llm in llms.items():
        nats = 0.0
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in held_out_ids], asked)
        for ids, output in zip(held_out_ids, outputs, strict=True):
            known = output.prompt_logprobs
            assert known is not None
            assert known[0] is None
            for token, at in zip(ids[1:], known[1:], strict=True):
                assert at is not None
                nats -= at[token].logprob
        found[scheme] = bits_per_byte(nats)
    return found


@pytest.fixture(scope="module")
def theirs(held_out_ids: list[list[int]]) -> float:
    """The same by transformers in fp32, which reads the checkpoint as it is published."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it has no place for the prediction layer, and says so
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    nats = 0.0
    with torch.inference_mode():
        for ids in held_out_ids:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            nats += float(
                torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            )
    return bits_per_byte(nats)


def test_there_is_enough_to_compare() -> None:
    assert len(GOLDEN) >= 10
    gaps = [gap for case in GOLDEN for gap in case["gaps"]]
    assert len(gaps) >= 200
    assert sum(gap >= max(CLEAR.values()) for gap in gaps) >= 0.5 * len(gaps)
    assert sum(map(len, HELD_OUT)) >= 20_000


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_prompts_are_read_as_transformers_reads_them(
    case: dict[str, Any], llms: dict[str, LLM]
) -> None:
    """The chat template and the tokenizer, down to the token ids."""
    llm = llms["auto"]
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    if "text" in case:
        found = tokenizer.encode(case["text"], add_begin=True)
    else:
        prompt = llm.chat_prompt(
            case["messages"],
            tools=case.get("tools"),
            chat_template_kwargs={"thinking": case.get("thinking", False)},
        )
        assert isinstance(prompt, dict)
        found = list(prompt["prompt_token_ids"])
    assert found == case["prompt_token_ids"]


@schemes
@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_greedy_generation(case: dict[str, Any], scheme: str, llms: dict[str, LLM]) -> None:
    """Every token whose lead is clear. Where one is not, and differs, we go on from theirs."""
    expected, gaps = case["token_ids"], case["gaps"]
    done = 0
    while done < len(expected):
        prompt = {"prompt_token_ids": case["prompt_token_ids"] + expected[:done]}
        params = SamplingParams(temperature=0, max_tokens=len(expected) - done, ignore_eos=True)
        found = list(llms[scheme].generate(prompt, params)[0].outputs[0].token_ids)
        assert len(found) == len(expected) - done
        same = next((i for i, token in enumerate(found) if token != expected[done + i]), len(found))
        done += same
        if done < len(expected):
            assert gaps[done] < CLEAR[scheme], f"token {done}: {found[same]}, {expected[done]}"
        done += 1


def test_bits_per_byte_in_bf16_are_transformers(ours: dict[str, float], theirs: float) -> None:
    assert ours["auto"] == pytest.approx(theirs, rel=SLACK["auto"])


@pytest.mark.parametrize("scheme", ["w8a8_int8", "fp8"])
def test_quantizing_costs_next_to_nothing(scheme: str, ours: dict[str, float]) -> None:
    assert ours[scheme] == pytest.approx(ours["auto"], rel=SLACK[scheme])
    assert ours[scheme] != ours["auto"]


@pytest.mark.parametrize(
    ("form", "scheme"),
    [("w8a8_int8", "w8a8_int8"), ("compressed-tensors", "w8a8_int8"), ("fp8", "fp8")],
)
def test_written_forms_are_what_is_quantized_while_loading(
    form: str, scheme: str, llms: dict[str, LLM], held_out_ids: list[list[int]], tmp_path: Path
) -> None:
    """The published layouts, as `latentcore quantize` writes them: the same bits, half the size."""
    quantize_checkpoint(DEMO_MODEL, tmp_path / "out", form)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.7 * (DEMO_MODEL / "model.safetensors").stat().st_size
    prompt = {"prompt_token_ids": held_out_ids[0][:300]}
    asked = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, logprobs=0)
    with LLM(
        tmp_path / "out", threads=1, max_model_len=2048, kv_cache_memory_bytes=64 << 20
    ) as llm:
        (found,) = llm.generate(prompt, asked)
    (expected,) = llms[scheme].generate(prompt, asked)
    assert found.prompt_logprobs == expected.prompt_logprobs
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert found.outputs[0].logprobs == expected.outputs[0].logprobs
