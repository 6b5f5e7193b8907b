"""The engine's step on a fake model that notices every mistake in cache, position and path."""

import random
import re
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from latentcore.engine.engine import MAX_PROMPT_LOGPROB_TOKENS, Engine, StepFailedError
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.request import Prompt, RequestPreparer
from latentcore.engine.sampling_params import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from latentcore.engine.structured import GrammarDeadEndError, GrammarMatcher
from latentcore.errors import RequestError
from latentcore.models.chunk import SequenceChunk
from latentcore.models.logits import StepLogits
from tests.engine.fakes import END_ID, FakeRunner, ScriptedRunner, byte_token, make_engine

Work = Sequence[tuple[Prompt, SamplingParams]]


def tokens(*ids: int) -> Prompt:
    return {"prompt_token_ids": list(ids)}


def run(engine: Engine, preparer: RequestPreparer, work: Work) -> list[RequestOutput]:
    """Runs all at once; checks the bookkeeping after every step, and that all is freed at last."""
    for number, (prompt, params) in enumerate(work):
        engine.add_request(str(number), preparer.prepare(prompt, params))
    finished: dict[str, RequestOutput] = {}
    for _ in range(100_000):
        if not engine.has_unfinished:
            break
        step = engine.step()
        assert not step.failures, step.failures
        engine.check_integrity()
        for output in step.outputs:
            if output.finished:
                finished[output.request_id] = output
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    return [finished[str(number)] for number in range(len(work))]


def alone(prompt: Prompt, params: SamplingParams) -> RequestOutput:
    engine, preparer = make_engine(enable_prefix_caching=False)
    return run(engine, preparer, [(prompt, params)])[0]


def answers(output: RequestOutput) -> list[list[int]]:
    return [choice.token_ids for choice in output.outputs]


def scripted(answer: str | bytes, params: SamplingParams, prompt: str = "Q") -> RequestOutput:
    data = answer.encode() if isinstance(answer, str) else answer
    runner = ScriptedRunner(data)
    runner.prompt_length = len(prompt.encode())
    engine, preparer = make_engine(runner)
    return run(engine, preparer, [(prompt, params)])[0]


def test_a_request_generates_until_its_limit() -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    output = alone(tokens(1, 2, 3), params)
    assert output.finished
    assert output.prompt_token_ids == [1, 2, 3]
    assert len(output.outputs[0].token_ids) == 9
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.time_to_first_token is not None


def random_work(seed: int, count: int) -> list[tuple[Prompt, SamplingParams]]:
    generator = random.Random(seed)
    work: list[tuple[Prompt, SamplingParams]] = []
    shared = [generator.randrange(256) for _ in range(150)]
    for number in range(count):
        prompt = shared[: generator.choice([0, 0, 64, 100, 150])]
        prompt = prompt + [generator.randrange(256) for _ in range(generator.randrange(1, 200))]
        params = SamplingParams(
            temperature=generator.choice([0.0, 1.0]),
            seed=number,
            max_tokens=generator.randrange(1, 80),
            ignore_eos=generator.random() < 0.5,
            n=generator.choice([1, 1, 1, 3]),
            logprobs=generator.choice([None, 2]),
        )
        work.append((tokens(*prompt), params))
    return work


@pytest.mark.parametrize("budget", [8, 37, 256])
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gives_the_same_whatever_else_runs(seed: int, budget: int) -> None:
    """Batch, chunk size and pre-emption change nothing (prefix reuse may change paths: off)."""
    work = random_work(seed, 12)
    runner = FakeRunner(num_blocks=8, max_num_batched_tokens=budget)
    engine, preparer = make_engine(runner, enable_prefix_caching=False)
    outputs = run(engine, preparer, work)
    for output, (prompt, params) in zip(outputs, work, strict=True):
        assert answers(output) == answers(alone(prompt, params))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [8, 256])
def test_preemption_changes_nothing(budget: int, caching: bool) -> None:
    work = [
        (
            tokens(*range(number, number + 50)),
            SamplingParams(seed=1, max_tokens=99, ignore_eos=True),
        )
        for number in range(10)
    ]
    runner = FakeRunner(num_blocks=9, max_num_batched_tokens=budget)
    engine, preparer = make_engine(runner, enable_prefix_caching=caching)
    outputs = run(engine, preparer, work)
    assert engine.scheduler.num_preemptions > 3
    for output, (prompt, params) in zip(outputs, work, strict=True):
        assert answers(output) == answers(alone(prompt, params))


@pytest.mark.parametrize("seed", range(3))
def test_prefix_reuse_with_one_path_changes_nothing(seed: int) -> None:
    class OnePath(FakeRunner):
        def choose_path(self, uncached_tokens: int, context: int) -> str:
            return "decode"

    work = random_work(seed, 14)
    reference, preparer = make_engine(OnePath(), enable_prefix_caching=False)
    expected = [run(reference, preparer, [item])[0] for item in work]
    engine, preparer = make_engine(OnePath(num_blocks=8))
    outputs = run(engine, preparer, work)
    assert engine.scheduler.prefix_hit_tokens > 0
    for output, single in zip(outputs, expected, strict=True):
        assert answers(output) == answers(single)


def test_choices_differ_and_repeat() -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=12, ignore_eos=True)
    prompt = tokens(*range(130))
    engine, preparer = make_engine()
    first, second = (run(engine, preparer, [(prompt, params)])[0] for _ in range(2))
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer) for answer in answers(first)}) == 4
    assert answers(first) == answers(alone(prompt, params))
    assert second.num_cached_tokens == 129


def test_choices_share_the_prompts_blocks() -> None:
    runner = FakeRunner(max_num_batched_tokens=256)
    engine, preparer = make_engine(runner)
    params = SamplingParams(n=4, seed=1, max_tokens=4, ignore_eos=True)
    run(engine, preparer, [(tokens(*range(200)), params)])
    computed = [
        len(chunk.token_ids) for step in runner.steps for chunk in step if chunk.start < 200
    ]
    assert sum(computed) == 200 + 3 * 8


def test_requests_without_a_seed_differ_from_each_other() -> None:
    engine, preparer = make_engine()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    one, two = run(engine, preparer, [(tokens(1, 2), params), (tokens(1, 2), params)])
    assert answers(one) != answers(two)


def test_the_end_token_ends_the_answer_and_is_not_shown() -> None:
    output = scripted("Hello", SamplingParams(temperature=0, max_tokens=50))
    (choice,) = output.outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Hello", "stop", None)
    assert choice.token_ids[-1] == END_ID
    shown = scripted(
        "Hello", SamplingParams(temperature=0, max_tokens=50, skip_special_tokens=False)
    )
    assert shown.outputs[0].text == "Hello"


def test_ignore_eos_goes_on() -> None:
    output = scripted("Hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].token_ids[-3:] == [END_ID] * 3


def test_min_tokens_bans_the_end() -> None:
    output = scripted("Hi", SamplingParams(temperature=0, max_tokens=9, min_tokens=5))
    assert END_ID not in output.outputs[0].token_ids[:5]
    assert output.outputs[0].token_ids[5] == END_ID


def test_stop_tokens_name_themselves() -> None:
    dot = scripted(".", SamplingParams(temperature=0, max_tokens=1)).outputs[0].token_ids[0]
    params = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=[dot])
    (choice,) = scripted("One. Two.", params).outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("One", "stop", dot)
    included = params.replace(include_stop_str_in_output=True)
    assert scripted("One. Two.", included).outputs[0].text == "One."


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["\n\n"], "One\nTwo", "\n\n"),
        (["Three", "Two"], "One\n", "Two"),
        (["nope"], "One\nTwo\n\nThree", None),
        (["\n\nX"], "One\nTwo\n\nThree", None),
        (["Two\n\nT", "o\n\nTh"], "One\n", "Two\n\nT"),
    ],
)
def test_stop_strings_end_the_answer(stop: list[str], text: str, reason: str | None) -> None:
    params = SamplingParams(temperature=0, max_tokens=50, stop=stop)
    (choice,) = scripted("One\nTwo\n\nThree", params).outputs
    assert (choice.text, choice.stop_reason) == (text, reason)
    assert choice.finish_reason == "stop"


def test_a_stop_string_may_be_included() -> None:
    params = SamplingParams(temperature=0, max_tokens=50, stop="T", include_stop_str_in_output=True)
    assert scripted("One Two", params).outputs[0].text == "One T"


def test_partial_stops_never_leak_while_streaming() -> None:
    params = SamplingParams(
        temperature=0, max_tokens=50, stop=["</end>"], output_kind=RequestOutputKind.DELTA
    )
    runner = ScriptedRunner(b"a </en b </end> c")
    runner.prompt_length = 1
    engine, preparer = make_engine(runner)
    engine.add_request("x", preparer.prepare("Q", params))
    shown = ""
    while engine.has_unfinished:
        for output in engine.step().outputs:
            for choice in output.outputs:
                shown += choice.text
                assert "a </en b ".startswith(shown)
    assert shown == "a </en b "


def test_text_held_back_comes_out_at_the_end() -> None:
    params = SamplingParams(temperature=0, max_tokens=50, stop=["</end>"])
    assert scripted("abc</en", params).outputs[0].text == "abc</en"
    cut = SamplingParams(temperature=0, max_tokens=5, stop=["</end>"])
    assert scripted("abc</end>", cut).outputs[0].text == "abc</"
    assert scripted("ab👍".encode()[:4], params).outputs[0].text == "ab�"


def test_deltas_add_up_to_the_whole() -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=20, ignore_eos=True, logprobs=1)
    whole = alone("Hi", params)
    engine, preparer = make_engine()
    delta = params.replace(output_kind=RequestOutputKind.DELTA)
    engine.add_request("x", preparer.prepare("Hi", delta))
    texts, ids, logprobs, ends = ["", ""], [[], []], [[], []], [0, 0]  # type: ignore[var-annotated]
    while engine.has_unfinished:
        for output in engine.step().outputs:
            for choice in output.outputs:
                texts[choice.index] += choice.text
                ids[choice.index] += choice.token_ids
                logprobs[choice.index] += choice.logprobs or []
                ends[choice.index] += choice.finished()
    assert texts == [choice.text for choice in whole.outputs]
    assert ids == answers(whole)
    assert logprobs == [choice.logprobs for choice in whole.outputs]
    assert ends == [1, 1]


def test_logprobs_hold_the_chosen_token_and_the_alternatives() -> None:
    params = SamplingParams(seed=1, max_tokens=6, ignore_eos=True, logprobs=3)
    (choice,) = alone(tokens(5), params).outputs
    assert choice.logprobs is not None
    assert choice.cumulative_logprob == pytest.approx(
        sum(at[token].logprob for at, token in zip(choice.logprobs, choice.token_ids, strict=True))
    )
    for at, token in zip(choice.logprobs, choice.token_ids, strict=True):
        assert len(at) == 3 + (at[token].rank not in (1, 2, 3))  # type: ignore[operator]
        assert {1, 2, 3} <= {entry.rank for entry in at.values()}


@pytest.mark.parametrize("budget", [10, 256])
def test_prompt_logprobs_read_the_prompt_afresh(budget: int) -> None:
    runner = FakeRunner(max_num_batched_tokens=budget)
    engine, preparer = make_engine(runner)
    prompt = tokens(*[number % 256 for number in range(300)])
    plain = SamplingParams(max_tokens=1)
    run(engine, preparer, [(prompt, plain)])
    asked = plain.replace(prompt_logprobs=2, temperature=0)
    output = run(engine, preparer, [(prompt, asked)])[0]
    assert output.num_cached_tokens == 0
    found = output.prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert len(found) == 300
    for token, at in zip(output.prompt_token_ids[1:], found[1:], strict=True):
        assert at is not None
        assert token in at
    assert found == alone(prompt, asked).prompt_logprobs


def test_prompt_logprobs_of_many_at_once_take_bounded_memory() -> None:
    """Whatever the budget, the rows of logits of a step are limited."""
    runner = FakeRunner(max_num_batched_tokens=2048)
    engine, preparer = make_engine(runner)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [tokens(*[(first + i) % 256 for i in range(400)]) for first in range(4)]
    outputs = run(engine, preparer, [(prompt, asked) for prompt in prompts])
    rows = [sum(len(c.token_ids) for c in step if c.logits == "all") for step in runner.steps]
    assert max(rows) == MAX_PROMPT_LOGPROB_TOKENS
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt_logprobs == alone(prompt, asked).prompt_logprobs


def test_prompt_logprobs_survive_preemption() -> None:
    short = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    asking = SamplingParams(max_tokens=3, prompt_logprobs=1, temperature=0, ignore_eos=True)
    work = [
        (tokens(*range(50)), short),
        (tokens(*range(7, 57)), short),
        (tokens(*range(3, 250)), asking),
    ]
    runner = FakeRunner(num_blocks=7, max_num_batched_tokens=9)
    engine, preparer = make_engine(runner, max_num_seqs=3)
    outputs = run(engine, preparer, work)
    assert outputs[2].metrics.num_preemptions > 0
    assert outputs[2].prompt_logprobs == alone(*work[2]).prompt_logprobs


def test_no_tokens_may_be_asked_for() -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)
    output = alone(tokens(1, 2, 3), params)
    assert [choice.token_ids for choice in output.outputs] == [[], []]
    assert [choice.finish_reason for choice in output.outputs] == ["length", "length"]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on() -> None:
    runner = FakeRunner(max_num_batched_tokens=64)
    engine, preparer = make_engine(runner, max_num_seqs=2)
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    prompts = [tokens(*range(start, start + 70)) for start in (0, 50, 100)]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), preparer.prepare(prompt, params))
    engine.step()
    engine.step()
    runner.fail_next = RuntimeError("lost a device")
    step = engine.step()
    assert set(step.failures) == {"0", "1"}
    for failure in step.failures.values():
        assert isinstance(failure, StepFailedError)
        assert "lost a device" in str(failure)
    engine.check_integrity()
    finished = []
    while engine.has_unfinished:
        finished += [output for output in engine.step().outputs if output.finished]
    assert [output.request_id for output in finished] == ["2"]
    again = run(engine, preparer, [(prompts[1], params)])[0]
    fresh = alone(prompts[1], params)
    assert answers(again) == answers(fresh)


def test_the_last_steps_figures_are_its_own() -> None:
    """Those of a step that failed, or that had nothing to do, are not the ones before."""
    runner = FakeRunner()
    engine, preparer = make_engine(runner)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.add_request("doomed", preparer.prepare("ab", params))
    engine.step()
    assert (engine.last_step.prompt_tokens, engine.last_step.generated_tokens) == (2, 1)
    runner.fail_next = RuntimeError("bad luck")
    engine.step()
    assert (engine.last_step.prompt_tokens, engine.last_step.generated_tokens) == (0, 0)
    engine.add_request("a", preparer.prepare("xyz", params))
    engine.step()
    assert engine.last_step.prompt_tokens == 3
    engine.abort("a")
    assert engine.step().aborted == ["a"]
    assert engine.last_step.prompt_tokens == 0
    assert engine.step().aborted == []


def test_aborting_frees_blocks_at_once() -> None:
    engine, preparer = make_engine()
    params = SamplingParams(max_tokens=50, n=3, ignore_eos=True)
    engine.add_request("x", preparer.prepare(tokens(*range(100)), params))
    engine.step()
    engine.step()
    engine.abort("x")
    engine.check_integrity()
    assert not engine.has_unfinished
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    engine.abort("x")


def test_a_request_id_in_use_is_refused() -> None:
    engine, preparer = make_engine()
    prepared = preparer.prepare(tokens(1), SamplingParams())
    engine.add_request("a", prepared)
    with pytest.raises(RequestError, match="in use"):
        engine.add_request("a", prepared)


@pytest.mark.parametrize(
    ("structured", "check"),
    [
        (
            StructuredOutputsParams(choice=["yes", "no", 'a"b\\ü']),
            lambda t: t in ("yes", "no", 'a"b\\ü'),
        ),
        (
            StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{2}"),
            lambda t: len(t) == 6 and t[3] == "-",
        ),
        (
            StructuredOutputsParams(grammar='root ::= "(" [xy]{2,4} ")"'),
            lambda t: t[0] + t[-1] == "()",
        ),
    ],
)
def test_answers_obey_their_grammar(structured: StructuredOutputsParams, check) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("xgrammar")
    for seed in range(5):
        params = SamplingParams(structured_outputs=structured, max_tokens=40, seed=seed)
        (choice,) = alone("Q", params).outputs
        assert choice.finish_reason == "stop"
        assert check(choice.text), choice.text


def test_a_grammar_without_a_way_on_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xgrammar")
    engine, preparer = make_engine()
    structured = StructuredOutputsParams(regex="[a-z]{30}")
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    engine.add_request("fine", preparer.prepare("Q", params))
    engine.add_request("lost", preparer.prepare("Q", params.replace(structured_outputs=structured)))
    engine.step()
    engine.step()

    def refuse(self: GrammarMatcher, token_id: int) -> None:
        raise GrammarDeadEndError("no way on")

    monkeypatch.setattr(GrammarMatcher, "accept", refuse)
    step = engine.step()
    assert isinstance(step.failures["lost"], GrammarDeadEndError)
    assert [output.request_id for output in step.outputs] == ["fine"]
    engine.check_integrity()
    while engine.has_unfinished:
        last = engine.step()
    assert last.outputs[0].outputs[0].token_ids == alone("Q", params).outputs[0].token_ids


def test_a_grammar_that_breaks_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar")
    engine, preparer = make_engine()
    structured = StructuredOutputsParams(regex="[a-z]{30}")
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    broken = params.replace(structured_outputs=structured, n=2)
    engine.add_request("lost", preparer.prepare("Q", broken))
    engine.add_request("fine", preparer.prepare("Q", params))
    engine.step()
    engine.step()
    monkeypatch.setattr(GrammarMatcher, "fill", _break)
    step = engine.step()
    assert isinstance(step.failures["lost"], StepFailedError)
    assert "followed a grammar: bad luck" in str(step.failures["lost"])
    assert [output.request_id for output in step.outputs] == ["fine"]
    engine.check_integrity()
    while engine.has_unfinished:
        last = engine.step()
    assert last.outputs[0].outputs[0].token_ids == alone("Q", params).outputs[0].token_ids


def _break(*_: object) -> None:
    raise RuntimeError("bad luck")


def test_masks_are_made_while_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model waits here for the mask of its own step: one made afterwards would never come."""
    pytest.importorskip("xgrammar")
    made = threading.Semaphore(0)
    fill, forward = GrammarMatcher.fill, FakeRunner.forward

    def noting(matcher: GrammarMatcher, mask: torch.Tensor) -> None:
        fill(matcher, mask)
        made.release()

    def waiting(runner: FakeRunner, chunks: Sequence[SequenceChunk]) -> StepLogits:
        assert made.acquire(timeout=20)
        return forward(runner, chunks)

    structured = StructuredOutputsParams(regex="[a-z]{9}")
    engine, preparer = make_engine()
    prepared = preparer.prepare("Q", SamplingParams(structured_outputs=structured, seed=1))
    monkeypatch.setattr(GrammarMatcher, "fill", noting)
    monkeypatch.setattr(FakeRunner, "forward", waiting)
    engine.add_request("x", prepared)
    steps = 0
    while engine.has_unfinished:
        assert not engine.step().failures
        steps += 1
    assert steps == 10


class BlankRunner(FakeRunner):
    """A model that wants nothing but white space."""

    def _logits(self, state: bytes, position: int) -> np.ndarray:
        logits = super()._logits(state, position)
        for byte in b" \n\t":
            logits[byte_token(byte)] = 90.0
        logits[byte_token(ord('"'))] = 80.0
        return logits


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutputsParams(json_object=True),
        StructuredOutputsParams(
            json={
                "type": "object",
                "properties": {
                    "a": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
                    "b": {"type": "object", "properties": {"c": {"type": "null"}}},
                },
                "required": ["a", "b"],
            }
        ),
    ],
    ids=["object", "schema"],
)
def test_json_has_no_unbounded_white_space(structured: StructuredOutputsParams) -> None:
    """Between tokens, that is; strings hold what they like."""
    pytest.importorskip("xgrammar")
    engine, preparer = make_engine(BlankRunner())
    params = SamplingParams(structured_outputs=structured, temperature=0, max_tokens=120)
    (output,) = run(engine, preparer, [("Q", params)])
    outside = re.sub(r'"[^"]*("|$)', '""', output.outputs[0].text)
    assert outside.startswith("{")
    assert not re.search(r"\s\s|[\n\t]", outside)


def test_json_answers_fit_their_schema() -> None:
    pytest.importorskip("xgrammar")
    import json

    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(json=schema), max_tokens=60, seed=1
    )
    (choice,) = alone("Q", params).outputs
    found = json.loads(choice.text)
    assert found["a"] in (1, 2)
    assert isinstance(found["b"], bool)
    assert "  " not in choice.text


@pytest.mark.parametrize(
    "structured",
    [
        {"json": {"type": "nonsense"}},
        {"regex": "(["},
        {"grammar": "root ::= missing"},
        {"grammar": 'root ::= root "a"'},
    ],
)
def test_grammars_that_cannot_be_compiled_are_request_errors(structured: dict[str, object]) -> None:
    pytest.importorskip("xgrammar")
    _, preparer = make_engine()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**structured))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^structured_outputs[^/]*$"):
        preparer.prepare("Q", params)


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ({"prompt_token_ids": []}, {}, "at least one token, found none"),
        ("", {}, "found an empty text"),
        ({"prompt_token_ids": [300]}, {}, "from 0 to 299, found 300"),
        ({"prompt_token_ids": [-1]}, {}, "from 0 to 299, found -1"),
        ({"prompt_token_ids": [1.5]}, {}, "whole numbers"),
        ({"prompt_token_ids": "abc"}, {}, "list of token ids"),
        ({"text": "abc"}, {}, r"keys \['text'\]"),
        (3, {}, "found int"),
        ("a\ud800", {}, "not valid Unicode"),
        ("a" * 1025, {}, "has 1025 tokens, max_model_len is 1024"),
        ("a" * 1000, {"max_tokens": 25}, "together 1025.*at most 24"),
        ("a", {"stop_token_ids": [300]}, "stop_token_ids: .* below 300"),
        ("a", {"logit_bias": {400: 1.0}}, "logit_bias: .* below 300"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(
    prompt: Prompt, params: dict[str, object], match: str
) -> None:
    _, preparer = make_engine()
    with pytest.raises(RequestError, match=match):
        preparer.prepare(prompt, SamplingParams(**params))  # type: ignore[arg-type]


def test_what_the_cache_cannot_hold_is_refused_with_the_numbers() -> None:
    engine, preparer = make_engine(FakeRunner(num_blocks=2))
    with pytest.raises(RequestError, match="has 129 tokens, the cache holds 128"):
        preparer.prepare(tokens(*[1] * 129), SamplingParams())
    with pytest.raises(RequestError, match=r"the cache holds 128.*at most 9"):
        preparer.prepare(tokens(*[1] * 120), SamplingParams(max_tokens=10))
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    output = run(engine, preparer, [(tokens(*[1] * 120), params)])[0]
    assert len(output.outputs[0].token_ids) == 9


def test_without_a_tokenizer_token_ids_work() -> None:
    engine, preparer = make_engine(tokenizer=None)
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)
    output = run(engine, preparer, [(tokens(1, 2), params)])[0]
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(RequestError, match="no tokenizer files"):
        preparer.prepare("Hi", params)
    with pytest.raises(RequestError, match="no tokenizer"):
        preparer.prepare(tokens(1), SamplingParams(stop="x"))


def test_closing_gives_the_model_back() -> None:
    runner = FakeRunner()
    engine, preparer = make_engine(runner)
    engine.add_request("x", preparer.prepare(tokens(1), SamplingParams()))
    engine.close()
    assert runner.closed
    assert not engine.has_unfinished
