"""Reasoning and tool calls, in every published format, cut at every place."""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

import itertools
import json
import random
from dataclasses import dataclass, field

import pytest

from latentcore.server.parsing import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    ChatParser,
    Content,
    Reasoning,
    ReasoningParser,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
    ToolFormat,
    prompt_opens_reasoning,
    tool_format_of,
)


@dataclass
class Result:
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def parse(
    pieces: list[str], tools: ToolFormat | None, *, inside: bool = False, forced: bool = False
) -> Result:
    parser = ChatParser(
        None if forced else ReasoningParser(inside=inside),
        ToolCallParser(tools, forced=forced) if tools else None,
    )
    result = Result()
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    for event in events:
        if isinstance(event, Reasoning):
            result.reasoning += event.text
        elif isinstance(event, Content):
            result.content += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(result.calls)
            result.calls.append((event.name, ""))
            result.ids.append(event.call_id)
        elif isinstance(event, ToolCallArguments):
            name, arguments = result.calls[event.index]
            result.calls[event.index] = (name, arguments + event.text)
    assert parser.tool_calls == len(result.calls)
    return result


def every_cut(text: str, tools: ToolFormat | None, **options: bool) -> Result:
    """Parses whole, character by character and in random pieces; all must agree."""
    whole = parse([text], tools, **options)
    generator = random.Random(0)
    ways = [list(text)]
    for _ in range(30):
        cuts = sorted(generator.sample(range(len(text) + 1), min(6, len(text))))
        ends = [0, *cuts, len(text)]
        ways.append([text[a:b] for a, b in itertools.pairwise(ends)])
    for pieces in ways:
        other = parse(pieces, tools, **options)
        assert (other.reasoning, other.content, other.calls) == (
            whole.reasoning,
            whole.content,
            whole.calls,
        )
    return whole


ARGUMENTS = ['{"place": "Köln", "note": "a < b"}', '{"n": [1, 2, {"x": "```"}]}']


def calls_in(style: ToolFormat, names: list[str]) -> str:
    text = style.begin
    for number, (name, arguments) in enumerate(zip(names, ARGUMENTS, strict=False)):
        if style.style == "v3":
            body = f"function{style.separator}{name}\n```json\n{arguments}\n```"
        elif style.style == "kimi":
            body = f"functions.{name}:{number}{style.separator}{arguments}"
        else:
            body = f"{name}{style.separator}{arguments}"
        gap = "\n" if style.style == "v3" and number else ""
        text += f"{gap}{style.call_begin}{body}{style.call_end}"
    return text + style.end


@pytest.mark.parametrize("style", [DEEPSEEK_V31, DEEPSEEK_V3, KIMI_K2], ids=lambda s: s.style)
@pytest.mark.parametrize("count", [1, 2])
def test_tool_calls_in_every_format(style: ToolFormat, count: int) -> None:
    names = ["get_weather", "search.web-2"][:count]
    text = "Let me look.\n\n" + calls_in(style, names)
    found = every_cut(text, style)
    assert found.content == "Let me look."
    assert found.calls == list(zip(names, ARGUMENTS, strict=False))
    for _, arguments in found.calls:
        json.loads(arguments)
    assert len(set(found.ids)) == count
    if style is KIMI_K2:
        assert parse([text], style).ids[0] == "functions.get_weather:0"


@pytest.mark.parametrize("style", [DEEPSEEK_V31, DEEPSEEK_V3, KIMI_K2], ids=lambda s: s.style)
def test_reasoning_then_calls(style: ToolFormat) -> None:
    text = "First I think < hard.</think>\n\n" + calls_in(style, ["f"])
    found = every_cut(text, style, inside=True)
    assert found.reasoning == "First I think < hard."
    assert found.content == ""
    assert found.calls == [("f", ARGUMENTS[0])]


def test_forced_calls_start_inside() -> None:
    text = calls_in(DEEPSEEK_V31, ["f"]).removeprefix(DEEPSEEK_V31.begin + DEEPSEEK_V31.call_begin)
    assert every_cut(text, DEEPSEEK_V31, forced=True).calls == [("f", ARGUMENTS[0])]


@pytest.mark.parametrize("style", [DEEPSEEK_V31, DEEPSEEK_V3, KIMI_K2], ids=lambda s: s.style)
def test_a_marker_within_a_string_of_forced_arguments_is_text(style: ToolFormat) -> None:
    """A grammar lets the model write it there, and the JSON must not end with it."""
    arguments = json.dumps({"a": f'x{style.call_end}"\\', "b": f"{style.end}y"}, ensure_ascii=False)
    body = f"{style.opening('f')}{arguments}{style.closing}{style.call_end}"
    several = "" if style.between is None else style.between + body
    found = every_cut(body + several + style.end, style, forced=True)
    assert found.calls == [("f", arguments)] * (1 + bool(several))


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("plain answer", False, "", "plain answer"),
        ("<think>why</think>because", False, "why", "because"),
        ("\n<think>\nwhy\n</think>\n\nbecause\n", False, "\nwhy\n", "because\n"),
        ("why</think>because", True, "why", "because"),
        ("never ends", True, "never ends", ""),
        ("cut </thi", True, "cut </thi", ""),
        ("a <think> in the middle", False, "", "a <think> in the middle"),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
        ("x</think>", True, "x", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_reasoning(text: str, inside: bool, reasoning: str, content: str) -> None:
    found = every_cut(text, None, inside=inside)
    assert (found.reasoning, found.content) == (reasoning, content)


def test_white_space_is_kept_where_no_call_follows() -> None:
    assert every_cut("a  \n\n b \n", DEEPSEEK_V31).content == "a  \n\n b \n"


def test_parts_of_markers_are_content_in_the_end() -> None:
    assert every_cut("a <｜tool▁ca", DEEPSEEK_V31).content == "a <｜tool▁ca"


@pytest.mark.parametrize("style", [DEEPSEEK_V31, DEEPSEEK_V3, KIMI_K2], ids=lambda s: s.style)
def test_an_answer_cut_short_keeps_what_it_has(style: ToolFormat) -> None:
    text = calls_in(style, ["f"])
    whole = parse([text], style).calls[0]
    for end in range(len(text)):
        found = parse([text[:end]], style)
        assert len(found.calls) <= 1
        assert found.content in ("", *(style.begin[:n] for n in range(len(style.begin))))
        if found.calls:
            assert whole[1].startswith(found.calls[0][1].rstrip("`\n") or "{")


def test_formats_are_known_by_their_templates() -> None:
    assert tool_format_of("{{ '<｜tool▁sep｜>' }}") is DEEPSEEK_V31
    assert tool_format_of("{{ '<｜tool▁sep｜>' + '```json' }}") is DEEPSEEK_V3
    assert tool_format_of("<|tool_call_begin|>") is KIMI_K2
    assert tool_format_of("plain") is None
    assert prompt_opens_reasoning("...<｜Assistant｜><think>\n")
    assert not prompt_opens_reasoning("...<｜Assistant｜></think>")
