"""The same checkpoints in Hugging Face transformers, in fp32 and in bf16."""

from typing import Any

import torch
from checkpoints import Config, newer_spelling
from oracle.quantizers import Tensors
from torch import nn


def _transformers_config(config: Config) -> Any:
    from transformers import DeepseekV2Config, DeepseekV3Config

    newer = config if "rope_parameters" in config else newer_spelling(config)
    kept = {k: v for k, v in newer.items() if k not in ("architectures", "model_type", "dtype")}
    # transformers' own multi-token prediction layers are no part of a forward pass.
    kept["num_nextn_predict_layers"] = 0
    family = DeepseekV2Config if config["model_type"] == "deepseek_v2" else DeepseekV3Config
    if family is DeepseekV2Config:
        kept.pop("rope_interleave")
    return family(**kept)


def fused(config: Config, tensors: Tensors) -> Tensors:
    """Tensors by the names that transformers has: no prediction layer, experts stacked."""
    layers = config["num_hidden_layers"]
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{layers}.") or ".experts." in name:
            continue
        out[name] = tensor
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.gate_proj.weight" not in tensors:
            continue
        names = [f"{prefix}.{e}" for e in range(config["n_routed_experts"])]
        gates = [
            torch.cat([tensors[f"{n}.gate_proj.weight"], tensors[f"{n}.up_proj.weight"]])
            for n in names
        ]
        out[f"{prefix}.gate_up_proj"] = torch.stack(gates)
        out[f"{prefix}.down_proj"] = torch.stack([tensors[f"{n}.down_proj.weight"] for n in names])
    if config["tie_word_embeddings"]:
        out["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if not config["n_shared_experts"]:
        for layer in range(config["first_k_dense_replace"], layers):
            prefix, h = f"model.layers.{layer}.mlp.shared_experts", config["hidden_size"]
            for part, shape in (("gate", (0, h)), ("up", (0, h)), ("down", (h, 0))):
                out[f"{prefix}.{part}_proj.weight"] = torch.empty(shape)
    return out


def build(config: Config, tensors: Tensors, dtype: torch.dtype) -> nn.Module:
    """The model as transformers would load it in `dtype`.

    As there, the router's bias and the rotary frequencies stay fp32 whatever `dtype` is, and so
    does a router that is stored so.
    """
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
    from transformers.utils import logging

    v2 = config["model_type"] == "deepseek_v2"
    cls: Any = DeepseekV2ForCausalLM if v2 else DeepseekV3ForCausalLM
    logging.set_verbosity(40)  # errors alone: shrunken yarn settings look like a mistake to it
    model: Any = cls(_transformers_config(config)).eval()
    model.set_experts_implementation("eager")  # grouped products want rows of 16 bytes
    model.load_state_dict(fused(config, tensors), strict=True)
    routers = {n: t for n, t in tensors.items() if n.endswith("mlp.gate.weight")}
    for name, parameter in model.named_parameters():
        kept = name in routers and routers[name].dtype == torch.float32
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    built: nn.Module = model
    return built


@torch.inference_mode()
def logits(model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Logits of every position: fp32 [length, vocabulary]."""
    out: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return out.float()
