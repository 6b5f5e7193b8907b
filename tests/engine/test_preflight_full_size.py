"""Full-size checkpoints of every supported model, headers alone, with and without faults."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import (
    CONFIGS,
    PREFLIGHT_STEPS,
    YARN_V3,
    Entry,
    Sparse,
    tensor_list,
    write_config,
)

from latentcore.config import EngineConfig
from latentcore.engine.preflight import preflight
from latentcore.models import memory
from latentcore.models.checkpoint import INDEX_NAME, Checkpoint

SHARDS = 163
GIB = 1 << 30

# Runs in a process of its own, whose peak of memory is that of preflight alone.
PROGRAM = """
import json, resource, sys
from pathlib import Path
from latentcore.config import EngineConfig
from latentcore.engine.preflight import preflight
from latentcore.models import memory
memory.available_memory = lambda: 4 * 10**12
report = preflight(Path(sys.argv[1]), EngineConfig())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
schemes = {s for layer in report.schemes.values() for s in layer.values()}
print(json.dumps([report.problems, peak, report.tensors, report.shards, sorted(schemes),
                  report.memory.loading_peak - report.memory.weights,
                  report.memory.cache_per_1000, report.memory.max_model_len,
                  list(report.weight_bytes_per_token), report.steps]))
"""
SCHEMES = {"bf16": "bf16", "int8": "w8a8_int8", "fp8": "fp8"}


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        *(("v3", fmt) for fmt in SCHEMES),
        ("kimi-k2", "fp8"),
        ("v2", "bf16"),
        ("v2-lite", "bf16"),
        ("moonlight", "bf16"),
    ],
)
def test_published_checkpoints_are_ready(tmp_path: Path, name: str, fmt: str) -> None:
    """With little memory."""
    config = CONFIGS[name]
    tensors = tensor_list(config, fmt)
    Sparse.plan(config, tensors, SHARDS).write(tmp_path)
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    problems, peak, count, shards, schemes, more, cache, longest, batches, steps = json.loads(out)
    assert problems == []
    assert peak < 1.5 * GIB
    assert count == len(tensors)
    assert shards == len(list(tmp_path.glob("*.safetensors")))
    assert schemes == [SCHEMES[fmt]]
    assert more == 0
    assert cache == 1000 * 576 * 2 * config["num_hidden_layers"]
    assert longest == config["max_position_embeddings"]
    assert batches == [1, 8, 32]
    assert steps == PREFLIGHT_STEPS


# ---------------------------------------------------------------------------------------------
# Faults

ATTN = "model.layers.37.self_attn"
EXPERT = "model.layers.37.mlp.experts.255"
O_PROJ = f"{ATTN}.o_proj"


def _entry(name: str, dtype: str, *shape: int) -> Callable[[Sparse], None]:
    def change(sparse: Sparse) -> None:
        sparse.shard_of(name)[name] = Entry(dtype, shape)

    return change


def _scale_inv_beside_int8(sparse: Sparse) -> None:
    shard = sparse.weight_map[f"{O_PROJ}.weight_scale"]
    sparse.remove(f"{O_PROJ}.weight_scale")
    sparse.shards[shard][f"{O_PROJ}.weight_scale_inv"] = Entry("F32", (56, 128))
    sparse.weight_map[f"{O_PROJ}.weight_scale_inv"] = shard


def _expert_absent(sparse: Sparse) -> None:
    for name in [name for name in sparse.weight_map if name.startswith(f"{EXPERT}.")]:
        sparse.remove(name)


def _twice(sparse: Sparse) -> None:
    other = next(f for f in sparse.shards if f != sparse.weight_map["model.norm.weight"])
    sparse.shards[other]["model.norm.weight"] = Entry("BF16", (7168,))


def _index_elsewhere(sparse: Sparse) -> None:
    name = f"{O_PROJ}.weight"
    sparse.weight_map[name] = next(f for f in sparse.shards if f != sparse.weight_map[name])


IN_TENSORS: dict[str, tuple[str, Callable[[Sparse], None], list[str]]] = {
    "scale missing": (
        "int8",
        lambda s: s.remove(f"{O_PROJ}.weight_scale"),
        [f"{O_PROJ}.weight: expected weight_scale [out, 1] beside a weight of dtype I8"],
    ),
    "scale flat": (
        "int8",
        _entry(f"{O_PROJ}.weight_scale", "F32", 7168),
        [f"{O_PROJ}.weight_scale: expected shape [7168, 1], found [7168]"],
    ),
    "scale in bf16": (
        "int8",
        _entry(f"{O_PROJ}.weight_scale", "BF16", 7168, 1),
        [f"{O_PROJ}.weight_scale: expected dtype F32 beside a weight of I8"],
    ),
    "grid one row short": (
        "fp8",
        _entry(f"{ATTN}.kv_a_proj_with_mqa.weight_scale_inv", "F32", 4, 56),
        [f"{ATTN}.kv_a_proj_with_mqa.weight_scale_inv: expected shape [5, 56], found [4, 56]"],
    ),
    "int8 with a grid alone": (
        "int8",
        _scale_inv_beside_int8,
        [f"{O_PROJ}.weight: expected weight_scale [out, 1] beside a weight of dtype I8"],
    ),
    "expert absent": (
        "int8",
        _expert_absent,
        [f"{EXPERT}.{proj}_proj.weight: missing; expected" for proj in ("gate", "up", "down")],
    ),
    "rows that do not match heads": (
        "bf16",
        _entry(f"{ATTN}.kv_b_proj.weight", "BF16", 127 * 256, 512),
        [f"{ATTN}.kv_b_proj.weight: expected shape [32768, 512], found [32512, 512]"],
    ),
    "tensor twice": (
        "fp8",
        _twice,
        [
            "tensor model.norm.weight: stands twice, in model-00001",
            f"by {INDEX_NAME}, found in model-00001",
        ],
    ),
    "index elsewhere": (
        "fp8",
        _index_elsewhere,
        [f"tensor {O_PROJ}.weight: expected in model-00001-of-000163.safetensors by {INDEX_NAME}"],
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Sparse, Path]]:
    """V3 without faults in every format, written."""
    written = {}
    for fmt in SCHEMES:
        sparse = Sparse.plan(CONFIGS["v3"], tensor_list(CONFIGS["v3"], fmt), SHARDS)
        written[fmt] = (sparse, sparse.write(tmp_path_factory.mktemp(fmt)))
    return written


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 4 TB, and no weight may be read."""
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 10**12)
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))


def _check(folder: Path, expected: list[str]) -> None:
    problems = preflight(folder, EngineConfig()).problems
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert start in problem, problem


@pytest.mark.slow
@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize("fault", IN_TENSORS)
def test_a_fault_among_the_tensors_is_named(
    fault: str, sound: dict[str, tuple[Sparse, Path]], tmp_path: Path
) -> None:
    fmt, change, expected = IN_TENSORS[fault]
    sparse = sound[fmt][0].copy()
    change(sparse)
    _check(sparse.write_beside(*sound[fmt], tmp_path / "faulty"), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("plenty")
def test_a_shard_cut_in_the_middle_is_named(
    sound: dict[str, tuple[Sparse, Path]], tmp_path: Path
) -> None:
    sparse, written = sound["fp8"]
    folder = tmp_path / "cut"
    folder.mkdir()
    file = sorted(sparse.shards)[80]
    for shard in sparse.shards:
        if shard != file:
            (folder / shard).hardlink_to(written / shard)
    sparse.write(folder)
    os.truncate(folder / file, (folder / file).stat().st_size // 2)
    _check(folder, [f"{file}: the file is cut off: its header promises"])


IN_CONFIG: dict[str, tuple[dict[str, object], str]] = {
    "top-k above the expert count": (
        {"num_experts_per_tok": 257},
        "num_experts_per_tok: expected at most n_routed_experts (256), found 257",
    ),
    "groups that do not divide": (
        {"n_group": 7},
        "n_group: expected a divisor of n_routed_experts (256), found 7",
    ),
    "rope of an unknown type": (
        {"rope_scaling": {**YARN_V3, "type": "spiral"}},
        'rope_scaling.type: expected the rope type "yarn" or "default", found the text "spiral"',
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize("fault", IN_CONFIG)
def test_a_fault_of_the_config_is_named(
    fault: str, sound: dict[str, tuple[Sparse, Path]], tmp_path: Path
) -> None:
    change, expected = IN_CONFIG[fault]
    sparse = sound["fp8"][0].copy()
    folder = sparse.write_beside(*sound["fp8"], tmp_path / "faulty")
    write_config(folder, {**CONFIGS["v3"], **change})
    _check(folder, [expected])


@pytest.mark.slow
@pytest.mark.usefixtures("plenty")
def test_a_vocabulary_unlike_the_tokenizers_is_named(
    sound: dict[str, tuple[Sparse, Path]], tmp_path: Path
) -> None:
    sparse = sound["fp8"][0].copy()
    folder = sparse.write_beside(*sound["fp8"], tmp_path / "faulty")
    vocab = {f"t{i}": i for i in range(129_281)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    _check(folder, ["vocab_size: expected at least the tokenizer's 129281 tokens, found 129280"])
