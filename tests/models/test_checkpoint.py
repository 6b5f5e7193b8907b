"""Safetensors files as published, damaged, and crafted to harm."""

import itertools
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CONFIGS,
    Entry,
    Sparse,
    header_bytes,
    random_tensors,
    raw_header,
    tensor_list,
    tiny_config,
    write_checkpoint,
    write_tensors,
)

from latentcore.errors import CheckpointError
from latentcore.models.checkpoint import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    Checkpoint,
    parse_header,
    read_header,
)

TINY = tiny_config()


def problems_of(path: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert caught.value.problems
    return caught.value.problems


def one_problem(path: Path, *parts: str) -> None:
    problems = problems_of(path)
    assert len(problems) == 1, problems
    for part in parts:
        assert part in problems[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = random_tensors(tensor_list(TINY, "fp8"))
    return write_checkpoint(tmp_path / "model", TINY, tensors, shards=3)


# ---------------------------------------------------------------------------------------------
# Sound files


@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("shards", [1, 4])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, fmt: str, shards: int) -> None:
    tensors = random_tensors(tensor_list(TINY, fmt))
    write_checkpoint(tmp_path, TINY, tensors, shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        assert len(checkpoint.shards) == shards
        for name, expected in tensors.items():
            info = checkpoint.tensors[name]
            found = checkpoint.tensor(name)
            assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
            assert info.nbytes == expected.nbytes
            assert found.dtype is expected.dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, expected in tensors.items():
            assert torch.equal(checkpoint.tensor(name), expected)


def test_our_writer_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = random_tensors(tensor_list(TINY, "bf16"))
    write_tensors(tmp_path / "model.safetensors", tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_data_is_mapped_not_copied(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors["lm_head.weight"]
    data = checkpoint.tensor("lm_head.weight")
    before = data[0, 0].item()
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(torch.tensor([before + 2.0]).bfloat16().view(torch.uint8).numpy().tobytes())
    assert data[0, 0].item() != before


def test_prefetch_and_release_keep_the_data(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.tensors:
        checkpoint.prefetch(name)
        data = checkpoint.tensor(name)
        copy = data.clone()
        checkpoint.release(name)
        assert torch.equal(data.view(torch.uint8), copy.view(torch.uint8))


def test_tensors_outlive_the_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    data = checkpoint.tensor("model.norm.weight")
    copy = data.clone()
    checkpoint.close()
    assert torch.equal(data, copy)


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    tensors = {"odd": torch.arange(3, dtype=torch.int8), "wide": torch.randn(4)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["wide"].offset % 4 == 3
        found = checkpoint.tensor("wide")
        assert torch.equal(found, tensors["wide"])
        assert found.data_ptr() % 4 == 0


def test_shards_without_an_index_are_joined(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    assert len(Checkpoint.open(folder).shards) == 3


def test_one_file_wins_over_others_without_an_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    write_tensors(folder / "model.safetensors", {"only": torch.zeros(2)})
    assert list(Checkpoint.open(folder).tensors) == ["only"]


class Work:
    """What is read and called inside the block: the same however busy the machine is."""

    reads = bytes = calls = 0

    def __enter__(self) -> "Work":
        self._before = self._io()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        after = self._io()
        self.reads = after["syscr"] - self._before["syscr"]
        self.bytes = after["rchar"] - self._before["rchar"]

    def _note(self, _frame: object, event: str, _argument: object) -> None:
        self.calls += event in ("call", "c_call")

    @staticmethod
    def _io() -> dict[str, int]:
        lines = Path("/proc/self/io").read_text().splitlines()
        return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def test_ninety_thousand_tensors_take_no_more_each_than_a_few(tmp_path: Path) -> None:
    """How long it takes is measured by benchmarks/preflight.py."""
    few = Sparse.plan(TINY, tensor_list(TINY, "fp8"), 3)
    few.write(tmp_path / "few")
    many = Sparse.plan(CONFIGS["v3"], tensor_list(CONFIGS["v3"], "fp8"), 163)
    many.write(tmp_path / "many")
    with Work() as small, Checkpoint.open(tmp_path / "few") as checkpoint:
        each = small.calls / len(checkpoint.tensors)
    with Work() as large:
        checkpoint = Checkpoint.open(tmp_path / "many")
    assert len(checkpoint.tensors) == 91_991
    assert len(checkpoint.shards) == 163
    assert large.calls / 91_991 <= each
    headers = sum(8 + len(read_header(file)[0]) for file in checkpoint.shards)
    index = (tmp_path / "many" / INDEX_NAME).stat().st_size
    # Each header and the index once, in whole buffers, in a few calls a file.
    assert large.bytes < headers + index + 164 * (128 << 10) + 4096
    assert large.reads < 164 * 10


# ---------------------------------------------------------------------------------------------
# The index and the folder


def test_no_weights(tmp_path: Path) -> None:
    one_problem(tmp_path / "absent", "no such model folder")
    one_problem(tmp_path, "no weights: expected", "model.safetensors")
    (tmp_path / "model.gguf").touch()
    one_problem(tmp_path, "no weights: expected", "found model.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    one_problem(tmp_path, name, "pickled weights can run code", "safetensors release")


def _edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    edit(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_index_of_pickles_is_refused(folder: Path) -> None:
    _edit_index(folder, lambda table: table.update(dict.fromkeys(table, "pytorch_model.bin")))
    one_problem(folder, "pytorch_model.bin", "convert them to safetensors")


def test_index_names_a_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    one_problem(folder, "model-00002-of-00003.safetensors: no such file", "download it again")


def test_index_points_elsewhere(folder: Path) -> None:
    def swap(table: dict[str, str]) -> None:
        assert table["lm_head.weight"] == "model-00003-of-00003.safetensors"
        table["lm_head.weight"] = "model-00001-of-00003.safetensors"

    _edit_index(folder, swap)
    one_problem(
        folder, "lm_head.weight", "expected in model-00001", "found in model-00003-of-00003"
    )


def test_index_promises_a_tensor_that_is_nowhere(folder: Path) -> None:
    _edit_index(folder, lambda t: t.update(extra="model-00001-of-00003.safetensors"))
    one_problem(folder, "tensor extra: expected in model-00001", "found nowhere")


def test_tensor_in_two_shards(folder: Path) -> None:
    write_tensors(folder / "model-00009.safetensors", {"model.norm.weight": torch.zeros(72)})
    _edit_index(folder, lambda t: t.update(other="model-00009.safetensors"))
    problems = problems_of(folder)
    assert any(
        "tensor model.norm.weight: stands twice" in p and "model-00009" in p for p in problems
    )


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "./model.safetensors",
        "a\0.safetensors",
    ],
)
def test_paths_in_the_index_stay_in_the_folder(folder: Path, name: str) -> None:
    write_tensors(folder.parent / "model.safetensors", {"model.norm.weight": torch.zeros(72)})
    _edit_index(folder, lambda t: t.update({"model.norm.weight": name}))
    problems = problems_of(folder)
    expected = ("expected the name of a file in this folder", "expected *.safetensors files")
    assert any(part in p for p in problems for part in expected)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    one_problem(folder, "model-00002", "a link that leads out of the model's folder")
    shard.unlink()
    shard.symlink_to(folder.parent / "dangling")
    one_problem(folder, "model-00002", "no such file")
    shard.unlink()
    inside = folder / "data"
    outside.rename(inside)
    shard.symlink_to("data")
    assert len(Checkpoint.open(folder).shards) == 3


def test_links_into_the_hugging_face_blobs_are_followed(folder: Path) -> None:
    blobs = folder.parent / "models--o--n" / "blobs"
    snapshot = folder.parent / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(Checkpoint.open(snapshot).shards) == 3


def test_devices_and_pipes_are_refused_without_hanging(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    one_problem(folder, "expected a plain file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', '"a" stands twice'),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
        ('{"weight_map": []}', "weight_map: expected an object"),
        ('{"weight_map": {}}', "weight_map: expected an object"),
        ('{"weight_map": {"a": 3}}', "found the number 3"),
        ('{"weight_map": {"a": {"b": 1}}}', "found an object"),
    ],
)
def test_damaged_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    assert any(message in problem for problem in problems_of(folder))


def test_all_problems_of_all_shards_are_listed(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"xx")
    problems = problems_of(folder)
    assert any("model-00001" in p and "no such file" in p for p in problems)
    assert any("model-00002" in p and "at least 8 bytes" in p for p in problems)


# ---------------------------------------------------------------------------------------------
# Headers


def _single(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


GOOD = {"a": Entry("F32", (2, 3)), "b": Entry("BF16", (4,))}
GOOD_DATA = bytes(32)


def _header(**changes: Any) -> dict[str, Any]:
    return {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        **changes,
    }


def test_the_unchanged_header_is_good(tmp_path: Path) -> None:
    assert len(Checkpoint.open(_single(tmp_path, raw_header(_header()) + GOOD_DATA)).tensors) == 2


def _b(**changes: Any) -> dict[str, Any]:
    return _header(b={"dtype": "BF16", "shape": [4], "data_offsets": [24, 32], **changes})


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "unknown-dtype": (_b(dtype="Q4"), "dtype: expected one of F64, F32"),
    "dtype-number": (_b(dtype=3), "dtype: expected one of"),
    "dtype-list": (_b(dtype=["F32"]), "dtype: expected one of"),
    "shape-text": (_b(shape="4"), "shape: expected a list"),
    "shape-negative": (_b(shape=[-4]), "shape: expected a list"),
    "shape-bool": (_b(shape=[True, 4]), "shape: expected a list"),
    "shape-float": (_b(shape=[4.0]), "shape: expected a list"),
    "shape-overflow": (_b(shape=[1 << 63]), "shape: expected a list"),
    "shape-product": (_b(shape=[1 << 62, 1 << 62]), "data_offsets: expected"),
    "shape-product-wraps-to-4": (_b(shape=[1 << 32, 1 << 32, 1]), "data_offsets: expected"),
    "shape-long": (_b(shape=[1] * 4000), "found 4000 entries"),
    "size-mismatch": (_b(shape=[5]), "expected 10 bytes for BF16 [5], found 8"),
    "offsets-swapped": (_b(data_offsets=[32, 24]), "data_offsets: expected a begin and an end"),
    "offsets-negative": (_b(data_offsets=[-8, 0]), "data_offsets: expected a begin and an end"),
    "offsets-three": (_b(data_offsets=[24, 32, 40]), "data_offsets: expected a begin and an end"),
    "offsets-float": (_b(data_offsets=[24.0, 32.0]), "data_offsets: expected a begin and an end"),
    "offsets-huge": (
        _b(data_offsets=[(1 << 64) - 8, 1 << 64]),
        "data_offsets: expected a begin and an end",
    ),
    "outside": (_b(data_offsets=[1024, 1032]), "leaves a hole"),
    "overlap": (_b(data_offsets=[16, 24]), "overlaps the tensor before it"),
    "same-place": (_b(shape=[12], data_offsets=[0, 24]), "overlaps the tensor before it"),
    "extra-key": (_b(extra=1), "expected the keys dtype, shape and data_offsets"),
    "not-object": (_header(b=[1, 2]), "expected an object, found a list"),
    "metadata": (_header(__metadata__={"a": 1}), "__metadata__: expected an object of texts"),
    "metadata-list": (_header(__metadata__=[]), "__metadata__: expected an object of texts"),
    "list": ([1, 2], "expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_named(tmp_path: Path, name: str) -> None:
    header, message = BAD_HEADERS[name]
    problems = problems_of(_single(tmp_path, raw_header(header) + GOOD_DATA))
    assert message in problems[0]


def test_missing_key_in_an_entry(tmp_path: Path) -> None:
    header = _header()
    del header["b"]["shape"]
    one_problem(_single(tmp_path, raw_header(header) + GOOD_DATA), "tensor b: expected the keys")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least 8 bytes, found 0"),
        (b"1234567", "expected at least 8 bytes, found 7"),
        (struct.pack("<Q", 0), "expected a JSON object"),
        (struct.pack("<Q", 1) + b"{", "not valid JSON"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header length: expected at most 2 bytes"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header length"),
        (struct.pack("<Q", 3) + b"[1]", "expected a JSON object"),
        (struct.pack("<Q", 400_000) + b'{"a":' * 80_000, "nested too deeply"),
        (raw_header(_header())[:40], "header length"),
        (b"PK\x03\x04" + bytes(100), "header length"),
    ],
)
def test_damaged_beginnings(tmp_path: Path, data: bytes, message: str) -> None:
    one_problem(_single(tmp_path, data), message)


def test_header_above_the_formats_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES + 1000)
    one_problem(tmp_path, f"header length: expected at most {MAX_HEADER_BYTES}")


def test_duplicate_tensor_in_one_header(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},' * 1
    text += b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
    data = struct.pack("<Q", len(text)) + text + b"\0"
    one_problem(_single(tmp_path, data), 'the key "a" stands twice')


def test_truncated_and_lengthened_files(tmp_path: Path) -> None:
    data = header_bytes(GOOD) + GOOD_DATA
    one_problem(
        _single(tmp_path, data[:-1]), "the file is cut off", "tensor that is cut is b", "download"
    )
    one_problem(_single(tmp_path, data + b"x"), "bytes by its header")


def test_names_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    name = "\x1b[2J\ud800" + "x" * 500
    header = {name: {"dtype": "Q", "shape": [1], "data_offsets": [0, 1]}}
    problem = problems_of(_single(tmp_path, raw_header(header) + b"\0"))[0]
    assert problem.isprintable()
    assert len(problem) < 500
    problem.encode()


# ---------------------------------------------------------------------------------------------
# Fingerprint


def test_fingerprint_follows_the_content(folder: Path) -> None:
    first = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == first
    shard = folder / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    second = Checkpoint.open(folder).fingerprint()
    assert second != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": 1}))
    assert Checkpoint.open(folder).fingerprint() not in (first, second)


def test_fingerprint_sees_a_change_of_time_alone(folder: Path) -> None:
    first = Checkpoint.open(folder).fingerprint()
    os.utime(folder / "model-00001-of-00003.safetensors", ns=(1, 1))
    assert Checkpoint.open(folder).fingerprint() != first


# ---------------------------------------------------------------------------------------------
# Fuzzing


def _mutate(rng: random.Random, data: bytes) -> bytes:
    """A few random changes to a file: bits, tokens, cuts, repeats, numbers."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(7)
        at = rng.randrange(len(out)) if out else 0
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at] = rng.choice(
                [b"[", b"]", b"{", b"}", b'"', b",", b":", b"0", b"9" * 25, b"-1", b"1e9", b"null"]
            )
        elif kind == 2:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 64)]
        elif kind == 4 and len(out) >= 8:
            value = rng.choice([0, 1, len(out), len(out) - 8, 1 << 31, 1 << 63, (1 << 64) - 1])
            out[:8] = struct.pack("<Q", value)
        elif kind == 5:
            digits = [i for i in range(8, min(len(out), 2000)) if 48 <= out[i] <= 57]
            if digits:
                out[rng.choice(digits)] = 48 + rng.randrange(10)
        elif kind == 6:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def _check_survivor(checkpoint: Checkpoint) -> None:
    """What was believed must be true: every tensor lies in its file, apart from all others."""
    spans = []
    for name, info in checkpoint.tensors.items():
        data = checkpoint.tensor(name)
        assert tuple(data.shape) == info.shape
        assert data.nbytes == info.nbytes
        assert info.offset + info.nbytes <= info.file.stat().st_size
        spans.append((info.offset, info.offset + info.nbytes))
        data.view(torch.uint8).sum() if data.numel() else None
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def _open_or_refuse(folder: Path) -> Checkpoint | None:
    """The checkpoint, or None where it is refused with printable problems."""
    refusal: CheckpointError | None = None
    try:
        return Checkpoint.open(folder)
    except CheckpointError as error:
        refusal = error
    assert all(problem.isprintable() for problem in refusal.problems)
    return None


def _fuzz(tmp_path: Path, cases: int, seed: int) -> None:
    rng = random.Random(seed)
    header = {name: Entry("BF16", (2, i + 1)) for i, name in enumerate("abcdef")}
    header["scale"] = Entry("F32", (3, 1))
    good = header_bytes(header) + bytes(sum(e.nbytes for e in header.values()))
    file = tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(cases):
        file.write_bytes(_mutate(rng, good))
        checkpoint = _open_or_refuse(tmp_path)
        if checkpoint is not None:
            accepted += 1
            _check_survivor(checkpoint)
            checkpoint.close()
    assert accepted < cases


def test_fuzzed_headers(tmp_path: Path) -> None:
    _fuzz(tmp_path, 4000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_fuzzed_headers_at_length(tmp_path: Path, seed: int) -> None:
    _fuzz(tmp_path, 50_000, seed)


def test_fuzzed_index(folder: Path) -> None:
    rng = random.Random(5)
    good = (folder / INDEX_NAME).read_bytes()
    for _ in range(300):
        (folder / INDEX_NAME).write_bytes(_mutate(rng, good))
        checkpoint = _open_or_refuse(folder)
        if checkpoint is not None:
            assert all(file.parent == folder for file in checkpoint.shards)


def test_parse_header_and_read_header_agree_with_open(folder: Path) -> None:
    file = folder / "model-00001-of-00003.safetensors"
    header, size = read_header(file)
    tensors = parse_header(file, header, 8 + len(header), size)
    opened = Checkpoint.open(folder)
    assert tensors == [opened.tensors[t.name] for t in tensors]
