"""From what a caller passes in to a request that is certain to fit, or a RequestError."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from latentcore.engine.sampling_params import SamplingParams
from latentcore.engine.structured import CompiledGrammar, GrammarCompiler
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import RequestError

_CHARACTERS_A_TOKEN = 16
"""More than real text has, on average."""


class TokensPrompt(TypedDict):
    """A prompt given by its token ids, taken as they are."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt given by its text."""

    prompt: str


Prompt = str | TokensPrompt | TextPrompt
"""One prompt: text, {"prompt": text} or {"prompt_token_ids": [...]}."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request must fit in. `cache_tokens` is what the whole latent cache holds."""

    vocab_size: int
    max_model_len: int
    cache_tokens: int


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request. `max_tokens` is resolved: prompt and output fit model and cache."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    grammar: CompiledGrammar | None = None
    grammar_after: int | None = None
    """The grammar holds from after this token on (the end of reasoning); None: from the start."""


class RequestPreparer:
    """Tokenizes and checks requests. Safe to use from several threads."""

    def __init__(
        self, limits: ModelLimits, tokenizer: Tokenizer | None, *, end_ids: Sequence[int]
    ) -> None:
        """`end_ids` are the model's end tokens."""
        self.limits = limits
        self.tokenizer = tokenizer
        self.grammars = (
            GrammarCompiler(tokenizer, vocab_size=limits.vocab_size, end_ids=end_ids)
            if tokenizer is not None
            else None
        )

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        add_begin: bool = True,
        grammar: CompiledGrammar | None = None,
        grammar_after: int | None = None,
    ) -> PreparedRequest:
        """Raises RequestError naming what does not fit, with the numbers.

        `add_begin`: text gets the model's begin token, if it wants one and the text has none.
        `grammar`: what the answer obeys, where the parameters' structured_outputs do not say.
        `grammar_after`: the grammar holds from after this token on.
        """
        text, token_ids = self.tokenize(prompt, add_begin=add_begin)
        limits = self.limits
        for name, ids in (("stop_token_ids", params.stop_tokens), ("logit_bias", params.biases)):
            for token_id in ids:
                if token_id >= limits.vocab_size:
                    raise RequestError(
                        f"{name}: expected token ids below {limits.vocab_size}, found {token_id}"
                    )
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                "stop: this model has no tokenizer, so stop strings cannot be found; use "
                "stop_token_ids"
            )
        max_tokens = self._max_tokens(len(token_ids), params)
        if params.structured_outputs is not None:
            if self.grammars is None:
                raise RequestError("structured_outputs: this model has no tokenizer")
            grammar = self.grammars.compile(params.structured_outputs)
        return PreparedRequest(text, token_ids, params, max_tokens, grammar, grammar_after)

    def tokenize(self, prompt: Prompt, *, add_begin: bool) -> tuple[str | None, list[int]]:
        """The prompt's text, where it was given, and its token ids, checked."""
        text: object
        if isinstance(prompt, Mapping):
            given = [key for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
            if len(given) != 1:
                raise RequestError(
                    "prompt: expected text, {'prompt': text} or {'prompt_token_ids': [...]}, "
                    f"found the keys {sorted(map(str, prompt))}"
                )
            if given == ["prompt_token_ids"]:
                return None, self._check_token_ids(prompt.get("prompt_token_ids"))
            text = prompt.get("prompt")
        else:
            text = prompt
        if not isinstance(text, str):
            raise RequestError(
                "prompt: expected text, {'prompt': text} or {'prompt_token_ids': [...]}, found "
                f"{type(text).__name__}"
            )
        if self.tokenizer is None:
            raise RequestError(
                "prompt: this model has no tokenizer files, so text cannot be read; pass "
                "{'prompt_token_ids': [...]}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt: not valid Unicode text ({error.reason})") from None
        self.refuse_endless(text)
        token_ids = self.tokenizer.encode(text, add_begin=add_begin)
        if not token_ids:
            raise RequestError("prompt: expected at least one token, found an empty text")
        return text, self._check_token_ids(token_ids)

    def refuse_endless(self, text: str) -> None:
        """Raises RequestError for a text whose beginning alone is too long, without reading on."""
        assert self.tokenizer is not None
        longest = self.limits.max_model_len
        head = text[: longest * _CHARACTERS_A_TOKEN]
        if len(head) == len(text):
            return
        # The cut may fall inside a word, which can then take a few tokens more.
        if len(self.tokenizer.encode(head, add_begin=False)) > longest + _CHARACTERS_A_TOKEN:
            raise RequestError(
                f"the prompt has {len(text)} characters and more than {longest} tokens, "
                f"max_model_len is {longest}; shorten the prompt or raise max_model_len"
            )

    def _check_token_ids(self, token_ids: object) -> list[int]:
        if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
            raise RequestError(
                f"prompt_token_ids: expected a list of token ids, found {type(token_ids).__name__}"
            )
        if not token_ids:
            raise RequestError("prompt_token_ids: expected at least one token, found none")
        self._check_length(len(token_ids))
        vocab_size = self.limits.vocab_size
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise RequestError(
                    f"prompt_token_ids: expected whole numbers, found {str(token_id)[:40]!r}"
                )
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"prompt_token_ids: expected ids from 0 to {vocab_size - 1}, found {token_id}"
                )
        return list(token_ids)

    def _check_length(self, prompt_tokens: int) -> None:
        limits = self.limits
        if prompt_tokens > limits.max_model_len:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, max_model_len is {limits.max_model_len}; "
                "shorten the prompt or raise max_model_len"
            )
        if prompt_tokens > limits.cache_tokens:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, the cache holds {limits.cache_tokens}; "
                "shorten the prompt or raise kv_cache_memory_bytes"
            )

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        limits = self.limits
        # The token generated last is never computed, so it takes no place in the cache.
        room = min(limits.max_model_len - prompt_tokens, limits.cache_tokens - prompt_tokens + 1)
        if params.max_tokens is None:
            if room < max(params.min_tokens, 1):
                raise RequestError(
                    f"the prompt has {prompt_tokens} tokens, which leaves room for {room} of "
                    f"max_model_len {limits.max_model_len}; shorten the prompt or raise it"
                )
            return room
        if params.max_tokens > room:
            if prompt_tokens + params.max_tokens > limits.max_model_len:
                limit = f"max_model_len is {limits.max_model_len}"
            else:
                limit = f"the cache holds {limits.cache_tokens}"
            raise RequestError(
                f"max_tokens: the prompt has {prompt_tokens} tokens and {params.max_tokens} more "
                f"are asked for, together {prompt_tokens + params.max_tokens}; {limit}, so "
                f"max_tokens can be at most {room}"
            )
        return params.max_tokens


def derive_seed(seed: int, number: int) -> int:
    """The seed of a request's choice number `number`; 64 bits, unrelated for close inputs."""
    data = seed.to_bytes(16, "little", signed=True) + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
