"""Answers that obey a grammar, through xgrammar.

A grammar is compiled once, in a process of its own, and kept; each choice has a matcher that knows
which tokens may come next, as one bit a token. Matchers of a step are asked while the model runs.
"""

import contextlib
import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentcore.engine.grammar_worker import GrammarWorker, quoted
from latentcore.engine.json_schema import check_schema
from latentcore.engine.sampling_params import StructuredOutputsParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import LatentcoreError, RequestError

if TYPE_CHECKING:
    import torch
    import xgrammar

MAX_GRAMMAR_CHARACTERS = 200_000
"""Longest schema, expression or grammar that is compiled."""

_CACHE_ENTRIES = 256
_CACHE_BYTES = 256 << 20
_SECONDS_FREE = 1.0
_SECONDS_A_TOKEN = 0.05

_worker = GrammarWorker()
_numbers = itertools.count()


class GrammarError(LatentcoreError):
    """An answer cannot go on within its grammar; only its own request fails."""


class GrammarDeadEndError(GrammarError):
    """A request's grammar has come to a place that nothing can follow."""


class GrammarTooSlowError(GrammarError):
    """Working out what a request's grammar allows would hold everyone else up."""


class GrammarMatcher:
    """One choice's position in its grammar."""

    def __init__(self, matcher: "xgrammar.GrammarMatcher") -> None:
        self._matcher = matcher
        self._seconds = 0.0
        self._tokens = 0

    def fill(self, mask: "torch.Tensor") -> None:
        """Writes the tokens that may come next into `mask` (int32 [1, ceil(vocabulary / 32)])."""
        with self._timed():
            self._matcher.fill_next_token_bitmask(mask, 0)

    def accept(self, token_id: int) -> None:
        """Moves on by a token.

        Raises GrammarDeadEndError where the grammar does not allow it, and GrammarTooSlowError
        for a grammar that takes more processor time than a step may be held up for.
        """
        with self._timed():
            accepted: bool = self._matcher.accept_token(token_id)
        self._tokens += 1
        if not accepted:
            raise GrammarDeadEndError("no token continues this answer within its grammar")
        if self._seconds > _SECONDS_FREE + _SECONDS_A_TOKEN * self._tokens:
            raise GrammarTooSlowError(
                f"this grammar took {self._seconds:.1f} s for {self._tokens} tokens, which is too "
                "slow to use; write it with fewer alternatives"
            )

    @property
    def finished(self) -> bool:
        """Whether the grammar has ended, end token included."""
        terminated: bool = self._matcher.is_terminated()
        return terminated

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        # Processor time: on a busy machine a quick grammar may wait for long.
        start = time.thread_time()
        yield
        self._seconds += time.thread_time() - start


class CompiledGrammar:
    """A grammar ready for use with one tokenizer."""

    def __init__(self, compiled: "xgrammar.CompiledGrammar", end_ids: Sequence[int]) -> None:
        self._compiled = compiled
        self._end_ids = list(end_ids)

    @property
    def memory_bytes(self) -> int:
        """Memory that the grammar takes, in bytes."""
        size: int = self._compiled.memory_size_bytes
        return size

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start of the grammar."""
        import xgrammar

        return GrammarMatcher(
            xgrammar.GrammarMatcher(
                self._compiled,
                override_stop_tokens=self._end_ids or None,
                terminate_without_stop_token=not self._end_ids,
            )
        )


@dataclass(frozen=True, slots=True)
class ToolCallGrammar:
    """A tool call: fixed text, arguments that fit a JSON schema (as text), fixed text."""

    before: str
    schema: str
    after: str


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Sequence[int]) -> None:
        """`vocab_size` is the width of the logits, which may exceed the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._number = next(_numbers)
        self._info: xgrammar.TokenizerInfo | None = None
        self._info_text = ""
        self._cache: OrderedDict[str, CompiledGrammar | RequestError] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Compiles; RequestError for a grammar that cannot be. May take seconds."""
        if params.json is not None:
            schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
            _check_size("json", schema)
            check_schema(json.loads(schema), "structured_outputs.json")
            return self._compiled("json", schema)
        if params.json_object:
            return self._compiled("json", '{"type": "object"}')
        if params.regex is not None:
            _check_size("regex", params.regex)
            return self._compiled("regex", params.regex)
        if params.grammar is not None:
            _check_size("grammar", params.grammar)
            return self._compiled("ebnf", params.grammar)
        assert params.choice is not None
        alternatives = " | ".join(quoted(choice) for choice in params.choice)
        _check_size("choice", alternatives)
        return self._compiled("ebnf", f"root ::= {alternatives}")

    def compile_tool_calls(
        self, options: Sequence[ToolCallGrammar], *, separator: str | None, end: str
    ) -> CompiledGrammar:
        """A grammar for tool calls, each one of `options`, and then `end`, which may be left out.

        `separator` stands between calls; None allows one call only. RequestError for schemas that
        cannot be compiled. May take seconds.
        """
        for option in options:
            _check_size("tools", option.schema)
            check_schema(json.loads(option.schema), "tools")
        calls = {
            "options": [
                {"before": option.before, "schema": option.schema, "after": option.after}
                for option in options
            ],
            "separator": separator,
            "end": end,
        }
        return self._compiled("tool_calls", calls)

    def _compiled(self, kind: str, text: Any) -> CompiledGrammar:
        """Out of the cache, which knows what cannot be compiled too, or newly compiled."""
        key = json.dumps([kind, text])
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return _unless_refused(self._cache[key])
            info = self._tokenizer_info()
        found: CompiledGrammar | RequestError
        try:
            written = _worker.compile(self._number, self._info_text, {"kind": kind, "text": text})
        except RequestError as error:
            found = error
        else:
            import xgrammar

            compiled = xgrammar.CompiledGrammar.deserialize_json(written, info)
            found = CompiledGrammar(compiled, self._end_ids)
        with self._lock:
            self._cache[key] = found
            self._trim()
        return _unless_refused(found)

    def _trim(self) -> None:
        sizes = [
            entry.memory_bytes if isinstance(entry, CompiledGrammar) else 0
            for entry in self._cache.values()
        ]
        total = sum(sizes)
        for size in sizes[:-1]:
            if len(self._cache) <= _CACHE_ENTRIES and total <= _CACHE_BYTES:
                return
            self._cache.popitem(last=False)
            total -= size

    def _tokenizer_info(self) -> "xgrammar.TokenizerInfo":
        if self._info is None:
            _worker.start()
            try:
                import xgrammar
            except ImportError:
                raise RequestError(
                    "structured_outputs: xgrammar is not installed; pip install "
                    "'latentcore[structured]'"
                ) from None

            vocabulary: list[Any] = [token or b"" for token in self._tokenizer.token_bytes]
            for token_id in self._tokenizer.special_ids:
                vocabulary[token_id] = b""
            vocabulary += [b""] * (self._vocab_size - len(vocabulary))
            self._info = xgrammar.TokenizerInfo(
                vocabulary[: self._vocab_size],
                vocab_type=xgrammar.VocabType.RAW,
                vocab_size=self._vocab_size,
                stop_token_ids=self._end_ids,
            )
            self._info_text = self._info.serialize_json()
        return self._info


def close() -> None:
    """Ends the process that compiles, whatever it does; the next grammar starts another."""
    _worker.close()


def new_mask(vocab_size: int) -> "torch.Tensor":
    """A mask for one row: int32 [1, ceil(vocab_size / 32)]."""
    import torch

    return torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)


def _unless_refused(found: CompiledGrammar | RequestError) -> CompiledGrammar:
    if isinstance(found, RequestError):
        raise RequestError(str(found))
    return found


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"structured_outputs.{name}: expected at most {MAX_GRAMMAR_CHARACTERS} characters, "
            f"found {len(text)}"
        )
