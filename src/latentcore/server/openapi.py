"""What the served OpenAPI document says of the answers. Requests are in `protocol`."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, create_model

from latentcore.server.gate import OPEN_PATHS

Json = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong, in one line, and the parameter at fault where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Every answer from 400 on."""

    error: ErrorDetail


class Status(_Answer):
    """`/health` and `/ready`."""

    status: str


class Model(_Answer):
    """A name under which the model is served."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_Answer):
    """`GET /v1/models`."""

    object: str
    data: list[Model]


class TokenizeAnswer(_Answer):
    """`token_strs` only where they were asked for."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeAnswer(_Answer):
    """The tokens' text."""

    prompt: str


class PromptTokensDetails(_Answer):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int


class UsageAnswer(_Answer):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Answer):
    """Lists with an item for each token; None for a prompt's first one."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """`finish_reason` is null until the choice has ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class CompletionAnswer(_Answer):
    """`POST /v1/completions`, and each of its events: the last one has the usage, if wanted."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer | None = None


class TokenLogprob(_Answer):
    """A token's log-probability, and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes_: list[int] = Field(alias="bytes")


class PositionLogprobs(TokenLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    """An item for each token."""

    content: list[PositionLogprobs]


class CalledFunction(_Answer):
    """`arguments` is JSON as text. In a stream the name comes first, arguments piece by piece."""

    name: str | None = None
    arguments: str


class ToolCall(_Answer):
    """A tool that the model calls; `index` in streams only."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: CalledFunction


class Message(_Answer):
    """The model's message, or a part of it in a stream."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionAnswer(_Answer):
    """`POST /v1/chat/completions`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class ChatChunkChoice(_Answer):
    """What is new of one answer."""

    index: int
    delta: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(_Answer):
    """An event of a streamed chat completion: the last one has the usage, if wanted."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None


_DESCRIPTIONS = {
    400: "The request cannot be met; the message says why",
    401: "No valid key",
    404: "No such model",
    408: "The body or the answer took too long",
    413: "The body is too large",
    415: "The body is compressed",
    429: "As many requests wait as may",
    500: "The step that computed this request failed",
    503: "Shutting down",
}


def errors(*statuses: int) -> Responses:
    """The description of these error answers."""
    return {
        status: {"model": ErrorAnswer, "description": _DESCRIPTIONS[status]} for status in statuses
    }


POST_ERRORS = errors(400, 404, 408, 413, 415, 500)
RUN_ERRORS = {**POST_ERRORS, **errors(429, 503)}


def streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """The description of an answer that comes whole or as server-sent events."""
    text = (
        f"With `stream`: events `data: {chunk.__name__}` as JSON, an event with ErrorAnswer where "
        "something goes wrong on the way, and `data: [DONE]` at the end."
    )
    events = {"schema": {"type": "string", "description": text}}
    return {"model": whole, "content": {"text/event-stream": events}}


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Makes the document say what this server does: 400 for invalid requests, keys, events."""

    def document() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _corrected(made, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _corrected(document: Json, *, needs_key: bool) -> Json:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    # Events are text to OpenAPI 3.1, so that nothing refers to what they hold.
    chunk = create_model("Chunk", chunk=(ChatCompletionChunk, ...))
    found = chunk.model_json_schema(ref_template="#/components/schemas/{model}")["$defs"]
    document["components"]["schemas"] = {**found, **schemas}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if needs_key and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
                answer = {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}
                operation["responses"]["401"] = {
                    "description": _DESCRIPTIONS[401],
                    "content": {"application/json": answer},
                }
    if needs_key:
        scheme = {"type": "http", "scheme": "bearer", "description": "A key given by --api-key"}
        document["components"]["securitySchemes"] = {"key": scheme}
    return document
