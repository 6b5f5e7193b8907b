"""The server in a real process, driven by the official client."""

import gzip
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.server.process import ServerProcess

ABORTED = 'request_success_total{engine="0",finished_reason="abort",model_name="tiny"}'
USER = [{"role": "user", "content": "Hi"}]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2, 3]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="Once", max_tokens=8, temperature=0)
    assert found.object == "text_completion"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 8)
    assert found.usage.total_tokens == 12
    again = client.completions.create(model="also-tiny", prompt="Once", max_tokens=8, temperature=0)
    assert again.choices[0].text == found.choices[0].text


def test_completion_streams_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Once",
        "max_tokens": 20,
        "seed": 3,
        "n": 2,
    }
    whole = client.completions.create(**options)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage or usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert texts[0] != texts[1]


def test_lists_of_prompts_and_token_ids(client: openai.OpenAI, server: ServerProcess) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    texts = client.completions.create(prompt=["Once", "Twice"], n=1, **options)
    assert [choice.index for choice in texts.choices] == [0, 1]
    as_ids = client.completions.create(prompt=ids, **options)
    as_lists = client.completions.create(prompt=[ids, ids], **options)
    assert {choice.text for choice in as_lists.choices} == {texts.choices[0].text}
    assert as_ids.choices[0].text == texts.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_with_logprobs_as_lm_eval_asks(client: openai.OpenAI, max_tokens: int) -> None:
    found = client.completions.create(
        model="tiny",
        prompt=[[10, 20, 30, 40], [10, 20, 31]],
        max_tokens=max_tokens,
        temperature=0,
        logprobs=2,
        echo=True,
        seed=1234,
    )
    for choice, length in zip(found.choices, (4, 3), strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.token_logprobs) == length + max_tokens
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert len(logprobs.tokens or []) == len(logprobs.text_offset or []) == length + max_tokens
        assert logprobs.top_logprobs[0] is None
        assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
        assert choice.text.startswith("".join((logprobs.tokens or [])[:length]))


def test_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=USER, max_completion_tokens=12, seed=1, n=3
    )
    texts = [choice.message.content for choice in found.choices]
    assert len(set(texts)) == 3
    again = client.chat.completions.create(model="tiny", messages=USER, max_tokens=12, seed=1, n=3)
    assert [choice.message.content for choice in again.choices] == texts
    assert found.choices[0].message.role == "assistant"
    assert found.usage is not None
    assert found.usage.completion_tokens <= 36


def test_chat_streams_the_same_message(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 20,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**options)
    text, roles, tokens, reason, usage = "", [], [], None, None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            if choice.logprobs:
                tokens += choice.logprobs.content or []
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"]
    assert reason == whole.choices[0].finish_reason
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert usage is not None
    assert usage.completion_tokens == 20


def test_stop_strings(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 90, "seed": 2}
    options["extra_body"] = {"ignore_eos": True}
    text = client.completions.create(**options).choices[0].text
    stop = next(c for c in text[4:] if c != "�")
    found = client.completions.create(**options, stop=["nowhere at all", stop])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_logit_bias(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt="Once", max_tokens=3, temperature=0, logit_bias={"65": 100}, logprobs=0
    )
    assert len(set(found.choices[0].logprobs.tokens)) == 1  # type: ignore[union-attr,arg-type]


def test_reasoning_is_split_off(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 10, "seed": 1}
    thinking = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    thought = client.chat.completions.create(**options, **thinking).choices[0].message
    assert thought.content == ""
    assert thought.reasoning_content  # type: ignore[attr-defined]
    pieces = ""
    for chunk in client.chat.completions.create(**options, **thinking, stream=True):
        pieces += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        assert not chunk.choices[0].delta.content
    assert pieces == thought.reasoning_content  # type: ignore[attr-defined]
    plain = client.chat.completions.create(**options).choices[0].message
    assert plain.content
    assert not hasattr(plain, "reasoning_content")


def arguments_of(call: Any) -> dict[str, Any]:
    found = json.loads(call.function.arguments)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_required_and_named_tools(client: openai.OpenAI, seed: int, thinking: bool) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": USER,
        "tools": TOOLS,
        "seed": seed,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "extra_body": {"chat_template_kwargs": {"thinking": thinking}},
    }
    required = client.chat.completions.create(**options, tool_choice="required").choices[0]
    assert required.finish_reason == "tool_calls"
    assert required.message.content is None
    (call,) = required.message.tool_calls or []
    assert call.function.name in ("get_weather", "add")  # type: ignore[union-attr]
    named = client.chat.completions.create(
        **options, tool_choice={"type": "function", "function": {"name": "get_weather"}}
    ).choices[0]
    (call,) = named.message.tool_calls or []
    assert call.function.name == "get_weather"  # type: ignore[union-attr]
    found = arguments_of(call)
    assert found["place"] in ("Rome", "Oslo")
    assert found["days"] in (1, 2)
    name, arguments, ids, reason = "", "", [], None
    for chunk in client.chat.completions.create(**options, tool_choice="required", stream=True):
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or []:
            ids += [part.id] if part.id else []
            name += (part.function.name if part.function else None) or ""
            arguments += (part.function.arguments if part.function else None) or ""
    assert reason == "tool_calls"
    assert len(ids) == 1
    (whole,) = required.message.tool_calls or []
    assert (name, arguments) == (whole.function.name, whole.function.arguments)  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_may_be_several(client: openai.OpenAI, stream: bool) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=USER,  # type: ignore[arg-type]
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="required",
        # Neither the end nor the s of calls_end, so that the model does not stop after one call.
        logit_bias={"257": -100, "258": -100, "115": -100},
        max_tokens=300,
        seed=4,
        stream=stream,
    )
    calls: dict[int, dict[str, Any]] = {}
    if stream:
        for chunk in found:  # type: ignore[union-attr]
            for part in chunk.choices[0].delta.tool_calls or []:  # type: ignore[union-attr]
                call = calls.setdefault(part.index, {"ids": [], "name": "", "arguments": ""})
                assert max(calls) == part.index
                call["ids"] += [part.id] if part.id else []
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    else:
        for index, call in enumerate(found.choices[0].message.tool_calls or []):  # type: ignore[union-attr]
            function = call.function
            calls[index] = {
                "ids": [call.id],
                "name": function.name,
                "arguments": function.arguments,
            }
    assert len(calls) > 1
    ids = [call["ids"] for call in calls.values()]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(ids)
    for index in range(len(calls) - 1):
        arguments = json.loads(calls[index]["arguments"])
        assert set(arguments) == ({"a"} if calls[index]["name"] == "add" else {"place", "days"})


@pytest.mark.parametrize("parallel", [None, True, False])
def test_auto_may_be_held_to_one_call(client: openai.OpenAI, parallel: bool | None) -> None:
    call = "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜>"  # noqa: RUF001
    text = "Well:" + call.format('{"a": 1}') + call.format('{"a": 2}')
    options: dict[str, Any] = {} if parallel is None else {"parallel_tool_calls": parallel}
    options |= {"model": "tiny", "messages": USER, "tools": TOOLS, "max_tokens": 300}
    options["extra_body"] = {"structured_outputs": {"choice": [text]}}
    choice = client.chat.completions.create(**options).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Well:", "tool_calls")
    found = [json.loads(one.function.arguments)["a"] for one in choice.message.tool_calls or []]  # type: ignore[union-attr]
    assert found == ([1] if parallel is False else [1, 2])
    arguments = ""
    for chunk in client.chat.completions.create(**options, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert arguments == "".join(f'{{"a": {number}}}' for number in found)


def test_tool_results_are_read(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: list[Any] = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    for choice in ("auto", "none"):
        found = client.chat.completions.create(
            model="tiny", messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=5
        )
        assert found.choices[0].finish_reason in ("length", "stop")


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: openai.OpenAI, stream: bool) -> None:
    found: Any = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        stream=stream,
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    else:
        text = found.choices[0].message.content
    answer = json.loads(text)
    assert isinstance(answer["ok"], bool)
    assert answer["n"] in (1, 2, 3)


def test_json_object_and_choice(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=40,
        seed=1,
        response_format={"type": "json_object"},
        logit_bias={"65": -50},
    )
    text = found.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    chosen = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=20,
        extra_body={"structured_outputs": {"choice": ["red", "green"]}},
    )
    assert chosen.choices[0].message.content in ("red", "green")


def test_tokenize_and_detokenize(server: ServerProcess) -> None:
    with server.http() as http:
        found = http.post("/tokenize", json={"prompt": "Höhe", "return_token_strs": True}).json()
        assert found["count"] == 5
        assert found["max_model_len"] == 2048
        back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back == {"prompt": "Höhe"}
        chat = http.post("/tokenize", json={"messages": USER}).json()
        text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert text == "<user>Hi<answer></think>"


def test_health_ready_metrics_and_page_need_no_key(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/metrics", "/", "/static/chat.js", "/favicon.svg"):
        assert httpx2.get(server.url + path).status_code == 200
    page = httpx2.get(server.url).text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_watchers_may_ask_for_the_head_alone(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/metrics", "/"):
        response = httpx2.head(server.url + path)
        assert (response.status_code, response.content) == (200, b"")


# What vLLM's engine tells of a finished request, and of steps, under its names.
PER_REQUEST = [
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
]


def test_metrics_of_a_request(client: openai.OpenAI, server: ServerProcess) -> None:
    server.wait_idle()
    names = [f"{name}_{end}" for name in PER_REQUEST for end in ("count", "sum")]
    before = {name: server.metric(name) for name in names}
    client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=4, n=2, extra_body={"ignore_eos": True}
    )
    grown = {name: server.metric(name) - before[name] for name in names}
    assert {grown[f"{name}_count"] for name in PER_REQUEST} == {1}
    sums = {name: grown[f"{name}_sum"] for name in PER_REQUEST}
    assert all(value > 0 for value in sums.values())
    assert sums["request_prompt_tokens"] == 3
    assert sums["request_generation_tokens"] == 8
    assert sums["request_max_num_generation_tokens"] == 4
    assert (sums["request_params_n"], sums["request_params_max_tokens"]) == (2, 4)
    parts = sums["request_prefill_time_seconds"] + sums["request_decode_time_seconds"]
    assert parts == pytest.approx(sums["request_inference_time_seconds"])
    whole = sums["request_queue_time_seconds"] + sums["request_inference_time_seconds"]
    assert whole == pytest.approx(sums["e2e_request_latency_seconds"])


def test_every_metric_names_its_model_and_engine(server: ServerProcess) -> None:
    text = httpx2.get(f"{server.url}/metrics").text
    samples = [line for line in text.splitlines() if line.startswith("latentcore:")]
    assert len(samples) > 100
    for sample in samples:
        assert 'engine="0"' in sample
        assert 'model_name="tiny"' in sample
    for reason in ("stop", "length", "abort", "error"):
        assert f'finished_reason="{reason}"' in text
    assert re.search(r'cache_config_info{[^}]*block_size="64"', text)


def test_metrics_count(client: openai.OpenAI, server: ServerProcess) -> None:
    before = {
        name: server.metric(name)
        for name in ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    }
    hits = server.metric("prefix_cache_hits_total")
    for _ in range(2):
        client.completions.create(model="tiny", prompt="word " * 40, max_tokens=7)
    assert server.metric("generation_tokens_total") >= before["generation_tokens_total"] + 2
    assert server.metric("prompt_tokens_total") > before["prompt_tokens_total"] + 200
    assert server.metric("request_success_total") == before["request_success_total"] + 2
    assert server.metric("prefix_cache_hits_total") >= hits + 192
    for name in ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"):
        assert server.metric(name) >= 2
    server.wait_idle()


def test_the_dashboard_shows_metrics_that_exist(server: ServerProcess) -> None:
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    shown = set(re.findall(r"latentcore:\w+", dashboard))
    text = httpx2.get(f"{server.url}/metrics").text
    served = set(re.findall(r"^latentcore:\w+", text, re.MULTILINE))
    assert shown <= served
    names = {re.sub("_(bucket|sum|count|created|total)$", "", name) for name in served}
    missing = {name for name in names if not any(one.startswith(name) for one in shown)}
    assert missing == {"latentcore:cache_config_info"}


def status_of(server: ServerProcess, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
    with server.http() as http:
        response = http.post(path, **options)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return response.status_code, error


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        (CHAT, {}, "messages: Field required"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "found 'robot'"),
        (CHAT, {"messages": USER, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": USER, "temperature": -1}, "temperature: expected"),
        (CHAT, {"messages": USER, "top_p": 3}, "top_p: expected"),
        (CHAT, {"messages": USER, "n": 1000}, "n: expected"),
        (CHAT, {"messages": USER, "n": 1.5}, "n:"),
        (CHAT, {"messages": USER, "max_tokens": 9999}, "max_tokens: the prompt has"),
        (CHAT, {"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "contradict"),
        (CHAT, {"messages": USER, "functions": []}, "functions: this field is not known"),
        (CHAT, {"messages": USER, "stream_options": {}}, "stream_options: only with stream"),
        (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs: only with logprobs"),
        (CHAT, {"messages": USER, "seed": 2**70}, "seed: expected"),
        (CHAT, {"messages": USER, "stop": ["x"] * 100}, "stop: expected at most"),
        (CHAT, {"messages": USER, "logit_bias": {"x": 1}}, "logit_bias: expected"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice: only with tools"),
        (
            CHAT,
            {
                "messages": USER,
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "no"}},
            },
            "no tool named 'no'",
        ),
        (CHAT, {"messages": USER, "tools": [TOOLS[0], TOOLS[0]]}, "a name of its own"),
        (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "JSON schema"),
        (
            CHAT,
            {
                "messages": USER,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "what"}},
                },
            },
            "cannot be compiled",
        ),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"messages": []}}, "cannot be set"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        (TEXT, {"prompt": "\ud800"}, "not valid Unicode"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": ""}, "empty text"),
        (TEXT, {"prompt": [70000]}, "prompt_token_ids: expected ids"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": ["x"] * 300}, "at most 256 prompts"),
        (TEXT, {"prompt": "x" * 3000}, "max_model_len is 2048"),
        (TEXT, {"prompt": "x", "logprobs": 50}, "logprobs: expected 0 to 20"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
        (TEXT, {"prompt": "x", "best_of": 3}, "best_of"),
        (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens: expected"),
        (TEXT, {"prompt": "x", "structured_outputs": {"regex": "(["}}, "cannot be compiled"),
        (TEXT, {"prompt": "x", "structured_outputs": {}}, "expected exactly one"),
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "x" * 100_000}, "100000 characters and more than 2048 tokens"),
        ("/detokenize", {"tokens": [99999]}, "expected ids below"),
        ("/detokenize", {"tokens": [1] * 2049}, "at most max_model_len (2048), found 2049"),
        (
            TEXT,
            {"prompt": "x", **{f"f{i}": 1 for i in range(300)}},
            "at most 256 fields, found 301",
        ),
        (TEXT, {"prompt": "x", "stop_token_ids": [1] * 300_000}, "at most 262144 token ids"),
        (CHAT, {"messages": USER, "tools": TOOLS * 513}, "at most 1024 items"),
        (TEXT, {"prompt": [7] * 100_000}, "the prompt has 100000 tokens, max_model_len is 2048"),
        (TEXT, {"prompt": [7] * 100_000 + ["x"]}, "prompt"),
    ],
)
def test_bad_requests_are_400_with_one_line(
    path: str, body: dict[str, Any], match: str, server: ServerProcess
) -> None:
    status, error = status_of(server, path, content=json.dumps(body))
    assert status == 400, error
    assert match in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([*USER, {"role": "user"}], "messages[1].content"),
        ([*USER, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1].content"),
        ([*USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0]"),
    ],
)
def test_the_message_at_fault_is_the_param(
    messages: list[Any], param: str, server: ServerProcess
) -> None:
    status, error = status_of(server, CHAT, json={"messages": messages})
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": "x", "stop": ["a", 3]}, "stop[1]"),
        ({"prompt": "x", "logit_bias": {"65": "x"}}, "logit_bias.65"),
        ({"prompt": "x", "structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"prompt": "x", "stream_options": {"Str": 1}}, "stream_options.Str"),
    ],
)
def test_the_field_at_fault_is_the_param(
    body: dict[str, Any], param: str, server: ServerProcess
) -> None:
    status, error = status_of(server, TEXT, json=body)
    assert (status, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_compressed_bodies_are_415(encoding: str, server: ServerProcess) -> None:
    body = gzip.compress(json.dumps({"messages": USER}).encode())
    status, error = status_of(server, CHAT, content=body, headers={"Content-Encoding": encoding})
    assert status == 415
    assert f"Content-Encoding {encoding!r}: compressed bodies are not read" in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"3",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
    ],
)
def test_rubbish_is_400(content: bytes, server: ServerProcess) -> None:
    assert status_of(server, CHAT, content=content)[0] == 400


def deep_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep_schema(200),
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "string", "pattern": "(" * 500},
        {"type": "string", "pattern": "(" * 30_000 + ")" * 30_000},  # crashes xgrammar 0.2
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"not": {"type": "string"}},
        {"enum": ["x" * 100] * 4000},
        {"type": "string", "pattern": "^a+$", "minLength": 3},
        {"type": "string", "pattern": "^a+$", "format": "date"},
        {"type": "array", "items": {"type": "string", "format": "date", "maxLength": 3}},
        {"type": "number", "multipleOf": 2},
        {"type": "integer", "multipleOf": 2, "maximum": 9},
    ],
)
def test_absurd_schemas_are_400(schema: dict[str, Any], server: ServerProcess) -> None:
    body = {
        "messages": USER,
        "max_tokens": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    with server.http() as http:
        response = http.post(CHAT, json=body)
    assert response.status_code == 400, response.text


def test_another_model_is_404(server: ServerProcess) -> None:
    status, error = status_of(server, CHAT, json={"model": "gpt-4", "messages": USER})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    assert status_of(server, "/v1/nothing", json={})[0] == 404
    with server.http() as http:
        assert http.get(CHAT).status_code == 405


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic secret", "Bearer", "Bearer s\xe9"])
def test_no_key_or_a_wrong_one_is_401(header: str | None, server: ServerProcess) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = httpx2.post(server.url + CHAT, json={"messages": USER}, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(server.url + "/v1/models").status_code == 401


def test_large_bodies_are_413(server: ServerProcess) -> None:
    status, error = status_of(server, CHAT, content=b" " * 1_100_000)
    assert (status, error["code"]) == (413, "body_too_large")

    def endless() -> Any:
        for _ in range(200):
            yield b" " * 10_000

    with server.http() as http:
        assert http.post(CHAT, content=endless()).status_code == 413


def test_slow_bodies_are_408(server: ServerProcess) -> None:
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Authorization: Bearer secret\r\n\r\n{"
        )
        connection.settimeout(20)
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_request_ids(server: ServerProcess) -> None:
    with server.http() as http:
        mine = http.get("/v1/models", headers={"X-Request-Id": "abc-1"})
        assert mine.headers["x-request-id"] == "abc-1"
        odd = http.get("/v1/models", headers={"X-Request-Id": "a b{}"})
        assert odd.headers["x-request-id"] != "a b{}"
        other = http.get("/v1/models").headers["x-request-id"]
        assert len(other) == 32
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    logged = {line.get("request_id"): line for line in lines}
    assert logged["abc-1"]["path"] == "/v1/models"
    assert logged["abc-1"]["status"] == 200
    assert not any("body" in line for line in lines)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(server: ServerProcess, stream: bool) -> None:
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    aborted = server.metric(ABORTED)
    generated = server.metric("generation_tokens_total")
    with server.http() as http:
        if stream:
            with http.stream("POST", TEXT, json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx2.TimeoutException):
                http.post(TEXT, json=body, timeout=0.05)
    server.wait_idle()
    assert server.metric("generation_tokens_total") < generated + 1900
    # It is counted at once, though nothing else comes that would make another step.
    assert server.metric(ABORTED) == aborted + 1


def test_many_at_once_get_what_each_gets_alone(server: ServerProcess) -> None:
    client = server.client()
    prompts = [f"{number} times" for number in range(24)]

    def ask(prompt: str) -> str:
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=30, seed=7)
        return found.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=prompt: together.update({p: ask(p)}))  # type: ignore[misc]
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


def test_the_openapi_document_is_served(server: ServerProcess) -> None:
    with server.http() as http:
        document = http.get("/openapi.json").json()
    assert {CHAT, TEXT, "/v1/models", "/tokenize"} <= set(document["paths"])
