"""Conversations to prompts, by the checkpoint's own chat template.

Templates are Jinja programs from the internet: they run in a sandbox that cannot reach Python
objects' internals or change what it is given. The environment offers what Hugging Face's does, so
that published templates render to the same text.
"""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from latentcore.engine.request import TokensPrompt
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import CheckpointError, RequestError

Message = Mapping[str, Any]
"""One message in OpenAI's form: role, content, and tool_calls or tool_call_id where they apply."""

_ROLES = ("system", "user", "assistant", "tool")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks training targets; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own spelling

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template with the special tokens that it may write."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources` maps names to templates; "default" and "tool_use" mean what they do in
        Hugging Face's files. Raises CheckpointError for one that does not compile.
        """
        if not sources:
            raise ValueError("a chat template needs a source")
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._sources = dict(sources)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise CheckpointError(f"chat template {name!r} does not compile: {error}") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template that came with a tokenizer, or None."""
        if not tokenizer.chat_templates:
            return None
        return cls(tokenizer.chat_templates, tokenizer.special_tokens)

    def source(self, *, with_tools: bool) -> str:
        """The source of the template used with or without tools."""
        return self._sources[self._choose(with_tools)]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, begin token included where the template writes one.

        `tools` are in OpenAI's form. A template that knows nothing of tools gets them described in
        the system message. `template_kwargs` go to the template as they are (`thinking`).
        Raises RequestError for messages that the template or this function refuses.
        """
        normalized = normalize_messages(messages)
        name = self._choose(bool(tools))
        if tools and not _mentions_tools(self._sources[name]):
            normalized = _describe_tools(normalized, tools, self._sources[name])
        reserved = {"messages", "tools", "add_generation_prompt", *self._special_tokens}
        extra = dict(template_kwargs or {})
        clash = sorted(reserved & extra.keys())
        if clash:
            raise RequestError(f"chat_template_kwargs: {clash[0]!r} cannot be set here")
        try:
            return self._templates[name].render(
                messages=normalized,
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **extra,
            )
        except _TemplateRefusalError as error:
            raise RequestError(f"messages: {error}") from None
        except Exception as error:  # a template may fail in any way on odd messages
            raise RequestError(
                f"messages: the chat template cannot render them ({error})"
            ) from None

    def _choose(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._templates:
            return "tool_use"
        return "default" if "default" in self._templates else next(iter(self._templates))


def chat_prompt(
    template: ChatTemplate | None,
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokensPrompt:
    """The prompt of one conversation; RequestError where the model has no chat template."""
    if template is None or tokenizer is None:
        raise RequestError("this model has no chat template; use generate")
    text = template.render(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        template_kwargs=template_kwargs,
    )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"messages: not valid Unicode text ({error.reason})") from None
    return {"prompt_token_ids": tokenizer.encode(text, add_begin=False)}


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the one form that published templates expect.

    Content parts are joined to text, tool-call arguments are JSON text, empty tool-call lists are
    left out, "developer" is "system". Raises RequestError naming the message at fault.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages: expected a list with at least one message")
    normalized: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: expected an object with role and content")
        role = message.get("role")
        if role == "developer":
            role = "system"
        if role not in _ROLES:
            raise RequestError(f"{where}.role: expected one of {', '.join(_ROLES)}, found {role!r}")
        copy = {key: value for key, value in message.items() if value is not None}
        copy["role"] = role
        calls = _tool_calls(copy.pop("tool_calls", None), where)
        content = _text_content(message.get("content"), where)
        if calls:
            if role != "assistant":
                raise RequestError(f"{where}.tool_calls: only an assistant's message has them")
            copy["tool_calls"] = calls
            copy["content"] = content or None
        elif content is None:
            if role != "assistant":
                raise RequestError(f"{where}.content: expected text, found none")
            copy["content"] = ""
        else:
            copy["content"] = content
        normalized.append(copy)
    return normalized


def _text_content(content: object, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}.content: expected text or a list of text parts")
    parts: list[str] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in ("text", "refusal", "input_text"):
            text = part.get("text", part.get("refusal"))
            if isinstance(text, str):
                parts.append(text)
                continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"{where}.content: this model reads text parts only, found {kind!r}")
    return "".join(parts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where}.tool_calls: expected a list")
    normalized: list[dict[str, Any]] = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{where}.tool_calls[{number}]: expected an object with function.name"
            )
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        normalized.append(
            {
                **call,
                "type": call.get("type", "function"),
                "function": {**function, "arguments": arguments},
            }
        )
    return normalized


def _mentions_tools(source: str) -> bool:
    """Whether a template reads the variable `tools`, by its syntax and not by its words."""
    from jinja2 import meta

    return "tools" in meta.find_undeclared_variables(_environment().parse(source))


def _describe_tools(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], source: str
) -> list[dict[str, Any]]:
    """Adds the tools, and how to call them, to the system message."""
    lines = ["## Tools", "You have access to the following tools:", ""]
    for tool in tools:
        function = tool.get("function", {})
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        lines += [
            f"### {function.get('name')}",
            f"Description: {function.get('description') or ''}",
            "",
            f"Parameters: {parameters}",
            "",
        ]
    if "```json" in source:
        call = "function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
    else:
        call = "NAME<｜tool▁sep｜>ARGUMENTS"
    lines += [
        "To call a tool, write exactly this:",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        (
            "NAME is a tool's name as given above, ARGUMENTS a JSON object that fits its "
            "parameters. Several calls follow each other between the outer markers."
        ),
    ]
    text = "\n".join(lines)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


class _TemplateRefusalError(Exception):
    """A template called `raise_exception`."""


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusalError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
