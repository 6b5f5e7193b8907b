"""OpenAI's endpoints over an AsyncEngine: from a checked request to outputs, whole or streamed."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from latentcore.engine.async_engine import AsyncEngine, EngineClosedError, OutputStream
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.outputs import CompletionOutput, LogprobsAtPosition, RequestOutput
from latentcore.engine.request import PreparedRequest, Prompt
from latentcore.engine.structured import CompiledGrammar, GrammarCompiler, ToolCallGrammar
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import RequestError
from latentcore.server.errors import ApiError
from latentcore.server.parsing import (
    THINK_END,
    ChatParser,
    Content,
    Event,
    Reasoning,
    ReasoningParser,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
    ToolFormat,
    prompt_opens_reasoning,
    reasons,
    tool_format_of,
)
from latentcore.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    NamedToolChoice,
    TokenizeRequest,
    Tool,
)

Json = dict[str, Any]

MAX_PROMPTS = 256
"""Prompts in one completion request."""


@dataclass
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class _ChatPlan:
    """A chat request ready to run."""

    prepared: PreparedRequest
    compile: Callable[[], CompiledGrammar] | None
    """What compiles its grammar, if it has one."""
    tool_format: ToolFormat | None
    forced: bool
    """Whether the prompt ends in the opening of a tool call."""
    inside_reasoning: bool
    can_reason: bool

    def parser(self) -> ChatParser:
        reasoning = ReasoningParser(inside=self.inside_reasoning) if self.can_reason else None
        tools = ToolCallParser(self.tool_format, forced=self.forced) if self.tool_format else None
        return ChatParser(reasoning, tools)


@dataclass
class _ChatChoice:
    """One choice's state while its events are turned into OpenAI's objects."""

    parser: ChatParser
    reasoning: str = ""
    content: str = ""
    tool_calls: list[Json] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, events: Sequence[Event]) -> list[Json]:
        """Adds events to the whole message; returns them as deltas."""
        deltas: list[Json] = []
        for event in events:
            if isinstance(event, Reasoning):
                self.reasoning += event.text
                deltas.append({"reasoning_content": event.text})
            elif isinstance(event, Content):
                self.content += event.text
                deltas.append({"content": event.text})
            elif isinstance(event, ToolCallStart):
                function = {"name": event.name, "arguments": ""}
                call = {"id": event.call_id, "type": "function", "function": function}
                self.tool_calls.append(call)
                # A copy: the arguments of `call` grow, the delta has gone out.
                deltas.append(
                    {"tool_calls": [{"index": event.index, **call, "function": {**function}}]}
                )
            elif isinstance(event, ToolCallArguments):
                self.tool_calls[event.index]["function"]["arguments"] += event.text
                part = {"index": event.index, "function": {"arguments": event.text}}
                deltas.append({"tool_calls": [part]})
        return deltas

    def message(self) -> Json:
        message: Json = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
            message["content"] = self.content or None
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


class Service:
    """The endpoints' work. One event loop uses it."""

    def __init__(
        self, engine: AsyncEngine, model_names: Sequence[str], *, request_timeout: float | None
    ) -> None:
        self.engine = engine
        self.model_names = tuple(model_names)
        self.created = int(time.time())
        self._timeout = request_timeout
        # Compiling may take seconds; others' prompts are read by other threads meanwhile.
        self._compilers = ThreadPoolExecutor(4, thread_name_prefix="latentcore-grammars")
        template = engine.loaded.chat_template
        source = template.source(with_tools=True) if template is not None else ""
        self._tool_format = tool_format_of(source)
        self._reasons = reasons(source)

    # -- small endpoints ---------------------------------------------------------------------------

    def models(self) -> Json:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._model(name) for name in self.model_names]}

    def model(self, name: str) -> Json:
        """`GET /v1/models/NAME`."""
        self._check_model(name)
        return self._model(name)

    def tokenize(self, request: TokenizeRequest) -> Json:
        """`POST /tokenize`."""
        self._check_model(request.model)
        tokenizer = self._tokenizer()
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("prompt: expected either prompt or messages")
        if request.messages is not None:
            text = self._render(
                request.messages,
                request.tools,
                request.add_generation_prompt,
                request.chat_template_kwargs,
            )
            add_begin = False
        else:
            assert request.prompt is not None
            text, add_begin = request.prompt, request.add_special_tokens
        self.engine.preparer.refuse_endless(_unicode(text))
        token_ids = tokenizer.encode(text, add_begin=add_begin)
        found: Json = {
            "tokens": token_ids,
            "count": len(token_ids),
            "max_model_len": self.engine.preparer.limits.max_model_len,
        }
        if request.return_token_strs:
            found["token_strs"] = [tokenizer.token_text(i) for i in token_ids]
        return found

    def detokenize(self, request: DetokenizeRequest) -> Json:
        """`POST /detokenize`."""
        self._check_model(request.model)
        tokenizer = self._tokenizer()
        limits = self.engine.preparer.limits
        if len(request.tokens) > limits.max_model_len:
            raise RequestError(
                f"tokens: expected at most max_model_len ({limits.max_model_len}), found "
                f"{len(request.tokens)}"
            )
        limit = limits.vocab_size
        for token_id in request.tokens:
            if token_id >= limit:
                raise RequestError(f"tokens: expected ids below {limit}, found {token_id}")
        return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}

    # -- completions -------------------------------------------------------------------------------

    async def completion(self, request: CompletionRequest) -> "CompletionRun":
        """Checks and queues a completion; the prompts run together."""
        self._check_model(request.model)
        params = await asyncio.to_thread(request.sampling_params, self.engine.loaded)
        structured = params.structured_outputs
        params = params.replace(structured_outputs=None)
        prompts = request.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"prompt: expected at most {MAX_PROMPTS} prompts, found {len(prompts)}"
            )
        add_begin = request.add_special_tokens is not False

        def prepare() -> list[PreparedRequest]:
            return [
                self.engine.preparer.prepare(_prompt(prompt), params, add_begin=add_begin)
                for prompt in prompts
            ]

        prepared = await asyncio.to_thread(prepare)
        if structured is not None:
            grammar = await self._compiled(functools.partial(self._grammars().compile, structured))
            prepared = [dataclasses.replace(one, grammar=grammar) for one in prepared]
        return CompletionRun(self, request, prepared)

    # -- chat --------------------------------------------------------------------------------------

    async def chat(self, request: ChatCompletionRequest) -> "ChatRun":
        """Checks and queues a chat completion."""
        self._check_model(request.model)
        plan = await asyncio.to_thread(self._plan_chat, request)
        if plan.compile is not None:
            grammar = await self._compiled(plan.compile)
            plan.prepared = dataclasses.replace(plan.prepared, grammar=grammar)
        return ChatRun(self, request, plan)

    def _plan_chat(self, request: ChatCompletionRequest) -> _ChatPlan:
        params = request.sampling_params(self.engine.loaded)
        structured = request.structured()
        tools = request.tools or []
        choice = request.tool_choice
        if choice is None:
            choice = "auto" if tools else "none"
        if choice != "none" and not tools:
            raise RequestError("tool_choice: only with tools")
        if len({tool.function.name for tool in tools}) != len(tools):
            raise RequestError("tools: every tool needs a name of its own")
        if choice == "none":
            tools = []
        if tools and self._tool_format is None:
            raise RequestError("tools: this model's chat template knows no tool calls")
        add_generation_prompt = request.add_generation_prompt is not False
        text = self._render(
            request.messages, tools, add_generation_prompt, request.chat_template_kwargs
        )
        inside = self._reasons and prompt_opens_reasoning(text)
        compile_grammar: Callable[[], CompiledGrammar] | None = None
        grammar_after: int | None = None
        forced = bool(tools) and choice != "auto"
        if forced:
            if structured is not None:
                raise RequestError("tool_choice: contradicts response_format")
            assert self._tool_format is not None
            if inside:
                text, inside = text + THINK_END, False
            text += self._tool_format.begin + self._tool_format.call_begin
            several = choice == "required" and request.parallel_tool_calls is not False
            compile_grammar = self._tool_grammar(tools, choice, several=several)
        elif tools and request.parallel_tool_calls is False:
            assert self._tool_format is not None
            params = params.replace(stop=(*params.stop_strings, self._tool_format.call_end))
        if structured is not None and not forced:
            compile_grammar = functools.partial(self._grammars().compile, structured)
            if inside:
                grammar_after = self._tokenizer().token_id(THINK_END)
        if compile_grammar is not None and params.min_tokens:
            raise RequestError("min_tokens: cannot be combined with a grammar")
        if tools and request.skip_special_tokens is None:
            # Calls are found by their markers, which may be special tokens.
            params = params.replace(skip_special_tokens=False)
        prepared = self.engine.preparer.prepare(
            text, params, add_begin=False, grammar_after=grammar_after
        )
        return _ChatPlan(
            prepared=prepared,
            compile=compile_grammar,
            tool_format=self._tool_format if tools else None,
            forced=forced,
            inside_reasoning=inside,
            can_reason=self._reasons and not forced and (inside or structured is None),
        )

    def _tool_grammar(
        self, tools: Sequence[Tool], choice: str | NamedToolChoice, *, several: bool
    ) -> Callable[[], CompiledGrammar]:
        """What compiles the grammar of a call that has to be made, or of `several`."""
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            tools = [tool for tool in tools if tool.function.name == name]
            if not tools:
                raise RequestError(f"tool_choice: there is no tool named {name!r}")
        form = self._tool_format
        assert form is not None
        options = [
            ToolCallGrammar(
                before=form.opening(tool.function.name),
                schema=json.dumps(tool.function.parameters or {"type": "object"}),
                after=form.closing + form.call_end,
            )
            for tool in tools
        ]
        return functools.partial(
            self._grammars().compile_tool_calls,
            options,
            separator=form.between if several else None,
            end=form.end,
        )

    async def _compiled(self, work: Callable[[], CompiledGrammar]) -> CompiledGrammar:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compilers, work)
        except RequestError:
            if not self.engine.accepting:
                raise EngineClosedError("the engine is shutting down") from None
            raise

    def _grammars(self) -> GrammarCompiler:
        grammars = self.engine.preparer.grammars
        if grammars is None:
            raise RequestError("structured_outputs: this model has no tokenizer")
        return grammars

    # -- shared ------------------------------------------------------------------------------------

    def submit(self, prepared: PreparedRequest, request_id: str, priority: int) -> OutputStream:
        return self.engine.submit(prepared, request_id, priority=priority)

    def deadline(self) -> contextlib.AbstractAsyncContextManager[object]:
        """Raises TimeoutError in its body once a request's time is up."""
        return asyncio.timeout(self._timeout)

    def name_for(self, model: str | None) -> str:
        """The model's name as the client gave it."""
        return model or self.model_names[0]

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has "
                f"{', '.join(self.model_names)}",
                kind="not_found_error",
                code="model_not_found",
                param="model",
            )

    def _model(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "latentcore",
            "root": self.engine.loaded.name,
            "max_model_len": self.engine.preparer.limits.max_model_len,
        }

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.loaded.tokenizer
        if tokenizer is None:
            raise RequestError("this model has no tokenizer files; use prompts of token ids")
        return tokenizer

    def _template(self) -> ChatTemplate:
        template = self.engine.loaded.chat_template
        if template is None:
            raise RequestError("messages: this model has no chat template; use /v1/completions")
        return template

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any] | None,
    ) -> str:
        described = []
        for tool in tools or ():
            function = tool.function.model_dump(exclude_none=True)
            function.setdefault("parameters", {"type": "object", "properties": {}})
            described.append({"type": "function", "function": function})
        return self._template().render(
            messages,
            tools=described or None,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )


class _Run:
    """A request that is queued: several engine requests whose outputs arrive in any order."""

    object_name: str
    chunk_name: str

    def __init__(
        self,
        service: Service,
        request: CompletionRequest | ChatCompletionRequest,
        prepared: Sequence[PreparedRequest],
        prefix: str,
    ) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.usage = Usage()
        self._service = service
        self._created = int(time.time())
        self._model = service.name_for(request.model)
        self._include_usage = request.include_usage
        self._streams: list[OutputStream] = []
        try:
            for number, one in enumerate(prepared):
                stream = service.submit(one, f"{self.id}-{number}", request.priority or 0)
                self._streams.append(stream)
        except BaseException:
            for stream in self._streams:
                self._service.engine.abort(stream.request_id)
            raise
        self._prompts_counted = [False] * len(self._streams)

    async def close(self) -> None:
        """Aborts what is unfinished."""
        for stream in self._streams:
            await stream.aclose()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, output), as they come, until all are finished."""
        async with self._service.deadline():
            if len(self._streams) == 1:
                async for output in self._streams[0]:
                    self._count(0, output)
                    yield 0, output
                return
            waiting = {
                asyncio.ensure_future(anext(stream)): number
                for number, stream in enumerate(self._streams)
            }
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for future in done:
                        number = waiting.pop(future)
                        output = future.result()
                        if not output.finished:
                            following = asyncio.ensure_future(anext(self._streams[number]))
                            waiting[following] = number
                        self._count(number, output)
                        yield number, output
            finally:
                for future in waiting:
                    future.cancel()

    def base(self, *, chunk: bool) -> Json:
        return {
            "id": self.id,
            "object": self.chunk_name if chunk else self.object_name,
            "created": self._created,
            "model": self._model,
        }

    def _count(self, number: int, output: RequestOutput) -> None:
        if not self._prompts_counted[number]:
            self._prompts_counted[number] = True
            self.usage.prompt_tokens += len(output.prompt_token_ids)
            self.usage.cached_tokens += output.num_cached_tokens
        for choice in output.outputs:
            self.usage.completion_tokens += len(choice.token_ids)

    def _usage_chunk(self) -> Json:
        return {**self.base(chunk=True), "choices": [], "usage": self.usage.as_json()}


class CompletionRun(_Run):
    """A queued `/v1/completions` request."""

    object_name = chunk_name = "text_completion"

    def __init__(
        self, service: Service, request: CompletionRequest, prepared: Sequence[PreparedRequest]
    ) -> None:
        super().__init__(service, request, prepared, "cmpl")
        self._echo = bool(request.echo)
        self._wants_logprobs = request.logprobs is not None
        self._num_top = request.logprobs or 0
        self._n = request.n or 1
        self._prepared = prepared
        self._started: set[int] = set()
        self._lengths: dict[int, int] = {}

    async def whole(self) -> Json:
        """The answer as one object."""
        choices: dict[int, Json] = {}
        async for number, output in self.outputs():
            for piece in self._pieces(number, output):
                known = choices.setdefault(piece["index"], piece)
                if known is piece:
                    continue
                known["text"] += piece["text"]
                known["finish_reason"] = piece["finish_reason"]
                known["stop_reason"] = piece["stop_reason"]
                if piece["logprobs"] is not None:
                    for name, values in piece["logprobs"].items():
                        known["logprobs"][name] += values
        ordered = [choices[index] for index in sorted(choices)]
        return {**self.base(chunk=False), "choices": ordered, "usage": self.usage.as_json()}

    async def chunks(self) -> AsyncIterator[Json]:
        """The answer piece by piece."""
        async for number, output in self.outputs():
            for piece in self._pieces(number, output):
                yield {**self.base(chunk=True), "choices": [piece]}
        if self._include_usage:
            yield self._usage_chunk()

    def _pieces(self, number: int, output: RequestOutput) -> list[Json]:
        return [self._piece(number, output, choice) for choice in output.outputs]

    def _piece(self, number: int, output: RequestOutput, choice: CompletionOutput) -> Json:
        index = number * self._n + choice.index
        text = ""
        positions: list[tuple[int, LogprobsAtPosition | None]] = []
        if self._echo and index not in self._started:
            text = self._prompt_text(number, output)
            if output.prompt_logprobs is not None:
                positions += zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        self._started.add(index)
        text += choice.text
        if choice.logprobs is not None:
            positions += zip(choice.token_ids, choice.logprobs, strict=True)
        logprobs = self._logprobs(index, positions) if self._wants_logprobs else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _prompt_text(self, number: int, output: RequestOutput) -> str:
        prompt = self._prepared[number].prompt
        if prompt is not None:
            return prompt
        tokenizer = self._service.engine.loaded.tokenizer
        return "" if tokenizer is None else tokenizer.decode(output.prompt_token_ids)

    def _logprobs(
        self, index: int, positions: Sequence[tuple[int, LogprobsAtPosition | None]]
    ) -> Json:
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        offset = self._lengths.get(index, 0)
        tokenizer = self._service.engine.loaded.tokenizer
        for token_id, at in positions:
            text = f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
            if at is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(at[token_id].logprob))
            top: dict[str, float] = {}
            for other, entry in at.items():
                name = entry.decoded_token or f"token_id:{other}"
                if other == token_id or (entry.rank or 0) <= self._num_top:
                    top[name] = max(_finite(entry.logprob), top.get(name, -1e30))
            tops.append(top)
        self._lengths[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatRun(_Run):
    """A queued `/v1/chat/completions` request."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, service: Service, request: ChatCompletionRequest, plan: _ChatPlan) -> None:
        super().__init__(service, request, [plan.prepared], "chatcmpl")
        self._num_top = request.top_logprobs or 0
        self._wants_logprobs = bool(request.logprobs)
        self._named = isinstance(request.tool_choice, NamedToolChoice)
        self._choices = [_ChatChoice(plan.parser()) for _ in range(plan.prepared.params.n)]

    async def whole(self) -> Json:
        """The answer as one object."""
        async for _, output in self.outputs():
            for choice in output.outputs:
                self._advance(choice)
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs} if self._wants_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self.base(chunk=False), "choices": choices, "usage": self.usage.as_json()}

    async def chunks(self) -> AsyncIterator[Json]:
        """The answer piece by piece."""
        started: set[int] = set()
        async for _, output in self.outputs():
            for choice in output.outputs:
                index = choice.index
                if index not in started:
                    started.add(index)
                    yield self._chunk(index, {"role": "assistant", "content": ""})
                deltas, logprobs = self._advance(choice)
                # Log-probabilities go with the first text that their tokens make, or alone.
                for number, delta in enumerate(deltas or ([{}] if logprobs else [])):
                    yield self._chunk(index, delta, logprobs=logprobs if number == 0 else None)
                if choice.finish_reason is not None:
                    reason = self._choices[index].finish_reason
                    yield self._chunk(index, {}, finish_reason=reason)
        if self._include_usage:
            yield self._usage_chunk()

    def _advance(self, output: CompletionOutput) -> tuple[list[Json], list[Json]]:
        choice = self._choices[output.index]
        events = choice.parser.push(output.text) if output.text else []
        if output.finish_reason is not None:
            events += choice.parser.finish()
            called = choice.parser.tool_calls > 0 and output.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else output.finish_reason
        logprobs: list[Json] = []
        if output.logprobs is not None:
            logprobs = [
                self._token_logprobs(token_id, at)
                for token_id, at in zip(output.token_ids, output.logprobs, strict=True)
            ]
            choice.logprobs += logprobs
        return choice.take(events), logprobs

    def _token_logprobs(self, token_id: int, at: LogprobsAtPosition) -> Json:
        ranked = sorted(at.items(), key=lambda item: item[1].rank or 0)
        top = [self._entry(i, entry.logprob) for i, entry in ranked[: self._num_top]]
        return {**self._entry(token_id, at[token_id].logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> Json:
        tokenizer = self._service.engine.loaded.tokenizer
        assert tokenizer is not None
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.bytes_of(token_id)),
        }

    def _chunk(
        self,
        index: int,
        delta: Json,
        *,
        finish_reason: str | None = None,
        logprobs: list[Json] | None = None,
    ) -> Json:
        choice: Json = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs} if logprobs else None,
            "finish_reason": finish_reason,
        }
        return {**self.base(chunk=True), "choices": [choice]}


def _prompt(prompt: str | list[int]) -> Prompt:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def _finite(value: float) -> float:
    """JSON has no infinities: a token that cannot be chosen has -9999, as in vLLM."""
    return max(value, -9999.0)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the text is not valid Unicode (a lone surrogate)") from None
    return text
