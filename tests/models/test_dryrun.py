"""The dry run stands for the real thing: its weights are shaped as those that loading makes."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, Config, random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.config import ModelConfig
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.loader import load_weights
from latentcore.models.parts import Meta, assemble, parts_of
from latentcore.models.resolve import resolve
from latentcore.quant.packed import PackedWeight

FAMILIES: dict[str, Config] = {
    "v3": tiny_config(),
    "v2-lite": tiny_config(
        model_type="deepseek_v2",
        q_lora_rank=None,
        scoring_func="softmax",
        topk_method="greedy",
        n_group=1,
        norm_topk_prob=False,
    ),
    "tied": tiny_config(tie_word_embeddings=True, n_shared_experts=0),
}


def shape(value: Any) -> Any:
    """Everything about weights but what they hold."""
    if isinstance(value, PackedWeight):
        return value.desc, shape(value.data)
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, list):
        return [shape(item) for item in value]
    if is_dataclass(value):
        return {f.name: shape(getattr(value, f.name)) for f in fields(value)}
    assert value is None
    return None


@pytest.mark.parametrize("quantization", ["auto", "unquant"])
@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fake_weights_are_shaped_as_loaded_ones(
    family: str, fmt: str, quantization: str, tmp_path: Path
) -> None:
    config = FAMILIES[family]
    assert config["hidden_size"] != CONFIGS["v3"]["hidden_size"]
    write_checkpoint(tmp_path, config, random_tensors(tensor_list(config, fmt)))
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = resolve(ModelConfig.from_dir(tmp_path), checkpoint, quantization)
        assert shape(assemble(parts_of(plan, Meta()))) == shape(
            load_weights(plan, checkpoint, None)
        )
