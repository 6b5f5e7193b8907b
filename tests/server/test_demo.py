"""The server on the demo model: tool calls and reasoning that the model writes by itself."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from latentcore.models.hub import DEMO_MODEL
from tests.server.process import ServerProcess, serving

pytestmark = pytest.mark.skipif(
    not (DEMO_MODEL / "model.safetensors").is_file(), reason="the demo model is not built"
)

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
THINK = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(None, cache=tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture
def chat(demo: ServerProcess) -> Any:
    return demo.client().chat.completions.create


def test_the_demo_is_the_default(demo: ServerProcess) -> None:
    assert [model.id for model in demo.client().models.list()] == ["latentcore-demo"]


@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_a_tool_that_fits(chat: Any, stream: bool) -> None:
    found = chat(
        model="latentcore-demo",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        temperature=0,
        max_tokens=100,
        stream=stream,
    )
    if stream:
        name, arguments, reason = "", "", None
        for chunk in found:
            choice = chunk.choices[0]
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or []:
                assert part.index == 0
                name += part.function.name or ""
                arguments += part.function.arguments or ""
            assert "｜" not in (choice.delta.content or "")  # noqa: RUF001
    else:
        reason = found.choices[0].finish_reason
        (call,) = found.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert reason == "tool_calls"
    assert name == "get_weather"
    assert json.loads(arguments) == {"city": "Paris"}


def test_it_uses_a_tools_result(chat: Any) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"model": "latentcore-demo", "tools": [WEATHER], "temperature": 0, "max_tokens": 100}
    message = chat(messages=messages, **options).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    result = {"city": "Paris", "temperature": 18, "conditions": "sunny"}
    messages.append(
        {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "content": json.dumps(result),
        }
    )
    answer = chat(messages=messages, **options).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content
    assert not answer.message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_it_thinks_and_then_answers(chat: Any, stream: bool) -> None:
    found = chat(
        model="latentcore-demo",
        messages=[{"role": "user", "content": "What is 123 + 456?"}],
        temperature=0,
        max_tokens=300,
        extra_body=THINK,
        stream=stream,
    )
    if stream:
        chunks = [chunk.choices[0].delta for chunk in found]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks)
        content = "".join(delta.content or "" for delta in chunks)
    else:
        reasoning = found.choices[0].message.reasoning_content
        content = found.choices[0].message.content
    assert "579" in content
    assert "9" in reasoning
    assert "think>" not in reasoning + content


def test_structured_output_follows_reasoning(chat: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    answer = chat(
        model="latentcore-demo",
        messages=[{"role": "user", "content": "What is 123 + 456?"}],
        temperature=0,
        max_tokens=400,
        extra_body=THINK,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    ).choices[0]
    assert answer.message.reasoning_content
    assert answer.finish_reason == "stop"
    assert isinstance(json.loads(answer.message.content)["sum"], int)


def test_forced_calls_fit_their_schema(chat: Any) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = chat(
            model="latentcore-demo",
            messages=[{"role": "user", "content": "Tell me a story."}],
            tools=[WEATHER],
            tool_choice=choice,
            temperature=0,
            max_tokens=200,
        ).choices[0]
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_weather"
        if answer.finish_reason == "tool_calls":
            assert set(json.loads(call.function.arguments)) == {"city"}


def test_the_second_turn_reads_only_what_is_new(chat: Any) -> None:
    story = "Tell me a story about a fox. " * 20
    messages = [{"role": "user", "content": story}]
    first = chat(model="latentcore-demo", messages=messages, max_tokens=30, temperature=0)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "Go on."})
    second = chat(model="latentcore-demo", messages=messages, max_tokens=5, temperature=0)
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens - 64


def test_openai_errors_keep_their_classes(demo: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        demo.client().completions.create(model="latentcore-demo", prompt="word " * 9000)
