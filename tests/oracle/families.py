"""Small random checkpoints of every family and switch, in every format they are published in.

Weights are scaled so that bf16's own error is a few hundredths in log-probability (more, and
routers that tip over drown everything; less, and nothing could be seen), experts differ from token
to token, and logits spread over a few units. Blocks of 128 rows and columns differ in size, so that
a scale in the wrong place is felt.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import YARN_V3, Config, newer_spelling, tensor_list, tiny_config, write_checkpoint
from oracle.quantizers import BLOCK, Tensors, blocks, dequantize, quantize_fp8, quantize_int8

FORMATS = ("bf16", "int8", "fp8", "mixed")
"""`mixed`: the formats take turns from layer to layer, as checkpoints may have it."""

_V2: Config = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1,
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}
_YARN: Config = {**YARN_V3, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """One checkpoint to be.

    config         as its `config.json` has it
    router_dtype   dtype of the router's weight
    bias           mean of the router's bias; far below zero, scores of groups that do not take part
                   must be excluded, since zeros would win
    """

    name: str
    config: Config
    router_dtype: torch.dtype = torch.bfloat16
    bias: float = 0.0
    tensors: dict[str, Tensors] = field(default_factory=dict, compare=False, repr=False)

    @property
    def biased(self) -> bool:
        """Whether its routers have a bias."""
        return bool(self.config["topk_method"] == "noaux_tc")

    def stored(self, fmt: str) -> Tensors:
        """The tensors of this checkpoint in one of FORMATS. Do not change them."""
        if fmt not in self.tensors:
            plain = self.tensors.setdefault("bf16", random_weights(self))
            if fmt != "bf16":
                self.tensors[fmt] = in_format(plain, fmt)
        return self.tensors[fmt]

    def write(self, folder: Path, fmt: str) -> Path:
        """Writes the checkpoint into `folder`, in three shards."""
        return write_checkpoint(folder, self.config, self.stored(fmt), shards=3)


def _families() -> list[Family]:
    v2_yarn = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
    lite = {**_V2, "n_shared_experts": 2, "q_lora_rank": None, "rope_scaling": v2_yarn}
    moonlight = {
        "n_group": 1,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
    }
    kimi = {
        "model_type": "kimi_k2",
        "n_group": 1,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
    }
    v3_groups = {
        "n_group": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "rope_scaling": _YARN,
        "topk_group": 4,
    }
    wide = {
        "hidden_size": 320,
        "intermediate_size": 400,
        "kv_lora_rank": 136,
        "moe_intermediate_size": 136,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 144,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 80,
    }
    return [
        _family("v2-lite", lite),
        _family(
            "v2",
            _V2,
            n_group=4,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            rope_scaling=v2_yarn,
            routed_scaling_factor=16.0,
            topk_group=2,
            topk_method="group_limited_greedy",
        ),
        _family("moonlight", moonlight),
        _family("v3", v3_groups, num_nextn_predict_layers=1),
        _family("v3-wide", wide, rope_scaling=_YARN, n_routed_experts=8, n_group=4, topk_group=2),
        _family("kimi-k2", kimi, n_routed_experts=12, num_experts_per_tok=3),
        _family("newer-spelling", v3_groups, spelling=newer_spelling),
        _family("five-experts", n_group=1, n_routed_experts=5, num_experts_per_tok=3),
        _family("odd-sizes", hidden_size=99, intermediate_size=101, moe_intermediate_size=33),
        _family("seven-heads", num_attention_heads=7, num_key_value_heads=7, v_head_dim=24),
        _family("tied", tie_word_embeddings=True),
        _family("router-fp32", v3_groups, router_dtype=torch.float32),
        _family("no-shared-experts", n_shared_experts=0),
        _family("dense", first_k_dense_replace=3),
        _family("moe-from-the-start", first_k_dense_replace=0, norm_topk_prob=False),
        _family("every-expert", n_group=1, n_routed_experts=4, num_experts_per_tok=4),
        _family("one-expert", num_experts_per_tok=1, n_shared_experts=2),
        _family("negative-bias", v3_groups, bias=-3.0),
        _family("long", rope_scaling=_YARN, max_position_embeddings=2048),
        _family("unequal-mscale", rope_scaling={**_YARN, "mscale": 1.2, "mscale_all_dim": 0.6}),
    ]


def _family(
    name: str,
    base: Config | None = None,
    *,
    spelling: Callable[[Config], Config] = dict,
    router_dtype: torch.dtype = torch.bfloat16,
    bias: float = 0.0,
    **changes: Any,
) -> Family:
    config = tiny_config(**{**(base or {}), **changes})
    return Family(name, spelling(config), router_dtype, bias)


FAMILIES = {family.name: family for family in _families()}


# ---------------------------------------------------------------------------------------------
# Weights


def random_weights(family: Family) -> Tensors:
    """The checkpoint's tensors in bf16, the same at every call."""
    generator = torch.Generator().manual_seed(sum(family.name.encode()))
    out: Tensors = {}
    for name, entry in tensor_list(family.config, "bf16").items():
        normal = torch.randn(entry.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            out[name] = family.bias + 0.15 * normal
            continue
        dtype = family.router_dtype if name.endswith("mlp.gate.weight") else torch.bfloat16
        if normal.dim() == 1:
            out[name] = (1.0 + 0.2 * normal).to(dtype)
            continue
        gain = _gain(name, family.config["routed_scaling_factor"]) * entry.shape[-1] ** -0.5
        if is_quantized(name):
            high, wide = (-(-size // BLOCK) for size in entry.shape)
            sizes = (0.3 * torch.randn(high, wide, generator=generator)).exp()
            normal = normal * blocks(sizes, *entry.shape)
        out[name] = (gain * normal).to(dtype)
    return out


def _gain(name: str, expert_factor: float) -> float:
    """How large a matrix's output is for an input of ones' size."""
    if ".experts." in name and "down_proj" in name:
        return 0.8 / (1.0 + expert_factor)
    for part, gain in _GAINS:
        if part in name:
            return gain
    return 1.0


_GAINS = (
    ("lm_head", 2.0),
    ("mlp.gate.", 1.5),
    ("o_proj", 0.3),
    ("down_proj", 0.3),
)


def is_quantized(name: str) -> bool:
    """Whether a published int8 or FP8 checkpoint stores this tensor quantized."""
    return (name.endswith("_proj.weight") and "eh_proj" not in name) or "proj_with_mqa" in name


def in_format(plain: Tensors, fmt: str) -> Tensors:
    """The bf16 tensors of a checkpoint as int8, fp8 or mixed ones."""
    out: Tensors = {}
    for name, tensor in plain.items():
        chosen = "bf16"
        if is_quantized(name):
            chosen = _format_of_layer(name) if fmt == "mixed" else fmt
        if chosen == "bf16":
            out[name] = tensor
            continue
        quantize = quantize_int8 if chosen == "int8" else quantize_fp8
        for suffix, value in quantize(tensor).items():
            out[f"{name.removesuffix('.weight')}.{suffix}"] = value
    return out


def _format_of_layer(name: str) -> str:
    layer = int(name.split(".")[2])
    return ("fp8", "int8", "bf16")[layer % 3]


def dequantized(stored: Tensors) -> Tensors:
    """The same checkpoint with every weight dequantized and rounded once to bf16."""
    out: Tensors = {}
    for name, tensor in stored.items():
        if "weight_scale" in name:
            continue
        base = name.removesuffix(".weight")
        found = {
            suffix: stored[f"{base}.{suffix}"]
            for suffix in ("weight_scale", "weight_scale_inv")
            if f"{base}.{suffix}" in stored
        }
        out[name] = dequantize({"weight": tensor, **found}).to(torch.bfloat16) if found else tensor
    return out


@functools.cache
def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids of the families' vocabulary."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, tiny_config()["vocab_size"], (length,), generator=generator).tolist()
