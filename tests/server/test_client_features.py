"""Sampling parameters and streams through the official client: each has to change the answer."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.process import ServerProcess, serving
from tests.server.test_server import TOOLS, USER

TEXT: dict[str, Any] = {"model": "tiny", "prompt": [10, 20, 30, 40, 50]}
END = 257
LONG: dict[str, Any] = {"ignore_eos": True}


def tokens_of(client: openai.OpenAI, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    """The generated tokens' texts."""
    body = {**LONG, **(extra or {})}
    found = client.completions.create(**{**TEXT, "logprobs": 0, **options}, extra_body=body)
    return found.choices[0].logprobs.tokens  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def busy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that computes one request at a time."""
    options = ("--served-model-name", "tiny", "--max-num-seqs", "1")
    with serving(tiny_model, *options, cache=tmp_path_factory.mktemp("cache")) as server:
        yield server


def test_min_p_of_one_leaves_the_likeliest(client: openai.OpenAI) -> None:
    greedy = tokens_of(client, max_tokens=12, temperature=0)
    hot = {"max_tokens": 12, "temperature": 5.0, "seed": 1}
    assert tokens_of(client, {"min_p": 1.0}, **hot) == greedy
    assert tokens_of(client, {"min_p": 0.0}, **hot) != greedy


def test_top_k_of_one_leaves_the_likeliest(client: openai.OpenAI) -> None:
    greedy = tokens_of(client, max_tokens=12, temperature=0)
    hot = {"max_tokens": 12, "temperature": 5.0, "seed": 1}
    assert tokens_of(client, {"top_k": 1}, **hot) == greedy
    assert tokens_of(client, top_p=1e-6, **hot) == greedy


TWO = {"65": 100, "66": 100}
"""A bias that leaves the choice between two tokens, b and c, whose logits are close."""


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_between_two_tokens(client: openai.OpenAI, name: str) -> None:
    options: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "logit_bias": TWO}
    first, second = tokens_of(client, **options, **{name: 2.0})
    assert {first, second} == {"b", "c"}
    assert tokens_of(client, **options, **{name: -2.0}) == [first, first]


def test_frequency_counts_and_presence_does_not(client: openai.OpenAI) -> None:
    ahead = {"65": 100, "66": 90}
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "logit_bias": ahead}
    assert set(tokens_of(client, **options, presence_penalty=2.0)) == {"b"}
    counted = tokens_of(client, **options, frequency_penalty=2.0)
    # Ten logits ahead: b alone until about five of them are there.
    assert counted[:3] == ["b"] * 3
    assert "c" in counted


def test_repetition_penalty_holds_for_the_prompt_too(client: openai.OpenAI) -> None:
    ahead = {"65": 100, "66": 90}
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "logit_bias": ahead}
    assert tokens_of(client, **options) == ["b", "b", "b"]
    halved = {"repetition_penalty": 2.0}
    assert tokens_of(client, halved, **options)[:2] == ["b", "c"]
    assert tokens_of(client, halved, **{**options, "prompt": [10, 65]})[0] == "c"


def test_a_negative_bias_bans_a_token(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0}
    assert tokens_of(client, **options, logit_bias={"65": 100}) == ["b"] * 3
    first = tokens_of(client, **options, logit_bias=TWO)[0]
    ban = {**TWO, {"b": "65", "c": "66"}[first]: -100}
    assert set(tokens_of(client, **options, logit_bias=ban)) == {"b", "c"} - {first}


def test_stop_token_ids_min_tokens_and_ignore_eos(client: openai.OpenAI) -> None:
    always = {"model": "tiny", "prompt": [10, 20], "temperature": 0, "logit_bias": {"65": 100}}

    def ask(max_tokens: int, **extra: Any) -> tuple[int, str, Any]:
        found = client.completions.create(**always, max_tokens=max_tokens, extra_body=extra)
        choice = found.choices[0]
        assert found.usage is not None
        reason = getattr(choice, "stop_reason", None)
        return found.usage.completion_tokens, choice.finish_reason, reason

    assert ask(5, stop_token_ids=[65]) == (1, "stop", 65)
    assert ask(5, stop_token_ids=[66]) == (5, "length", None)
    # Until min_tokens the stop token itself is kept from coming; then it comes at once.
    assert ask(9, stop_token_ids=[65], min_tokens=4) == (5, "stop", 65)
    end = {**always, "logit_bias": {str(END): 100}}
    stopped = client.completions.create(**end, max_tokens=5)
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)  # type: ignore[union-attr]
    on = client.completions.create(**end, max_tokens=5, extra_body={"ignore_eos": True})
    assert (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", 5)  # type: ignore[union-attr]
    late = client.completions.create(**end, max_tokens=9, extra_body={"min_tokens": 3})
    assert (late.choices[0].finish_reason, late.usage.completion_tokens) == ("stop", 4)  # type: ignore[union-attr]


def test_echoed_logprobs_are_those_of_the_tokens_when_generated(client: openai.OpenAI) -> None:
    found = client.completions.create(
        **TEXT, max_tokens=4, temperature=0, logprobs=1, echo=True, extra_body=LONG
    ).choices[0]
    assert found.logprobs is not None
    values = found.logprobs.token_logprobs
    assert values is not None
    assert values[0] is None
    alone = tokens_of(client, max_tokens=4, temperature=0)
    assert found.logprobs.tokens[-4:] == alone  # type: ignore[index]
    # The same prompt, cut after its third token: the fourth's own log-probability, as forced.
    head = client.completions.create(
        model="tiny",
        prompt=TEXT["prompt"][:4],
        max_tokens=0,
        logprobs=1,
        echo=True,
    ).choices[0]
    assert head.finish_reason == "length"
    assert head.logprobs is not None
    assert head.logprobs.token_logprobs[1:] == pytest.approx(values[1:4], abs=1e-4)  # type: ignore[index]
    # Greedy, so that each token is the likeliest one.
    tops = found.logprobs.top_logprobs
    assert tops is not None
    assert [list(top.values()) for top in tops[5:]] == [[value] for value in values[5:]]


@pytest.mark.parametrize("chat", [False, True])
def test_choices_of_a_seed_differ_and_come_again(client: openai.OpenAI, chat: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 16, "n": 4, "temperature": 1.0}

    def texts(seed: int) -> list[str | None]:
        if chat:
            made = client.chat.completions.create(messages=USER, seed=seed, **options)  # type: ignore[call-overload]
            return [choice.message.content for choice in made.choices]
        found = client.completions.create(prompt="Once", seed=seed, **options)
        return [choice.text for choice in found.choices]

    first = texts(3)
    assert len(set(first)) == 4
    assert texts(3) == first
    assert set(texts(4)).isdisjoint(first)


def test_lists_of_prompts_answer_each_prompt(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 5, "n": 2}
    prompts = ["Once", "Twice", "Never"]
    alone = [
        choice.text
        for prompt in prompts
        for choice in client.completions.create(prompt=prompt, **options).choices
    ]
    together = client.completions.create(prompt=prompts, **options)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == alone
    streamed = [""] * 6
    for chunk in client.completions.create(prompt=prompts, **options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    assert len(set(alone)) == 6


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]{2}"}, r"[ab]{3}-[0-9]{2}"),
        ({"choice": ["north", "south"]}, r"north|south"),
        ({"grammar": 'root ::= "x" digit digit\ndigit ::= [3-5]'}, r"x[345][345]"),
        ({"json": {"enum": [12, 34]}}, r"12|34"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_structured_outputs_by_vllms_names(
    client: openai.OpenAI, constraint: dict[str, Any], pattern: str, chat: bool
) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 1.0}
    extra = {"structured_outputs": constraint}
    seen = set()
    for seed in range(6):
        if chat:
            made = client.chat.completions.create(
                messages=USER,
                seed=seed,
                extra_body=extra,
                **options,  # type: ignore[call-overload]
            )
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        else:
            found = client.completions.create(prompt="Go", seed=seed, extra_body=extra, **options)
            text, reason = found.choices[0].text, found.choices[0].finish_reason
        assert re.fullmatch(pattern, text), text
        assert reason == "stop"
        seen.add(text)
    assert len(seen) > 1


def test_reasoning_and_usage_while_streaming(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 24,
        "seed": 9,
        "extra_body": {"chat_template_kwargs": {"thinking": True}, **LONG},
    }
    whole = client.chat.completions.create(**options)
    pieces: list[str] = []
    usages = []
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        if not chunk.choices:
            usages.append(chunk.usage)
            continue
        assert chunk.usage is None
        piece = getattr(chunk.choices[0].delta, "reasoning_content", None)
        pieces += [piece] if piece else []
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    (usage,) = usages
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 24
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_no_usage_unless_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(**TEXT, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_parallel_calls_stream_what_they_are_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": USER,
        "tools": TOOLS,
        "tool_choice": "required",
        "logit_bias": {"257": -100, "258": -100, "115": -100},
        "max_tokens": 300,
        "seed": 4,
    }
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert whole is not None
    calls: list[list[str]] = []
    pieces = 0
    for chunk in client.chat.completions.create(**options, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.id:
                assert part.index == len(calls)
                calls.append([part.function.name, ""])
            calls[part.index][1] += part.function.arguments or ""
            pieces += 1
    assert len(calls) > 1
    assert pieces > 3 * len(calls)
    assert calls == [[one.function.name, one.function.arguments] for one in whole]
    for name, arguments in calls[:-1]:
        assert set(json.loads(arguments)) == ({"a"} if name == "add" else {"place", "days"})


def test_a_lower_priority_goes_first(busy: ServerProcess) -> None:
    """One request runs at a time: of those that wait, the urgent one is answered first."""
    client = busy.client()
    order: list[str] = []

    def ask(name: str, max_tokens: int, priority: int) -> None:
        body = {"ignore_eos": True, "priority": priority}
        client.completions.create(model="tiny", prompt=name, max_tokens=max_tokens, extra_body=body)
        order.append(name)

    def start(*arguments: Any, waiting: int) -> threading.Thread:
        thread = threading.Thread(target=ask, args=arguments)
        thread.start()
        for _ in range(1000):
            state = busy.metric("num_requests_running"), busy.metric("num_requests_waiting")
            if state == (1, waiting):
                return thread
            time.sleep(0.005)
        raise AssertionError(state)

    threads = [
        start("long", 1900, 0, waiting=0),
        start("idle", 200, 5, waiting=1),
        start("urgent", 200, -5, waiting=2),
    ]
    for thread in threads:
        thread.join()
    assert order.index("urgent") < order.index("idle")
