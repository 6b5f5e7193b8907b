"""What a chat model writes, taken apart as it comes: reasoning, content, tool calls.

Text arrives in pieces that may break anywhere, markers included. Nothing that may be a part of a
marker is passed on before it is certain; how the text was cut makes no difference to the result.
"""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

THINK_BEGIN = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of a call's arguments, JSON text as the model wrote it."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes tool calls.

    A call is call_begin HEADER separator BODY call_end, and all calls stand between begin and end.
    style "v31": the header is the name, the body the arguments. "v3": the header is the kind, the
    body the name and a fenced block with the arguments. "kimi": the header is functions.NAME:INDEX,
    which is the call's id too.
    """

    style: Literal["v31", "v3", "kimi"]
    begin: str
    call_begin: str
    separator: str
    call_end: str
    end: str

    def opening(self, name: str) -> str:
        """What stands before the arguments of a first call of tool `name`."""
        header = {"v31": name, "v3": "function", "kimi": f"functions.{name}:0"}[self.style]
        fence = f"{name}\n```json\n" if self.style == "v3" else ""
        return f"{header}{self.separator}{fence}"

    @property
    def between(self) -> str | None:
        """What stands between two calls; None where a later call's header cannot be foretold."""
        if self.style == "kimi":
            return None
        return ("\n" if self.style == "v3" else "") + self.call_begin

    @property
    def closing(self) -> str:
        """What stands between the arguments and call_end."""
        return "\n```" if self.style == "v3" else ""


_DEEPSEEK = {
    "begin": "<｜tool▁calls▁begin｜>",
    "call_begin": "<｜tool▁call▁begin｜>",
    "separator": "<｜tool▁sep｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "end": "<｜tool▁calls▁end｜>",
}

DEEPSEEK_V31 = ToolFormat(style="v31", **_DEEPSEEK)
DEEPSEEK_V3 = ToolFormat(style="v3", **_DEEPSEEK)
KIMI_K2 = ToolFormat(
    style="kimi",
    begin="<|tool_calls_section_begin|>",
    call_begin="<|tool_call_begin|>",
    separator="<|tool_call_argument_begin|>",
    call_end="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
)


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes earlier tool calls in; None if it knows none."""
    if KIMI_K2.call_begin in template:
        return KIMI_K2
    if DEEPSEEK_V31.separator not in template:
        return None
    return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31


def reasons(template: str) -> bool:
    """Whether a chat template's models may reason between <think> and </think>."""
    return THINK_END in template


def prompt_opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends inside <think>, so that the answer starts with reasoning."""
    return prompt.rstrip().endswith(THINK_BEGIN)


class _Scanner:
    """A buffer that is searched for markers."""

    def __init__(self) -> None:
        self.buffer = ""

    def until(self, markers: Sequence[str]) -> tuple[str, str | None]:
        """The text before the first marker, and the marker, both taken from the buffer.

        Without a marker: the text that cannot be the start of one, and None.
        """
        best: tuple[int, int, str] | None = None
        for marker in markers:
            at = self.buffer.find(marker)
            if at >= 0 and (best is None or (at, -len(marker)) < best[:2]):
                best = (at, -len(marker), marker)
        if best is not None:
            at, _, marker = best
            text, self.buffer = self.buffer[:at], self.buffer[at + len(marker) :]
            return text, marker
        held = 0
        for marker in markers:
            for length in range(min(len(marker) - 1, len(self.buffer)), held, -1):
                if self.buffer.endswith(marker[:length]):
                    held = length
                    break
        cut = len(self.buffer) - held
        text, self.buffer = self.buffer[:cut], self.buffer[cut:]
        return text, None

    def rest(self) -> str:
        text, self.buffer = self.buffer, ""
        return text


class ReasoningParser:
    """Splits reasoning from what follows it."""

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the prompt has opened <think> already; otherwise the answer may do so."""
        self._scanner = _Scanner()
        self._state: Literal["start", "inside", "after", "content"] = (
            "inside" if inside else "start"
        )

    @property
    def in_reasoning(self) -> bool:
        return self._state == "inside"

    def push(self, text: str) -> list[Reasoning | Content]:
        self._scanner.buffer += text
        return self._advance(final=False)

    def finish(self) -> list[Reasoning | Content]:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Reasoning | Content]:
        events: list[Reasoning | Content] = []
        scanner = self._scanner
        if self._state == "start":
            stripped = scanner.buffer.lstrip()
            if stripped.startswith(THINK_BEGIN):
                scanner.buffer = stripped[len(THINK_BEGIN) :]
                self._state = "inside"
            elif final or not THINK_BEGIN.startswith(stripped):
                self._state = "content"
        if self._state == "inside":
            text, marker = scanner.until((THINK_END,))
            if final and marker is None:
                text += scanner.rest()
            if text:
                events.append(Reasoning(text))
            if marker is not None:
                self._state = "after"
        if self._state == "after":
            # The line breaks between reasoning and answer belong to neither.
            scanner.buffer = scanner.buffer.lstrip("\n")
            if scanner.buffer:
                self._state = "content"
        if self._state == "content":
            text = scanner.rest()
            if text:
                events.append(Content(text))
        return events


class ToolCallParser:
    """Finds tool calls in an answer's content."""

    def __init__(self, tool_format: ToolFormat, *, forced: bool) -> None:
        """`forced`: the prompt ends with begin and call_begin, so the answer starts in a call.

        Then a grammar holds the arguments to JSON, and a marker within one of its strings is text.
        """
        self._format = tool_format
        self._forced = forced
        self._in_string = False
        self._escaped = False
        self._scanner = _Scanner()
        self._state: Literal["content", "between", "header", "name", "arguments", "after"] = (
            "header" if forced else "content"
        )
        self._header = ""
        self._space = ""
        self._calls = 0

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._calls

    def push(self, text: str) -> list[Event]:
        self._scanner.buffer += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The answer ends here; what is held back comes out. An unfinished header is dropped."""
        rest = self._scanner.rest()
        if self._state == "content" and self._space + rest:
            return [Content(self._space + rest)]
        if self._state == "arguments" and rest and not self._ending().startswith(rest):
            return [ToolCallArguments(self._calls - 1, rest)]
        return []

    def _advance(self, events: list[Event]) -> bool:
        """Makes one move; False where more text is needed."""
        return {
            "content": self._content,
            "between": self._between,
            "header": self._read_header,
            "name": self._read_name,
            "arguments": self._read_arguments,
            "after": self._ignore,
        }[self._state](events)

    def _content(self, events: list[Event]) -> bool:
        text, marker = self._scanner.until((self._format.begin, self._format.call_begin))
        text = self._space + text
        # White space before a tool call is not content; whether one follows is not yet known.
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            events.append(Content(kept))
        if marker is None:
            return False
        self._space = ""
        self._state = "between" if marker == self._format.begin else "header"
        return True

    def _between(self, events: list[Event]) -> bool:
        _, marker = self._scanner.until((self._format.call_begin, self._format.end))
        if marker is None:
            return False
        self._state = "header" if marker == self._format.call_begin else "after"
        return True

    def _read_header(self, events: list[Event]) -> bool:
        text, marker = self._scanner.until((self._format.separator, self._format.call_end))
        self._header += text
        if marker is None:
            return False
        header, self._header = self._header.strip(), ""
        if marker == self._format.call_end:
            self._state = "between"
        elif self._format.style == "v3":
            self._state = "name"
        elif self._format.style == "kimi":
            name = header.rpartition(":")[0] or header
            self._start(events, name.removeprefix("functions."), header)
        else:
            self._start(events, header, None)
        return True

    def _read_name(self, events: list[Event]) -> bool:
        text, marker = self._scanner.until(("```json\n", "```\n", self._format.call_end))
        self._header += text
        if marker is None:
            return False
        name, self._header = self._header.strip(), ""
        if marker == self._format.call_end:
            self._state = "between"
        else:
            self._start(events, name, None)
        return True

    def _start(self, events: list[Event], name: str, call_id: str | None) -> None:
        events.append(ToolCallStart(self._calls, call_id or new_call_id(), name))
        self._calls += 1
        self._in_string = self._escaped = False
        self._state = "arguments"

    def _ending(self) -> str:
        return self._format.closing + self._format.call_end

    def _read_arguments(self, events: list[Event]) -> bool:
        markers = [self._ending(), self._format.call_end]
        text, marker = self._scanner.until(markers)
        self._follow_strings(text)
        quoted = self._forced and self._in_string
        if marker is not None and quoted:
            text += marker
        if text:
            events.append(ToolCallArguments(self._calls - 1, text))
        if marker is None:
            return False
        if not quoted:
            self._state = "between"
        return True

    def _follow_strings(self, text: str) -> None:
        """Keeps up whether the arguments so far end within a string."""
        for character in text:
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                self._escaped = self._in_string

    def _ignore(self, events: list[Event]) -> bool:
        self._scanner.rest()
        return False


class ChatParser:
    """A chat answer's reasoning, content and tool calls, in one pass."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def tool_calls(self) -> int:
        """Tool calls begun so far."""
        return 0 if self._tools is None else self._tools.calls

    def push(self, text: str) -> list[Event]:
        """Events for the next piece of text."""
        if self._reasoning is None:
            return self._content(text)
        return self._split(self._reasoning.push(text))

    def finish(self) -> list[Event]:
        """Events for what was held back, at the end of the answer."""
        events = [] if self._reasoning is None else self._split(self._reasoning.finish())
        if self._tools is not None:
            events += self._tools.finish()
        return events

    def _split(self, pieces: Sequence[Reasoning | Content]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                events.append(piece)
            else:
                events += self._content(piece.text)
        return events

    def _content(self, text: str) -> list[Event]:
        if self._tools is None:
            return [Content(text)] if text else []
        return self._tools.push(text)


def new_call_id() -> str:
    """An id for a tool call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"
