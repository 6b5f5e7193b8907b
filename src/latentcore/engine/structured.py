"""Answers that obey a grammar, through xgrammar.

A grammar is compiled once and kept; each choice has a matcher that knows which tokens may come
next, as one bit a token. Matchers of a step are asked while the model runs.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentcore.engine.sampling_params import StructuredOutputsParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import RequestError

if TYPE_CHECKING:
    import torch
    import xgrammar

MAX_GRAMMAR_CHARACTERS = 200_000
"""Longest schema, expression or grammar that is compiled."""

MAX_SCHEMA_DEPTH = 64
"""Deepest nesting of a JSON schema."""

_CACHE_BYTES = 256 << 20


class GrammarMatcher:
    """One choice's position in its grammar."""

    def __init__(self, matcher: "xgrammar.GrammarMatcher") -> None:
        self._matcher = matcher

    def fill(self, mask: "torch.Tensor") -> None:
        """Writes the tokens that may come next into `mask` (int32 [1, ceil(vocabulary / 32)])."""
        self._matcher.fill_next_token_bitmask(mask, 0)

    def accept(self, token_id: int) -> bool:
        """Moves on by a token; False where the grammar does not allow it."""
        accepted: bool = self._matcher.accept_token(token_id)
        return accepted

    @property
    def finished(self) -> bool:
        """Whether the grammar has ended, end token included."""
        terminated: bool = self._matcher.is_terminated()
        return terminated


class CompiledGrammar:
    """A grammar ready for use with one tokenizer."""

    def __init__(self, compiled: "xgrammar.CompiledGrammar", end_ids: Sequence[int]) -> None:
        self._compiled = compiled
        self._end_ids = list(end_ids)

    def check_can_start(self, vocab_size: int) -> None:
        """Raises RequestError where no token at all may come first."""
        mask = new_mask(vocab_size)
        self.matcher().fill(mask)
        if not mask.any():
            raise RequestError(
                "structured_outputs: the grammar cannot be compiled (nothing satisfies it)"
            )

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
        self._compiler: xgrammar.GrammarCompiler | None = None

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Compiles; RequestError for a grammar that cannot be."""
        with self._lock, _request_errors():
            compiled = CompiledGrammar(self._compile(params), self._end_ids)
            compiled.check_can_start(self._vocab_size)
            return compiled

    def compile_tool_call(self, options: Sequence[ToolCallGrammar]) -> CompiledGrammar:
        """A grammar for one tool call: one of `options`. RequestError if it cannot be compiled."""
        with self._lock, _request_errors():
            compiler = self._get_compiler()
            from xgrammar import Grammar

            grammars = []
            for option in options:
                _check_size("tools", option.schema)
                _check_depth(json.loads(option.schema))
                grammars.append(
                    Grammar.concat(
                        Grammar.from_ebnf(f"root ::= {_quoted(option.before)}"),
                        Grammar.from_json_schema(option.schema, any_whitespace=False),
                        Grammar.from_ebnf(f"root ::= {_quoted(option.after)}"),
                    )
                )
            whole = grammars[0] if len(grammars) == 1 else Grammar.union(*grammars)
            compiled = CompiledGrammar(compiler.compile_grammar(whole), self._end_ids)
            compiled.check_can_start(self._vocab_size)
            return compiled

    def _compile(self, params: StructuredOutputsParams) -> "xgrammar.CompiledGrammar":
        compiler = self._get_compiler()
        if params.json is not None:
            schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
            _check_size("json", schema)
            _check_depth(json.loads(schema))
            return compiler.compile_json_schema(schema, any_whitespace=False)
        if params.json_object:
            return compiler.compile_json_schema('{"type": "object"}', any_whitespace=False)
        if params.regex is not None:
            _check_size("regex", params.regex)
            return compiler.compile_regex(params.regex)
        if params.grammar is not None:
            _check_size("grammar", params.grammar)
            return compiler.compile_grammar(params.grammar)
        assert params.choice is not None
        alternatives = " | ".join(_quoted(choice) for choice in params.choice)
        _check_size("choice", alternatives)
        return compiler.compile_grammar(f"root ::= {alternatives}")

    def _get_compiler(self) -> "xgrammar.GrammarCompiler":
        if self._compiler is None:
            try:
                import xgrammar
            except ImportError:
                raise RequestError(
                    "structured_outputs: xgrammar is not installed; pip install "
                    "'latentcore[structured]'"
                ) from None

            vocabulary: list[Any] = [token or b"" for token in self._tokenizer.token_bytes]
            special = self._tokenizer.special_ids
            for token_id in special:
                vocabulary[token_id] = b""
            vocabulary += [b""] * (self._vocab_size - len(vocabulary))
            info = xgrammar.TokenizerInfo(
                vocabulary[: self._vocab_size],
                vocab_type=xgrammar.VocabType.RAW,
                vocab_size=self._vocab_size,
                stop_token_ids=self._end_ids,
            )
            self._compiler = xgrammar.GrammarCompiler(
                info, max_threads=1, cache_limit_bytes=_CACHE_BYTES
            )
        return self._compiler


def new_mask(vocab_size: int) -> "torch.Tensor":
    """A mask for one row: int32 [1, ceil(vocab_size / 32)]."""
    import torch

    return torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)


def _quoted(text: str) -> str:
    """A string literal of xgrammar's EBNF."""
    escaped = "".join(
        character
        if character.isascii() and character.isprintable() and character not in '"\\'
        else f"\\U{ord(character):08x}"
        for character in text
    )
    return f'"{escaped}"'


@contextlib.contextmanager
def _request_errors() -> Iterator[None]:
    """Turns what xgrammar raises over a grammar into a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except (RuntimeError, ValueError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"structured_outputs: the grammar cannot be compiled ({reason[:300]})"
        ) from None


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"structured_outputs.{name}: expected at most {MAX_GRAMMAR_CHARACTERS} characters, "
            f"found {len(text)}"
        )


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for item in level
            for child in (
                item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            )
        ]
        if not level:
            return
    raise RequestError(
        f"structured_outputs.json: expected at most {MAX_SCHEMA_DEPTH} levels of nesting"
    )
