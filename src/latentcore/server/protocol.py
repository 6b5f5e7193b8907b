"""OpenAI's requests, and the extensions that vLLM's users know.

Values are checked for their types here and for their ranges by `SamplingParams`. A field that is
not known is refused by name: silently ignoring one gives answers that nobody asked for.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from latentcore.engine.loading import LoadedModel
from latentcore.engine.sampling_params import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from latentcore.errors import RequestError

# One wrong item is told of; millions of them must not be gathered first.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


MAX_FIELDS = 256
MAX_TOOLS = 1024


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Every unknown field is an error of its own: a million would hold everybody up."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "expected at most {most} fields, found {found}",
                {"most": MAX_FIELDS, "found": len(data)},
            )
        return data


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the usage of the whole request."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(_Strict):
    """vLLM's `structured_outputs`: exactly one of the fields."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def params(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(
            json=self.json_schema,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=bool(self.json_object),
        )


class JsonSchema(_Strict):
    """A named JSON schema, as `response_format` carries it."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """`text`, `json_object`, or `json_schema` with a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def params(self) -> StructuredOutputsParams | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise RequestError("response_format.json_schema.schema: expected a JSON schema")
        return StructuredOutputsParams(json=self.json_schema.schema_)


class _Sampling(_Strict):
    """What completions and chats have in common."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Accepted and without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Extensions, as in vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None

    def common(self) -> dict[str, Any]:
        """The fields that are SamplingParams' own, as they were given."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: only with stream set to true")
        names = (
            "frequency_penalty",
            "logit_bias",
            "presence_penalty",
            "seed",
            "stop",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop_token_ids",
            "ignore_eos",
            "min_tokens",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "n",
        )
        return {name: getattr(self, name) for name in names}

    def structured(self) -> StructuredOutputsParams | None:
        if self.structured_outputs is not None and self.response_format is not None:
            raise RequestError("structured_outputs and response_format: give one of the two")
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        return None if self.response_format is None else self.response_format.params()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Sampling):
    """`POST /v1/completions`."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt: expected at least one prompt, found none")
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def sampling_params(self, loaded: LoadedModel) -> SamplingParams:
        if self.suffix:
            raise RequestError("suffix: not supported by this model")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of: only supported where it equals n")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs: expected 0 to 20, found {self.logprobs}")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return loaded.default_params(
            **self.common(),
            structured_outputs=self.structured(),
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            output_kind=RequestOutputKind.DELTA,
            max_tokens=max_tokens,
        )


class FunctionDefinition(_Strict):
    """A tool's name and the JSON schema of its arguments."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    """A tool's name."""

    name: str


class NamedToolChoice(_Strict):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def sampling_params(self, loaded: LoadedModel) -> SamplingParams:
        """The parameters; the grammar of structured outputs is left out (see `structured`)."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs: only with logprobs set to true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError("max_tokens and max_completion_tokens contradict each other")
        return loaded.default_params(
            **self.common(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            output_kind=RequestOutputKind.DELTA,
            max_tokens=limits.pop() if limits else None,
        )


class TokenizeRequest(_Strict):
    """`POST /tokenize`: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
