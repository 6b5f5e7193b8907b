"""Synthetic checkpoints are published layouts, quick to make, and run within range."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tensor_list, tiny_config

from latentcore.config import ModelConfig
from latentcore.models import writer
from latentcore.models.checkpoint import INDEX_NAME, Checkpoint
from latentcore.models.resolve import ModelPlan, resolve
from latentcore.models.synthetic import benchmark_config, make_synthetic, v3_pair_config
from latentcore.models.writer import FORMATS, OutputGroup, OutputTensor, write_shards
from latentcore.quant.schemes import dtype_name


def _plan(folder: Path) -> ModelPlan:
    return resolve(ModelConfig.from_dir(folder), Checkpoint.open(folder), "auto")


def test_benchmark_model_has_the_sizes_that_figures_are_quoted_for(tmp_path: Path) -> None:
    from checkpoints import Sparse

    config = benchmark_config(dense=10944, vocab=32000)
    Sparse.plan(config, tensor_list(config, "int8"), 1).write(tmp_path)
    plan = _plan(tmp_path)
    assert plan.parameters() == pytest.approx(3.1e9, rel=0.02)
    assert plan.packed_nbytes() == pytest.approx(3.24e9, rel=0.02)
    assert plan.weight_bytes_per_token(1) == pytest.approx(682e6, rel=0.02)


def test_layer_pair_is_v3_at_full_size() -> None:
    config = ModelConfig.from_dict(v3_pair_config(vocab=32000))
    assert (config.hidden_size, config.num_attention_heads) == (7168, 128)
    assert (config.n_routed_experts, config.moe_intermediate_size) == (256, 2048)
    assert [config.is_moe_layer(i) for i in range(config.num_hidden_layers)] == [False, True]


@pytest.mark.parametrize("q_lora_rank", [44, None])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_published_tensors(
    tmp_path: Path, form: str, q_lora_rank: int | None
) -> None:
    config = tiny_config(q_lora_rank=q_lora_rank)
    make_synthetic(tmp_path, config, form, seed=1)
    listed = {"w8a8_int8": "int8", "compressed-tensors": "int8"}.get(form, form)
    expected = tensor_list(config, listed)
    with Checkpoint.open(tmp_path) as checkpoint:
        found = {n: (dtype_name(i.dtype), i.shape) for n, i in checkpoint.tensors.items()}
        assert found == {name: (e.dtype, e.shape) for name, e in expected.items()}
        for name in found:
            assert torch.isfinite(checkpoint.tensor(name).float()).all()
    assert _plan(tmp_path).warnings == ()


def test_weights_are_scaled_and_repeatable(tmp_path: Path) -> None:
    config = tiny_config()
    make_synthetic(tmp_path / "a", config, "w8a8_int8", seed=1)
    make_synthetic(tmp_path / "b", config, "w8a8_int8", seed=1)
    make_synthetic(tmp_path / "c", config, "w8a8_int8", seed=2)
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abc"]
    assert files[0] == files[1] != files[2]
    for form in ("bf16", "w8a8_int8", "fp8"):
        make_synthetic(tmp_path / form, config, form, seed=1)
        with Checkpoint.open(tmp_path / form) as checkpoint:
            plan = resolve(ModelConfig.from_dir(tmp_path / form), checkpoint, "auto")
            for matrix in plan.matrices():
                piece = matrix.pieces[0]
                tensors = {s: checkpoint.tensor(i.name) for s, i in piece.tensors.items()}
                deviation = piece.scheme.dequantize(tensors).std().item()
                assert deviation == pytest.approx(piece.cols**-0.5, rel=0.15)


def _random_groups(count: int, size: int) -> list[OutputGroup]:
    def make(index: int) -> list[torch.Tensor]:
        return [
            torch.full((size,), index % 100, dtype=torch.int8),
            torch.full((1,), float(index)),
        ]

    return [
        OutputGroup(
            (
                OutputTensor(f"{i}.codes", torch.int8, (size,)),
                OutputTensor(f"{i}.scale", torch.float32, (1,)),
            ),
            lambda i=i: make(i),  # type: ignore[misc]
        )
        for i in range(count)
    ]


def test_shards_are_split_between_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 1000)
    seen: list[tuple[int, int]] = []
    write_shards(tmp_path, _random_groups(10, 301), lambda done, total: seen.append((done, total)))
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 10 * 305 == seen[-1][0] == seen[-1][1]
    assert len(seen) == 10
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len(checkpoint.shards) == 4
        for i in range(10):
            assert index["weight_map"][f"{i}.codes"] == index["weight_map"][f"{i}.scale"]
            info = checkpoint.tensors[f"{i}.scale"]
            assert info.offset % 4 == 0
            assert checkpoint.tensor(f"{i}.scale").item() == i
            assert set(checkpoint.tensor(f"{i}.codes").tolist()) == {i}


def test_interrupted_writing_leaves_no_shard_under_its_name(tmp_path: Path) -> None:
    groups = _random_groups(3, 10)

    def fail() -> Any:
        raise KeyboardInterrupt

    groups[2] = OutputGroup(groups[2].tensors, fail)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, groups)
    assert not list(tmp_path.glob("*.safetensors"))


def test_data_must_be_what_was_announced(tmp_path: Path) -> None:
    wrong = OutputGroup((OutputTensor("a", torch.int8, (3,)),), lambda: [torch.zeros(3)])
    with pytest.raises(ValueError, match="a: announced as"):
        write_shards(tmp_path, [wrong])
