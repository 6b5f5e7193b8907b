"""A checkpoint's tokenizer, read as data: `tokenizer.json` or `tiktoken.model`. No code is run.

Python files and `auto_map` entries that checkpoints carry are ignored.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentcore.engine.detokenizer import ByteDetokenizer, Detokenizer, StreamDetokenizer
from latentcore.errors import CheckpointError
from latentcore.files import JsonError, parse_json_object

if TYPE_CHECKING:
    import tokenizers

_TIKTOKEN_RESERVED = 256
"""Ids above the base vocabulary that Moonlight's and Kimi's tokenizers set aside."""

_TIKTOKEN_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        ),
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        ),
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Moonlight's and Kimi's tokenizers cut text into pieces; the file holds the ranks alone."""

_TIKTOKEN_SLICE = 25_000
"""Longest piece of text without a change between space and other that tiktoken is given."""


class _Backend(Protocol):
    """What the two kinds of tokenizer files have in common."""

    vocab_size: int
    special_ids: frozenset[int]
    token_bytes: list[bytes | None]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer: ...

    def token_id(self, token: str) -> int | None: ...

    def begin_ids(self) -> list[int]: ...


class Tokenizer:
    """Text to token ids and back, with the checkpoint's own begin and end tokens.

    `chat_templates` maps names to template sources ("default" where there is but one).
    """

    def __init__(
        self, backend: _Backend, config: Mapping[str, Any], chat_templates: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self.chat_templates = dict(chat_templates)
        self.special_tokens = _named_special_tokens(config)
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        named = (self._id_of(token) for token in self.special_tokens.values())
        self.special_ids = backend.special_ids | {i for i in named if i is not None}
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            self._begin = backend.begin_ids()
        elif add_bos and self.bos_token_id is not None:
            self._begin = [self.bos_token_id]
        else:
            self._begin = []

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer | None":
        """The tokenizer in a model folder, or None where there is none.

        Raises CheckpointError for files that are there but cannot be read.
        """
        config = _read_json_object(model_dir / "tokenizer_config.json")
        backend: _Backend
        if (model_dir / "tokenizer.json").is_file():
            backend = _JsonBackend(model_dir / "tokenizer.json", config)
        elif (model_dir / "tiktoken.model").is_file():
            backend = _TiktokenBackend(model_dir / "tiktoken.model", config)
        else:
            return None
        return cls(backend, config, _chat_templates(model_dir, config))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self._backend.vocab_size

    @property
    def token_bytes(self) -> Sequence[bytes | None]:
        """Every token's bytes by id; None for ids without a token."""
        return self._backend.token_bytes

    def encode(self, text: str, *, add_begin: bool) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognized.

        `add_begin` puts the begin token in front if the model wants one and the text has none.
        """
        token_ids = self._backend.encode(text)
        begin = self._begin
        if add_begin and begin and token_ids[: len(begin)] != begin:
            return [*begin, *token_ids]
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh incremental decoder."""
        return self._backend.detokenizer(skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token's text on its own; U+FFFD stands for a part of a character."""
        data = self.bytes_of(token_id)
        return data.decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """One token's bytes; empty for ids without a token."""
        table = self._backend.token_bytes
        return (table[token_id] if token_id < len(table) else None) or b""

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its spelling, None where the vocabulary lacks it."""
        return self._backend.token_id(token)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_id(token)


class _JsonBackend:
    """`tokenizer.json`, through the tokenizers library."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"not a readable tokenizer ({error})", where=str(path)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._byte_level = _is_byte_level(self._tokenizer)
        self.token_bytes: list[bytes | None] = [None] * self.vocab_size
        spell = _byte_level_bytes if self._byte_level else _plain_bytes
        for token, token_id in vocab.items():
            self.token_bytes[token_id] = spell(token)

    def encode(self, text: str) -> list[int]:
        # As a batch of one: unlike `encode`, it lets other threads run, the engine's among them.
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        token_ids: list[int] = found.ids
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        (text,) = self._tokenizer.decode_batch(
            [list(token_ids)], skip_special_tokens=skip_special_tokens
        )
        return str(text)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        if self._byte_level:
            hidden = self.special_ids if skip_special_tokens else frozenset[int]()
            return ByteDetokenizer(self.token_bytes, hidden)
        return StreamDetokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def begin_ids(self) -> list[int]:
        """What the file's own post-processor puts in front of every text."""
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        bare = self.encode("a")
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []


class _TiktokenBackend:
    """`tiktoken.model`, the ranks of a byte-pair vocabulary, as Moonlight and Kimi-K2 publish.

    Special tokens come from `added_tokens_decoder` in `tokenizer_config.json`; the reserved ids
    that it does not name get names of their own.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        import tiktoken

        ranks = _read_tiktoken_ranks(path)
        base = len(ranks)
        added = _added_tokens(config, path)
        special = {i: f"<|reserved_token_{i}|>" for i in range(base, base + _TIKTOKEN_RESERVED)}
        special |= {i: content for i, (content, _) in added.items()}
        taken = [i for i in special if i < base]
        if taken or len(set(special.values())) != len(special):
            raise CheckpointError(
                "added_tokens_decoder names a token twice, or an id below the "
                f"{base} of {path.name}",
                where=str(path.with_name("tokenizer_config.json")),
            )
        self._ids = {content: i for i, content in special.items()}
        self.special_ids = frozenset(i for i in special if i not in added or added[i][1])
        self.vocab_size = max(special) + 1
        self.token_bytes: list[bytes | None] = [None] * self.vocab_size
        for token, rank in ranks.items():
            self.token_bytes[rank] = token
        for i, content in special.items():
            self.token_bytes[i] = content.encode()
        self._encoding: tiktoken.Encoding = tiktoken.Encoding(
            name=path.name,
            pat_str=_TIKTOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._ids,
        )

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = []
        for piece in _slices(text, _TIKTOKEN_SLICE):
            token_ids += self._encoding.encode(piece, allowed_special="all")
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        pieces = (
            self.token_bytes[i] or b"" for i in token_ids if i not in hidden and i < self.vocab_size
        )
        return b"".join(pieces).decode("utf-8", errors="replace")

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        return ByteDetokenizer(self.token_bytes, hidden)

    def token_id(self, token: str) -> int | None:
        special = self._ids.get(token)
        if special is not None:
            return special
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def begin_ids(self) -> list[int]:
        return []


def _is_byte_level(tokenizer: "tokenizers.Tokenizer") -> bool:
    """Whether the decoder is ByteLevel and nothing else, so that tokens are byte strings."""
    spec = json.loads(tokenizer.to_str()).get("decoder") if tokenizer.decoder else None
    return spec is not None and spec.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return alphabet


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A byte-level token's bytes. One that is not spelled in the alphabet stands for itself."""
    try:
        return bytes([_BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _plain_bytes(token: str) -> bytes:
    return token.encode()


def _read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"line {number}: expected a token in base64 and its rank, found {line[:40]!r}",
                where=str(path),
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise CheckpointError("expected the ranks 0, 1, 2, ... each once", where=str(path))
    return ranks


def _added_tokens(config: Mapping[str, Any], path: Path) -> dict[int, tuple[str, bool]]:
    """`added_tokens_decoder`: id to (spelling, whether it is special)."""
    found: dict[int, tuple[str, bool]] = {}
    entries = config.get("added_tokens_decoder") or {}
    try:
        for key, entry in entries.items():
            found[int(key)] = (str(entry["content"]), bool(entry.get("special", True)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            "added_tokens_decoder: expected ids with {content, special}",
            where=str(path.with_name("tokenizer_config.json")),
        ) from None
    return found


def _slices(text: str, longest: int) -> Iterable[str]:
    """Cuts `text` where a run without a change between space and other grows beyond `longest`."""
    start = 0
    run = 0
    was_space: bool | None = None
    for position, character in enumerate(text):
        is_space = character.isspace()
        run = run + 1 if is_space == was_space else 1
        was_space = is_space
        if run > longest:
            yield text[start:position]
            start, run = position, 1
    if start < len(text):
        yield text[start:]


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, as strings. They are written plainly or as {"content": ...}."""
    named: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            named[key] = value
    return named


def _chat_templates(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"not UTF-8 ({error})", where=str(path)) from None
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {
            str(entry["name"]): str(entry["template"])
            for entry in found
            if isinstance(entry, Mapping) and "name" in entry and "template" in entry
        }
    return {}


def _read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file's object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes())
    except JsonError as error:
        raise CheckpointError(str(error), where=str(path)) from None
