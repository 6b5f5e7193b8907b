"""Writing checkpoints in the published layout: safetensors shards with an index, and a config."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentcore.models.checkpoint import INDEX_NAME, SINGLE_NAME
from latentcore.quant.bf16 import BF16
from latentcore.quant.fp8_block import FP8_BLOCK
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.schemes import dtype_name
from latentcore.quant.w8a8_int8 import W8A8_INT8

SHARD_BYTES = 5_000_000_000
"""Size at which the next shard is begun."""

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


@dataclass(frozen=True)
class PublishedFormat:
    """A form in which checkpoints are published.

    scheme       how linear weights are stored
    config       the `quantization_config` of its config.json, None for plain weights
    """

    scheme: QuantScheme
    config: Mapping[str, Any] | None


def _compressed_tensors() -> dict[str, Any]:
    common = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "symmetric": True,
        "type": "int",
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": {**common, "dynamic": True, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**common, "dynamic": False, "strategy": "channel"},
            }
        },
        "format": "int-quantized",
        "ignore": ["lm_head", "re:.*mlp\\.gate$", "re:.*eh_proj$", "re:.*shared_head.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


FORMATS: Mapping[str, PublishedFormat] = {
    "bf16": PublishedFormat(BF16, None),
    "w8a8_int8": PublishedFormat(
        W8A8_INT8, {"quant_method": "w8a8_int8", "activation_scheme": "dynamic"}
    ),
    "fp8": PublishedFormat(
        FP8_BLOCK,
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    ),
    "compressed-tensors": PublishedFormat(W8A8_INT8, _compressed_tensors()),
}
"""The forms that this package writes, by name."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputGroup:
    """Tensors that are made together (a weight and its scales), and what makes them.

    `make` is called once, when it is their turn, and returns their data in the same order.
    """

    tensors: tuple[OutputTensor, ...]
    make: Callable[[], Sequence[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of data of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_config(folder: Path, config: Mapping[str, Any], form: str) -> None:
    """Writes config.json with the `quantization_config` of format `form`, or without one.

    `auto_map` is left out: the code that it names does not go along.
    """
    section = FORMATS[form].config
    left_out = ("quantization_config", "auto_map")
    data = {key: value for key, value in config.items() if key not in left_out}
    if section is not None:
        data["quantization_config"] = section
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, groups: Sequence[OutputGroup], progress: Progress | None = None
) -> None:
    """Writes all groups as safetensors: one file, or shards of about SHARD_BYTES with an index.

    Groups are made one by one, in order, so memory holds one at a time. Files appear under their
    names only when they are complete. A group is never split over shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[OutputGroup]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    total = sum(group.nbytes for group in groups)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for group in shard:
            weight_map |= {tensor.name: name for tensor in group.tensors}
        done = _write_shard(folder / name, shard, done, total, progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, shard: Sequence[OutputGroup], done: int, total: int, progress: Progress | None
) -> int:
    tensors = [tensor for group in shard for tensor in group.tensors]
    # Widest elements first, so that every tensor is aligned to its own.
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for tensor in tensors:
        offsets[tensor.name] = offset
        entries[tensor.name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        start = stream.tell()
        for group in shard:
            for tensor, data in zip(group.tensors, group.make(), strict=True):
                if data.dtype is not tensor.dtype or tuple(data.shape) != tensor.shape:
                    raise ValueError(
                        f"{tensor.name}: announced as {tensor.dtype} {tensor.shape}, made as "
                        f"{data.dtype} {tuple(data.shape)}"
                    )
                stream.seek(start + offsets[tensor.name])
                stream.write(data.contiguous().view(torch.uint8).numpy().data)
            done += group.nbytes
            if progress is not None:
                progress(done, total)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    return done
