# ruff: noqa: RUF001  the special tokens are spelled with full-width bars
"""The chat format: special tokens, a renderer and the Jinja template that must agree with it.

The format is DeepSeek-V3.1's: turns are marked by special tokens, the assistant marker is followed
by `<think>` (thinking on) or `</think>` (off), tool calls and tool outputs have markers of their
own, and reasoning of earlier turns is dropped from the history.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"

#: (text, special): the order is the order of ids, from 0. As in the published V3.1 tokenizer only
#: the sentence and padding tokens are "special" in the tokenizers sense, so that a reader of the
#: decoded text still sees reasoning and tool-call markers.
ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    (BOS, True),
    (EOS, True),
    (PAD, True),
    (THINK, False),
    (END_THINK, False),
    (USER, False),
    (ASSISTANT, False),
    (CALLS_BEGIN, False),
    (CALLS_END, False),
    (CALL_BEGIN, False),
    (CALL_END, False),
    (OUTPUTS_BEGIN, False),
    (OUTPUTS_END, False),
    (OUTPUT_BEGIN, False),
    (OUTPUT_END, False),
    (TOOL_SEP, False),
)
TOKEN_IDS: dict[str, int] = {text: index for index, (text, _) in enumerate(ADDED_TOKENS)}

TOOLS_HEAD = "## Tools\nYou have access to the following tools:\n"
TOOLS_TAIL = (
    "IMPORTANT: to use a tool, answer in exactly this form:\n"
    f"{CALLS_BEGIN}{CALL_BEGIN}NAME{TOOL_SEP}ARGUMENTS{CALL_END}{CALLS_END}\n"
    "NAME is one of the tools, ARGUMENTS is JSON that fits its parameters."
)

TEMPLATE = """\
{%- set thinking = thinking | default(false) -%}
{%- set state = namespace(system='', expect_reply=false, after_tool=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set state.system = state.system + ('\\n\\n' if state.system else '') + message['content'] -%}
{%- endfor -%}
{%- if tools -%}
{%- if state.system -%}{%- set state.system = state.system + '\\n\\n' -%}{%- endif -%}
{%- set state.system = state.system + @HEAD@ -%}
{%- for tool in tools -%}
{%- set f = tool['function'] if tool['function'] is defined else tool -%}
{%- set state.system = state.system + '\\n### ' + f['name'] + '\\nDescription: '
    + (f['description'] | default('')) + '\\n\\nParameters: ' + (f['parameters'] | tojson)
    + '\\n' -%}
{%- endfor -%}
{%- set state.system = state.system + '\\n' + @TAIL@ -%}
{%- endif -%}
{{- bos_token + state.system -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- set state.expect_reply = true -%}
{%- set state.after_tool = false -%}
{%- elif message['role'] == 'assistant' -%}
{%- if state.expect_reply -%}
{{- '<｜Assistant｜>' -}}
{{- '<think>' if message['prefix'] and thinking else '</think>' -}}
{%- endif -%}
{%- set state.expect_reply = false -%}
{%- set state.after_tool = false -%}
{%- set content = message['content'] or '' -%}
{%- if '</think>' in content -%}
{%- set content = content.split('</think>', 1)[1] -%}
{%- endif -%}
{{- content -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{%- set f = call['function'] if call['function'] is defined else call -%}
{%- set arguments = f['arguments'] -%}
{%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
{{- '<｜tool▁call▁begin｜>' + f['name'] + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{%- if not message['prefix'] -%}{{- eos_token -}}{%- endif -%}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- set state.expect_reply = false -%}
{%- set state.after_tool = true -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.expect_reply -%}
{{- '<｜Assistant｜>' -}}
{%- if thinking -%}{{- '<think>' -}}{%- else -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
"""


def chat_template() -> str:
    """The Jinja chat template of the checkpoint."""

    def literal(text: str) -> str:
        return "'" + text.replace("\n", "\\n") + "'"

    return TEMPLATE.replace("@HEAD@", literal(TOOLS_HEAD)).replace("@TAIL@", literal(TOOLS_TAIL))


@dataclass
class Chat:
    """One conversation. `thoughts`: the last assistant turn's reasoning, None: thinking off."""

    messages: list[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    thoughts: str | None = None
    kind: str = "chat"
    #: what a checker needs to judge a reply (kind-specific)
    expected: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def ask(
        cls, question: str, answer: str, thoughts: str | None = None, kind: str = "chat"
    ) -> "Chat":
        """A single question and its answer."""
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return cls(turns, thoughts=thoughts, kind=kind)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def render_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The block that describes the tools, as it stands at the end of the system text."""
    parts = [TOOLS_HEAD]
    for tool in tools:
        f = tool["function"]
        parts.append(
            f"\n### {f['name']}\nDescription: {f['description']}\n\n"
            f"Parameters: {_dumps(f['parameters'])}\n"
        )
    return "".join(parts) + "\n" + TOOLS_TAIL


def render(chat: Chat) -> str:
    """The whole conversation as training text. The last assistant turn keeps its thoughts."""
    system = "\n\n".join(m["content"] for m in chat.messages if m["role"] == "system")
    if chat.tools:
        system = (system + "\n\n" if system else "") + render_tools(chat.tools)
    out = [BOS, system]
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    expect_reply = False
    for i, message in enumerate(chat.messages):
        role, content = message["role"], message["content"] or ""
        if role == "user":
            out += [USER, content]
            expect_reply = True
        elif role == "tool":
            out += [OUTPUT_BEGIN, content, OUTPUT_END]
            expect_reply = False
        elif role == "assistant":
            if expect_reply:
                out.append(ASSISTANT)
                if i == last and chat.thoughts is not None:
                    out += [THINK, chat.thoughts]
                out.append(END_THINK)
            expect_reply = False
            out.append(content)
            calls = message.get("tool_calls")
            if calls:
                out.append(CALLS_BEGIN)
                for call in calls:
                    f = call["function"]
                    arguments = f["arguments"]
                    if not isinstance(arguments, str):
                        arguments = _dumps(arguments)
                    out += [CALL_BEGIN, f["name"], TOOL_SEP, arguments, CALL_END]
                out.append(CALLS_END)
            out.append(EOS)
    return "".join(out)


def render_prompt(chat: Chat) -> str:
    """The conversation up to its last assistant turn, ready for the model to answer.

    A turn that follows a tool output has no assistant marker (V3.1); any other starts with the
    marker and `<think>` or `</think>`.
    """
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    head = Chat([*chat.messages[:last], {"role": "assistant", "content": ""}], chat.tools)
    text = render(head).removesuffix(EOS)
    if chat.thoughts is not None:
        text = text.removesuffix(END_THINK) + THINK
    return text
