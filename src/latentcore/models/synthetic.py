"""Checkpoints with random weights in the published layouts, to measure speed with.

The weights are drawn from a pool of random numbers instead of each afresh, so that many gigabytes
are made about as fast as they can be written. They are scaled so that activations stay in range and
the router spreads tokens over its experts, but the model says nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentcore.config import ModelConfig
from latentcore.models.writer import (
    FORMATS,
    OutputGroup,
    OutputTensor,
    Progress,
    write_config,
    write_shards,
)
from latentcore.quant.bf16 import BF16
from latentcore.quant.fp8_block import FP8_BLOCK
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.w8a8_int8 import W8A8_INT8

_POOL = (1 << 23) + 9
"""Random numbers in the pool; odd, so that rows do not repeat in step with it."""

_RANGE = 5.0
"""Standard deviations that the codes of a quantized weight span."""


def benchmark_config(*, dense: int, vocab: int) -> dict[str, Any]:
    """config.json of the benchmark model: V3's architecture in 3.1 G parameters.

    `dense` is the width of the first layer's MLP (10,944; 11,008 for engines that want a
    multiple of 128), `vocab` the vocabulary (32,000).
    """
    return {
        **_COMMON,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": dense,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 6,
        "num_key_value_heads": 16,
        "vocab_size": vocab,
    }


def v3_pair_config(*, vocab: int) -> dict[str, Any]:
    """config.json of a dense and a MoE layer of DeepSeek-V3 at full size."""
    return {
        **_COMMON,
        "first_k_dense_replace": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "num_hidden_layers": 2,
        "num_key_value_heads": 128,
        "vocab_size": vocab,
    }


_COMMON: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}


def make_synthetic(
    folder: Path,
    config: Mapping[str, Any],
    form: str,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint of `config` with random weights into `folder`.

    `form` is one of `writer.FORMATS`. The same seed gives the same files.
    """
    model = ModelConfig.from_dict(config)
    pool = _Pool(seed)
    groups = list(_groups(model, FORMATS[form].scheme, pool))
    write_config(folder, config, form)
    write_shards(folder, groups, progress)


def _groups(config: ModelConfig, scheme: QuantScheme, pool: "_Pool") -> Iterator[OutputGroup]:
    """Every tensor of a published checkpoint of `config`, linear weights stored as `scheme`."""
    h, vocab, heads = config.hidden_size, config.vocab_size, config.num_attention_heads

    def linear(name: str, rows: int, cols: int) -> OutputGroup:
        stored = scheme.stored(rows, cols)
        tensors = tuple(OutputTensor(f"{name}.{s}", *stored[s]) for s in stored)
        return OutputGroup(tensors, partial(pool.linear, scheme, rows, cols))

    def plain(name: str, *shape: int) -> OutputGroup:
        tensor = OutputTensor(name, torch.bfloat16, shape)
        return OutputGroup((tensor,), partial(pool.linear, BF16, *shape))

    def norm(name: str, size: int) -> OutputGroup:
        tensor = OutputTensor(f"{name}.weight", torch.bfloat16, (size,))
        return OutputGroup((tensor,), lambda: [torch.ones(size, dtype=torch.bfloat16)])

    def mlp(name: str, width: int) -> Iterator[OutputGroup]:
        yield linear(f"{name}.gate_proj", width, h)
        yield linear(f"{name}.up_proj", width, h)
        yield linear(f"{name}.down_proj", h, width)

    yield plain("model.embed_tokens.weight", vocab, h)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attn = f"{layer}.self_attn"
        if config.q_lora_rank is None:
            yield linear(f"{attn}.q_proj", heads * config.qk_head_dim, h)
        else:
            yield linear(f"{attn}.q_a_proj", config.q_lora_rank, h)
            yield norm(f"{attn}.q_a_layernorm", config.q_lora_rank)
            yield linear(f"{attn}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
        yield linear(f"{attn}.kv_a_proj_with_mqa", config.latent_dim, h)
        yield norm(f"{attn}.kv_a_layernorm", config.kv_lora_rank)
        kv_b_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        yield linear(f"{attn}.kv_b_proj", kv_b_rows, config.kv_lora_rank)
        yield linear(f"{attn}.o_proj", h, heads * config.v_head_dim)
        if config.is_moe_layer(index):
            experts, width = config.n_routed_experts, config.moe_intermediate_size
            yield plain(f"{layer}.mlp.gate.weight", experts, h)
            if config.router.has_bias:
                bias = f"{layer}.mlp.gate.e_score_correction_bias"
                tensor = OutputTensor(bias, torch.float32, (experts,))
                yield OutputGroup((tensor,), partial(pool.bias, experts))
            for expert in range(experts):
                yield from mlp(f"{layer}.mlp.experts.{expert}", width)
            if config.n_shared_experts:
                yield from mlp(f"{layer}.mlp.shared_experts", width * config.n_shared_experts)
        else:
            yield from mlp(f"{layer}.mlp", config.intermediate_size)
        yield norm(f"{layer}.input_layernorm", h)
        yield norm(f"{layer}.post_attention_layernorm", h)
    yield norm("model.norm", h)
    if not config.tie_word_embeddings:
        yield plain("lm_head.weight", vocab, h)


class _Pool:
    """Random numbers in every stored form, made once and handed out from random places."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.normal = torch.randn(_POOL, generator=self.generator)
        self.cache: dict[tuple[torch.dtype, float], torch.Tensor] = {}

    def linear(self, scheme: QuantScheme, rows: int, cols: int) -> Sequence[torch.Tensor]:
        """Stored tensors of a [rows, cols] weight of standard deviation cols^-0.5."""
        sigma = cols**-0.5
        if scheme is BF16:
            return [self._take(torch.bfloat16, sigma, rows, cols)]
        if scheme is W8A8_INT8:
            codes = self._take(torch.int8, 127 / _RANGE, rows, cols)
            return [codes, self._scales(sigma * _RANGE / 127, (rows, 1))]
        assert scheme is FP8_BLOCK
        codes = self._take(torch.float8_e4m3fn, 448 / _RANGE, rows, cols)
        shape = scheme.companions[0].shape(rows, cols)
        return [codes, self._scales(sigma * _RANGE / 448, shape)]

    def bias(self, size: int) -> Sequence[torch.Tensor]:
        """A router's correction bias: small beside scores between 0 and 1."""
        return [0.01 * torch.randn(size, generator=self.generator)]

    def _scales(self, value: float, shape: tuple[int, ...]) -> torch.Tensor:
        return value * (0.9 + 0.2 * torch.rand(shape, generator=self.generator))

    def _take(self, dtype: torch.dtype, factor: float, rows: int, cols: int) -> torch.Tensor:
        key = (dtype, factor)
        if key not in self.cache:
            scaled = self.normal * factor
            if dtype is torch.int8:
                scaled = scaled.round().clamp(-127, 127)
            elif dtype is torch.float8_e4m3fn:
                scaled = scaled.clamp(-448, 448)
            self.cache[key] = scaled.to(dtype)
        source = self.cache[key].view(torch.uint8)
        size = dtype.itemsize
        count = rows * cols * size
        start = int(torch.randint(_POOL, (), generator=self.generator)) * size
        out = torch.empty(count, dtype=torch.uint8)
        done = 0
        while done < count:
            step = min(count - done, source.numel() - start)
            out[done : done + step] = source[start : start + step]
            done += step
            start = 0
        return out.view(dtype).view(rows, cols)
