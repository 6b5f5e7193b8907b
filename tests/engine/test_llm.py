"""The offline interface, on a fake model."""

import gc
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import latentcore
from latentcore.config import GenerationDefaults
from latentcore.engine.engine import StepFailedError
from latentcore.engine.llm import LLM
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.sampling_params import RequestOutputKind, SamplingParams
from latentcore.errors import LatentcoreError, RequestError
from tests.engine.fakes import FakeRunner, ScriptedRunner, make_loaded

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def test_the_public_names_are_there() -> None:
    for name in latentcore.__all__:
        assert getattr(latentcore, name) is not None
    assert latentcore.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        latentcore.nonsense  # noqa: B018


def test_prompts_in_all_forms() -> None:
    with LLM.from_loaded(make_loaded()) as llm:
        ids = llm.get_tokenizer().encode("Hi", add_begin=True)  # type: ignore[union-attr]
        forms: list[Any] = ["Hi", {"prompt": "Hi"}, {"prompt_token_ids": ids}]
        several = llm.generate(forms, GREEDY)
        assert [output.prompt_token_ids for output in several] == [ids] * 3
        assert [output.prompt for output in several] == ["Hi", "Hi", None]
        assert len({tuple(output.outputs[0].token_ids) for output in several}) == 1
        for form in forms:
            (single,) = llm.generate(form, GREEDY)
            assert single.outputs[0].token_ids == several[0].outputs[0].token_ids
        assert llm.generate([], GREEDY) == []


def test_parameters_one_for_all_or_one_for_each() -> None:
    with LLM.from_loaded(make_loaded()) as llm:
        outputs = llm.generate(["a", "b"], [GREEDY, GREEDY.replace(max_tokens=2)])
        assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 2]
        with pytest.raises(RequestError, match="one for each of 2"):
            llm.generate(["a", "b"], [GREEDY])
        assert len(llm.generate(["a", "b"], GREEDY, priority=1)) == 2
        with pytest.raises(RequestError, match="priority: expected one for each"):
            llm.generate(["a", "b"], GREEDY, priority=[1])


def test_the_checkpoints_defaults_are_used_where_nothing_is_given() -> None:
    defaults = GenerationDefaults(temperature=0.0, top_p=0.5)
    with LLM.from_loaded(make_loaded(defaults=defaults)) as llm:
        found = llm.get_default_sampling_params()
        assert (found.temperature, found.top_p, found.top_k) == (0.0, 0.5, 0)
        one, two = llm.generate(["a", "a"])
        assert one.outputs[0].token_ids == two.outputs[0].token_ids


def test_a_bad_prompt_stops_the_batch_before_anything_runs() -> None:
    runner = FakeRunner()
    with LLM.from_loaded(make_loaded(runner)) as llm:
        with pytest.raises(RequestError, match="prompt_token_ids"):
            llm.generate(["fine", {"prompt_token_ids": [-1]}], GREEDY)
        assert runner.steps == []
        assert len(llm.generate("fine", GREEDY)) == 1


def test_outputs_can_be_watched() -> None:
    seen: list[RequestOutput] = []
    with LLM.from_loaded(make_loaded()) as llm:
        delta = GREEDY.replace(output_kind=RequestOutputKind.DELTA)
        llm.generate("a", delta, on_output=seen.append)
    assert [len(output.outputs[0].token_ids) for output in seen] == [1] * 5


def test_a_bar_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with LLM.from_loaded(make_loaded()) as llm:
        llm.generate(["a", "b", "c"], GREEDY)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        llm.generate(["a", "b", "c"], GREEDY)
        assert "answered prompts" in capsys.readouterr().err
        llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
        llm.generate(["a", "b", "c"], GREEDY, on_output=lambda _: None)
        llm.chat(messages, GREEDY, use_tqdm=False)
        assert capsys.readouterr().err == ""


def test_chat_renders_the_template() -> None:
    runner = ScriptedRunner(b"fine")
    prompt = "<user>Hi<answer><think>"
    runner.prompt_length = len(prompt)
    with LLM.from_loaded(make_loaded(runner)) as llm:
        messages = [{"role": "user", "content": "Hi"}]
        params = GREEDY.replace(ignore_eos=False, max_tokens=9)
        (output,) = llm.chat(messages, params, chat_template_kwargs={"thinking": True})
        assert output.outputs[0].text == "fine"
        assert llm.get_tokenizer().decode(output.prompt_token_ids) == prompt  # type: ignore[union-attr]
        assert len(llm.chat([messages, messages], GREEDY)) == 2


def test_chat_needs_a_template() -> None:
    with (
        LLM.from_loaded(make_loaded(template=None)) as llm,
        pytest.raises(RequestError, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_a_failed_step_raises_and_the_llm_goes_on() -> None:
    runner = FakeRunner()
    with LLM.from_loaded(make_loaded(runner)) as llm:
        runner.fail_next = RuntimeError("out of luck")
        with pytest.raises(StepFailedError, match="out of luck"):
            llm.generate(["a", "b"], GREEDY)
        assert len(llm.generate(["a", "b"], GREEDY)) == 2


def test_an_interrupt_leaves_nothing_behind() -> None:
    def interrupt(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    runner = FakeRunner()
    with LLM.from_loaded(make_loaded(runner)) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, on_output=interrupt)
        assert not llm._engine.has_unfinished
        assert llm._engine.scheduler.blocks.usage == 0


def test_an_interrupt_at_any_moment_leaves_the_engine_in_order() -> None:
    """It may come at any call within `generate`: here at each in turn."""

    def generate(interrupted_at: int) -> int:
        """Generates with an interrupt at that call; returns how many calls there were."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == interrupted_at:
                signal.raise_signal(signal.SIGINT)

        sys.setprofile(count)
        try:
            llm.generate([prompt, "b"], params)
        finally:
            sys.setprofile(None)
        return calls

    prompt, params = {"prompt_token_ids": [2, 3] * 40}, GREEDY.replace(n=2)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with LLM.from_loaded(make_loaded(FakeRunner())) as llm:
            generate(0)
            calls = generate(0)
            for moment in range(1, calls - 50, 7):
                with pytest.raises(KeyboardInterrupt):
                    generate(moment)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                llm._engine.check_integrity()
                assert not llm._engine.has_unfinished
                assert llm._engine.scheduler.blocks.usage == 0
            assert len(llm.generate([prompt, "b"], params)) == 2
    finally:
        signal.signal(signal.SIGINT, handler)


def test_interrupts_elsewhere_are_left_alone() -> None:
    """In other threads, where a handler cannot be set, and where interrupts are ignored."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with LLM.from_loaded(make_loaded(FakeRunner())) as llm, ThreadPoolExecutor(1) as pool:
            seen: list[Any] = []
            llm.generate(
                "a", GREEDY, on_output=lambda _: seen.append(signal.getsignal(signal.SIGINT))
            )
            assert set(seen) == {signal.SIG_IGN}
            signal.signal(signal.SIGINT, signal.default_int_handler)
            assert len(pool.submit(llm.generate, "a", GREEDY).result()) == 1
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


def test_closing_is_final_and_safe_to_repeat() -> None:
    runner = FakeRunner()
    llm = LLM.from_loaded(make_loaded(runner))
    llm.close()
    llm.close()
    assert runner.closed
    with pytest.raises(LatentcoreError, match="closed"):
        llm.generate("a", GREEDY)


def test_a_forgotten_llm_gives_its_model_back() -> None:
    runner = FakeRunner()
    llm = LLM.from_loaded(make_loaded(runner))
    llm.generate("a", GREEDY)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert runner.closed
