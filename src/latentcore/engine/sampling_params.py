"""How the tokens of a request are chosen and when it ends. Names and meanings are vLLM's."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from latentcore.errors import RequestError

MAX_CHOICES = 128
"""Largest `n`: choices of one request."""

MAX_LOGPROBS = 128
"""Largest number of alternatives reported at one position."""

MAX_TOKEN_IDS = 1 << 18
"""Entries of logit_bias and stop_token_ids: more than any vocabulary has."""

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARACTERS = 4096
_INT32_MAX = 2**31 - 1
_SEED_LIMIT = 2**63


class RequestOutputKind(Enum):
    """What each output of a streamed request holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the last output."""
    FINAL_ONLY = 2
    """One output, at the end."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Restricts the answer to a grammar. Exactly one of the fields is set.

    `json`: a JSON schema, as a dict or as text. `regex`: a regular expression that the whole
    answer matches. `choice`: the answer is one of these strings. `grammar`: an EBNF grammar with
    the start rule `root`. `json_object`: any JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [field.name for field in dataclasses.fields(self) if self._is_set(field.name)]
        if len(given) != 1:
            found = ", ".join(given) if given else "none"
            raise RequestError(
                "structured_outputs: expected exactly one of json, regex, choice, grammar, "
                f"json_object; found {found}"
            )
        if self.json is not None:
            schema: object = self.json
            if isinstance(schema, str):
                try:
                    schema = json.loads(schema)
                except ValueError as error:
                    raise RequestError(
                        f"structured_outputs.json: not a JSON document ({error})"
                    ) from None
            if not isinstance(schema, Mapping | bool):
                raise RequestError(
                    "structured_outputs.json: expected a JSON schema (an object), found "
                    f"{type(schema).__name__}"
                )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(
                    f"structured_outputs.{name}: expected a string that is not empty, found "
                    f"{_shown(value)}"
                )
        if self.choice is not None:
            choices = self.choice
            if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
                raise RequestError(
                    "structured_outputs.choice: expected a list of strings, found "
                    f"{_shown(choices)}"
                )
            for item in choices:
                if not isinstance(item, str) or not item:
                    raise RequestError(
                        "structured_outputs.choice: expected strings that are not empty, found "
                        f"{_shown(item)}"
                    )

    def _is_set(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters; every field is checked when it is made.

    n: number of choices. presence_penalty, frequency_penalty (-2 to 2): subtracted from the logits
    of generated tokens, once and per occurrence. repetition_penalty (> 0): divides positive and
    multiplies negative logits of tokens of prompt and output. temperature: 0 is greedy. top_p in
    (0, 1]. top_k: 0 or -1 considers all tokens. min_p in [0, 1]: least probability relative to the
    likeliest token. seed: the same request with the same seed gives the same tokens. stop: strings
    that end the answer, left out of it unless include_stop_str_in_output. stop_token_ids: tokens
    that end it. ignore_eos: go on after the model's end tokens. max_tokens: None is as many as
    fit. min_tokens: end tokens and stops count only after so many. logprobs: number of
    alternatives reported for each generated token (0: the token's own alone). prompt_logprobs: the
    same for the prompt's tokens. detokenize: make text (stop strings need it).
    skip_special_tokens: leave special tokens out of the text. logit_bias: token id to a number
    added to its logit. structured_outputs: a grammar that the answer obeys.

    Raises RequestError naming the parameter, what was expected and what was found.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        _check_real("temperature", self.temperature, 0.0, 100.0)
        _check_real("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_int("top_k", self.top_k, -1, _INT32_MAX)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -_SEED_LIMIT, _SEED_LIMIT - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, _INT32_MAX)
        _check_int("min_tokens", self.min_tokens, 0, _INT32_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: expected at most max_tokens ({self.max_tokens}), found "
                f"{self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            _check_bool(name, getattr(self, name))
        _check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop: stop strings need detokenize=True; use stop_token_ids instead"
            )
        object.__setattr__(
            self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids)
        )
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        structured = self.structured_outputs
        if structured is not None and not isinstance(structured, StructuredOutputsParams):
            raise RequestError(
                "structured_outputs: expected a StructuredOutputsParams, found "
                f"{_shown(structured)}"
            )
        if structured is not None and self.min_tokens:
            raise RequestError(
                "min_tokens: cannot be combined with structured_outputs, whose grammar decides "
                "when the answer ends"
            )
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError(
                f"output_kind: expected a RequestOutputKind, found {_shown(self.output_kind)}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    @property
    def biases(self) -> Mapping[int, float]:
        assert self.logit_bias is not None
        return self.logit_bias

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false, found {_shown(value)}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}: expected a whole number, found {_shown(value)}")
    if not low <= value <= high:
        limits = f"from {low} to {high}" if high < _INT32_MAX else f"of at least {low}"
        raise RequestError(f"{name}: expected a whole number {limits}, found {value}")


def _check_real(
    name: str, value: object, low: float, high: float, *, above_low: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}: expected a number, found {_shown(value)}")
    inside = math.isfinite(value) and low <= value <= high and not (above_low and value == low)
    if not inside:
        start = f"above {low:g}" if above_low else f"from {low:g}"
        to = f"up to {high:g}" if above_low else f"to {high:g}"
        raise RequestError(f"{name}: expected a number {start} {to}, found {value}")


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence):
        raise RequestError(f"stop: expected a string or a list of strings, found {_shown(value)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop: expected at most {MAX_STOP_STRINGS} strings, found {len(strings)}"
        )
    for item in strings:
        if not isinstance(item, str) or not item:
            raise RequestError(f"stop: expected strings that are not empty, found {_shown(item)}")
        if len(item) > MAX_STOP_STRING_CHARACTERS:
            raise RequestError(
                f"stop: expected strings of at most {MAX_STOP_STRING_CHARACTERS} characters, "
                f"found one of {len(item)}"
            )
    return tuple(strings)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(f"{name}: expected a list of token ids, found {_shown(value)}")
    _check_count(name, len(value))
    for item in value:
        _check_int(name, item, 0, _INT32_MAX)
    return tuple(value)


def _check_count(name: str, count: int) -> None:
    if count > MAX_TOKEN_IDS:
        raise RequestError(f"{name}: expected at most {MAX_TOKEN_IDS} token ids, found {count}")


def _logit_bias(value: object) -> Mapping[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias: expected a mapping of token ids to numbers, found {_shown(value)}"
        )
    _check_count("logit_bias", len(value))
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
            key = int(key)
        _check_int("logit_bias", key, 0, _INT32_MAX)
        _check_real("logit_bias", bias, -100.0, 100.0)
        biases[key] = float(bias)
    return biases
