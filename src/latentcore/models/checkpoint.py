"""A checkpoint's tensors: safetensors headers, read strictly, and zero-copy access to the data.

The files are untrusted. A header is believed only when every number in it agrees with every other
and with the file's size; an index only when each shard holds exactly what it promises. Nothing is
ever unpickled or run.
"""

import contextlib
import hashlib
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from latentcore.errors import CheckpointError
from latentcore.files import (
    JsonError,
    UnsafePathError,
    contained_file,
    json_kind,
    parse_json_object,
    read_json_file,
    shorten,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors format allows."""

_MAX_INDEX_BYTES = 256 << 20
_MAX_RANK = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FINGERPRINT_SAMPLES = 8
_FINGERPRINT_SAMPLE_BYTES = 4096

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

with warnings.catch_warnings():
    # torch warns once in a process that a read-only buffer cannot be written to. The maps below are
    # read-only on purpose, so that one warning is spent here.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(1), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `offset` (from the start) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def parse_header(file: Path, header: bytes, data_start: int, file_size: int) -> list[TensorInfo]:
    """Checks one safetensors header and returns its tensors in the order of their data.

    `header` is the JSON text, `data_start` the offset of the first data byte, `file_size` the size
    of the whole file. Raises CheckpointError listing every problem. Checked: strict JSON, dtypes,
    shapes, that sizes agree with dtypes and shapes, that the data of all tensors covers the rest of
    the file exactly, without holes or overlaps.
    """
    try:
        entries = parse_json_object(header)
    except JsonError as error:
        raise CheckpointError(f"damaged header: {error}", where=str(file)) from None
    problems: list[str] = []
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        problems.append("__metadata__: expected an object of texts")
    tensors: list[TensorInfo] = []
    for name, entry in entries.items():
        try:
            tensors.append(_parse_entry(file, name, entry, data_start))
        except ValueError as error:
            problems.append(f"tensor {shorten(name, 120)}: {error}")
    if not problems:
        tensors.sort(key=lambda t: (t.offset, t.nbytes))
        _check_layout(tensors, data_start, file_size, problems)
    if problems:
        raise CheckpointError(problems, where=str(file))
    return tensors


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {json_kind(entry)}")
    if len(entry) != 3 or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        found = ", ".join(shorten(key) for key in list(entry)[:8])
        raise ValueError(f"expected the keys dtype, shape and data_offsets, found {found}")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"dtype: expected one of {', '.join(_DTYPES)}, found {json_kind(entry['dtype'])}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_RANK
        or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
    ):
        raise ValueError(
            f"shape: expected a list of at most {_MAX_RANK} sizes, found {_brief(shape)}"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] < 1 << 63
    ):
        raise ValueError(f"data_offsets: expected a begin and an end, found {_brief(offsets)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"data_offsets: expected {nbytes} bytes for {entry['dtype']} {shape}, "
            f"found {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries" if len(value) > _MAX_RANK else shorten(repr(value))
    return json_kind(value)


def _check_layout(
    tensors: list[TensorInfo], data_start: int, file_size: int, problems: list[str]
) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            problems.append(
                f"tensor {shorten(tensor.name, 120)}: {kind}: expected its data at byte "
                f"{end - data_start}, found {tensor.offset - data_start}"
            )
        end = max(end, tensor.offset + tensor.nbytes)
    if end > file_size:
        first = next(t for t in tensors if t.offset + t.nbytes > file_size)
        problems.append(
            f"the file is cut off: its header promises {end} bytes, found {file_size} "
            f"(the first tensor that is cut is {shorten(first.name, 120)}); download it again"
        )
    elif end < file_size and not problems:
        problems.append(f"expected {end} bytes by its header, found {file_size}")


def read_header(file: Path) -> tuple[bytes, int]:
    """Reads the header of a safetensors file: its JSON text and the size of the file in bytes.

    Raises CheckpointError for a length that cannot be, OSError as it comes.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"not a safetensors file: expected at least 8 bytes, found {len(prefix)}",
                where=str(file),
            )
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"header length: expected at most {min(MAX_HEADER_BYTES, size - 8)} bytes, found "
                f"{length}; the file is cut off, or it is not a safetensors file",
                where=str(file),
            )
        header = stream.read(length)
        if not header.startswith(b"{"):
            raise CheckpointError(
                f"damaged header: expected a JSON object, found {shorten(repr(header[:8]))}",
                where=str(file),
            )
    return header, size


class Checkpoint:
    """The tensors of a checkpoint folder, by name, with their data memory-mapped on first use.

    `tensors` maps each name to its TensorInfo; `shards` lists the files in order. Tensors given out
    stay valid for as long as they are referenced. Usable as a context manager; `close` unmaps.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], shards: list[Path]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.shards = tuple(shards)
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Reads every header in folder `path` and checks them all against the index.

        Takes the shards of `model.safetensors.index.json` where there is one, else
        `model.safetensors`, else every `*.safetensors` file. Raises CheckpointError with every
        problem found.
        """
        if not path.is_dir():
            raise CheckpointError(f"no such model folder: {path}")
        problems: list[str] = []
        index = _read_index(path)
        shard_of: dict[str, str] | None = None
        if index is not None:
            shard_of = _weight_map(index, problems)
            names = sorted(set(shard_of.values()))
        else:
            names = _unindexed_shards(path)
        headers: dict[str, list[TensorInfo]] = {}
        files: list[Path] = []
        for name in names:
            try:
                file = contained_file(path, name)
                header, size = read_header(file)
                headers[name] = parse_header(file, header, 8 + len(header), size)
                files.append(file)
            except CheckpointError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
            except FileNotFoundError:
                count = sum(1 for shard in (shard_of or {}).values() if shard == name)
                problems.append(
                    f"{name}: no such file, but {INDEX_NAME} places {count} tensors in it; "
                    f"download it again"
                )
            except UnsafePathError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{name}: cannot be read ({error.strerror})")
        tensors: dict[str, TensorInfo] = {}
        for shard in headers.values():
            for tensor in shard:
                earlier = tensors.setdefault(tensor.name, tensor)
                if earlier is not tensor:
                    problems.append(
                        f"tensor {shorten(tensor.name, 120)}: stands twice, in "
                        f"{earlier.file.name} and in {tensor.file.name}"
                    )
        if shard_of is not None:
            _check_index(shard_of, headers, tensors, problems)
        if problems:
            raise CheckpointError(problems, where=str(path))
        return cls(path, tensors, files)

    def tensor(self, name: str) -> torch.Tensor:
        """The data of tensor `name` as a read-only view of the mapped file. Do not write to it.

        A tensor whose data is not aligned to its element size is copied instead.
        Raises KeyError for a name that is not in `tensors`.
        """
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        source = self._map(info.file)
        if info.offset % info.dtype.itemsize:
            copy = bytearray(source[info.offset : info.offset + info.nbytes])
            return torch.frombuffer(copy, dtype=info.dtype).view(info.shape)
        count = info.nbytes // info.dtype.itemsize
        flat = torch.frombuffer(source, dtype=info.dtype, count=count, offset=info.offset)
        return flat.view(info.shape)

    def prefetch(self, name: str) -> None:
        """Asks the system to begin reading tensor `name` into the page cache."""
        self._advise(name, mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """Lets go of the mapped pages of tensor `name`; touching it again reads it again."""
        self._advise(name, mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """A hex digest that changes whenever the weights may have.

        It covers config.json and, for each shard, its name, size, inode, times of modification and
        of change, whole header and a few samples of its data: the data itself is too large to read
        at every start. The time of change (ctime) is the system's own: no program can put it back,
        so a file whose content was replaced differs even where copying kept its modification time.
        A copy of a checkpoint has another fingerprint than its source.
        """
        digest = hashlib.sha256(b"latentcore checkpoint 2\n")
        with contextlib.suppress(OSError, UnsafePathError):
            digest.update(contained_file(self.path, "config.json").read_bytes())
        for file in self.shards:
            with file.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                length = int.from_bytes(stream.read(8), "little")
                digest.update(
                    f"\n{file.name} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} "
                    f"{stat.st_ctime_ns} {length}\n".encode()
                )
                digest.update(stream.read(min(length, MAX_HEADER_BYTES)))
                start = 8 + length
                for sample in range(_FINGERPRINT_SAMPLES):
                    span = max(0, stat.st_size - start - _FINGERPRINT_SAMPLE_BYTES)
                    stream.seek(start + span * sample // (_FINGERPRINT_SAMPLES - 1))
                    digest.update(stream.read(_FINGERPRINT_SAMPLE_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Lets go of the maps. Tensors that are still referenced keep their own file mapped."""
        # Not mmap.close(): torch holds the map object but not its buffer, so the map would be taken
        # away under living tensors. A map goes with the last reference to it.
        self._maps.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self, file: Path) -> mmap.mmap:
        source = self._maps.get(file)
        if source is None:
            with file.open("rb") as stream:
                source = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[file] = source
        return source

    def _advise(self, name: str, advice: int) -> None:
        info = self.tensors[name]
        start = info.offset - info.offset % mmap.PAGESIZE
        if info.nbytes:
            source = self._map(info.file)
            source.madvise(advice, start, info.offset + info.nbytes - start)


def _read_index(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_file(contained_file(path, INDEX_NAME), _MAX_INDEX_BYTES)
    except FileNotFoundError:
        return None
    except UnsafePathError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path / INDEX_NAME}: cannot be read ({error.strerror})") from None
    except JsonError as error:
        raise CheckpointError(f"{path / INDEX_NAME}: {error}") from None


def _weight_map(index: dict[str, Any], problems: list[str]) -> dict[str, str]:
    """The index's tensor-to-shard table without the entries that cannot be followed."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        problems.append(f"{INDEX_NAME}: weight_map: expected an object of tensors and shards")
        return {}
    good: dict[str, str] = {}
    refused: dict[str, int] = {}
    for name, shard in table.items():
        if isinstance(shard, str) and shard.endswith(".safetensors"):
            good[name] = shard
        else:
            kind = json_kind(shard)
            refused[kind] = refused.get(kind, 0) + 1
    for kind, count in refused.items():
        advice = ""
        if kind.rstrip('"').endswith(_PICKLES):
            advice = "; pickled weights are refused, convert them to safetensors"
        problems.append(
            f"{INDEX_NAME}: expected *.safetensors files, found {kind} for {count} tensors{advice}"
        )
    return good


def _unindexed_shards(path: Path) -> list[str]:
    names = sorted(entry.name for entry in path.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in shards:
        return [SINGLE_NAME]
    if shards:
        return shards
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"no *.safetensors file, but {pickles[0]}: pickled weights can run code when they are "
            f"opened and are refused; use the safetensors release of this model, or convert it",
            where=str(path),
        )
    other = "".join(f", found {name}" for name in names if name.endswith(".gguf"))
    raise CheckpointError(
        f"no weights: expected {INDEX_NAME} with its shards, or {SINGLE_NAME}{other}",
        where=str(path),
    )


def _check_index(
    shard_of: Mapping[str, str],
    headers: Mapping[str, list[TensorInfo]],
    tensors: Mapping[str, TensorInfo],
    problems: list[str],
) -> None:
    missing: dict[str, list[str]] = {}
    for name, shard in shard_of.items():
        info = tensors.get(name)
        if info is not None and info.file.name != shard:
            problems.append(
                f"tensor {shorten(name, 120)}: expected in {shorten(shard)} by {INDEX_NAME}, "
                f"found in {info.file.name}"
            )
        elif info is None and shard in headers:
            missing.setdefault(shard, []).append(name)
    for shard, names in missing.items():
        for name in names:
            problems.append(
                f"tensor {shorten(name, 120)}: expected in {shorten(shard)} by {INDEX_NAME}, "
                f"found nowhere"
            )
