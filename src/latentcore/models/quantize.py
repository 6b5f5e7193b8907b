"""Turns a checkpoint into another published format on disk, weight by weight."""

import re
import shutil
from functools import partial
from pathlib import Path

import torch

from latentcore.config import ModelConfig
from latentcore.errors import CheckpointError, QuantizationError
from latentcore.files import UnsafePathError, contained_file, read_json_file
from latentcore.models.checkpoint import INDEX_NAME, Checkpoint
from latentcore.models.memory import format_bytes
from latentcore.models.resolve import resolve
from latentcore.models.writer import (
    FORMATS,
    OutputGroup,
    OutputTensor,
    Progress,
    write_config,
    write_shards,
)
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.schemes import COMPANION_SUFFIXES, convert_finite, scheme_of, target_scheme

_LINEAR = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp)\..*_proj(?:_with_mqa)?)\.weight$")
"""Weights that published quantized checkpoints quantize; not `eh_proj`, the router or the head."""

_COPIED = ("*.json", "*.jinja", "tiktoken.model", "tokenizer.model", "merges.txt", "LICENSE*")
"""Files that go along unchanged. Never code."""

_MAX_CONFIG_BYTES = 16 << 20


def quantize_checkpoint(
    source: Path, destination: Path, form: str, progress: Progress | None = None
) -> None:
    """Writes checkpoint `source` as format `form` (one of `writer.FORMATS`) to `destination`.

    Linear weights of all layers are converted by the exact quantizers, the multi-token-prediction
    layers' too; everything else is copied. Tokenizer, templates and generation defaults go along.
    The source is resolved strictly first. `progress` is called with bytes written.
    Raises a UserError where the source is unsound, the pair of formats is not supported, the
    destination is not empty, or the disk has too little room.
    """
    if form not in FORMATS:
        raise QuantizationError(f"format: expected one of {', '.join(FORMATS)}, found {form!r}")
    target = FORMATS[form].scheme
    config = ModelConfig.from_dir(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: expected an empty folder or none, found files")
    with Checkpoint.open(source) as checkpoint:
        quantization = "unquant" if form == "bf16" else target.name
        resolve(config, checkpoint, quantization)
        groups = _groups(checkpoint, target, quantization)
        _require_room(destination, sum(group.nbytes for group in groups))
        raw = read_json_file(contained_file(source, "config.json"), _MAX_CONFIG_BYTES)
        write_config(destination, raw, form)
        _copy_rest(source, destination)
        write_shards(destination, groups, progress)


def _groups(checkpoint: Checkpoint, target: QuantScheme, quantization: str) -> list[OutputGroup]:
    groups: list[OutputGroup] = []
    for name, info in checkpoint.tensors.items():
        base, _, suffix = name.rpartition(".")
        if suffix in COMPANION_SUFFIXES and _LINEAR.match(f"{base}.weight"):
            continue  # goes with its weight
        match = _LINEAR.match(name)
        if match is None:
            tensor = OutputTensor(name, info.dtype, info.shape)
            groups.append(OutputGroup((tensor,), partial(_copy, checkpoint, name)))
            continue
        base = match[1]
        companions = [s for s in COMPANION_SUFFIXES if f"{base}.{s}" in checkpoint.tensors]
        stored = scheme_of(info.dtype, companions)
        if isinstance(stored, str):  # in a multi-token-prediction layer: resolve has seen the rest
            raise CheckpointError(f"{name}: {stored}")
        if target_scheme(stored, quantization) is None:
            raise QuantizationError(
                f"{name}: stored as {stored.name}, which cannot be turned into {target.name}"
            )
        rows, cols = info.shape
        tensors = tuple(
            OutputTensor(f"{base}.{s}", *shape) for s, shape in target.stored(rows, cols).items()
        )
        make = partial(_convert, checkpoint, base, ("weight", *companions), stored, target)
        groups.append(OutputGroup(tensors, make))
    return groups


def _copy(checkpoint: Checkpoint, name: str) -> list[torch.Tensor]:
    return [checkpoint.tensor(name)]


def _convert(
    checkpoint: Checkpoint,
    base: str,
    suffixes: tuple[str, ...],
    stored: QuantScheme,
    target: QuantScheme,
) -> list[torch.Tensor]:
    tensors = {suffix: checkpoint.tensor(f"{base}.{suffix}") for suffix in suffixes}
    where = str(checkpoint.tensors[f"{base}.weight"].file)
    made = convert_finite(base, where, tensors, stored, target)
    return [made[suffix] for suffix in target.stored(*tensors["weight"].shape)]


def _copy_rest(source: Path, destination: Path) -> None:
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.name in ("config.json", INDEX_NAME):
                continue
            try:
                shutil.copyfile(contained_file(source, path.name), destination / path.name)
            except UnsafePathError as error:
                raise CheckpointError(str(error)) from None


def _require_room(destination: Path, needed: int) -> None:
    place = destination
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{destination}: not enough disk: needed {format_bytes(needed)}, free "
            f"{format_bytes(free)}"
        )
