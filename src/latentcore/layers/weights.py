"""A model's weights in memory, as the forward pass reads them.

Vectors are contiguous float32 tensors; matrices are PackedWeights; the embedding alone is a plain
bfloat16 tensor, since it is looked up row by row. `h` is the hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch

from latentcore.quant.packed import PackedWeight


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's multi-head latent attention, with its input norm.

    Either `q_a`, `q_a_norm` and `q_b` are there (the query has a latent), or `q` is.
    """

    input_norm: torch.Tensor
    """float32 [h]"""
    q_a: PackedWeight | None
    """[q_lora_rank, h]"""
    q_a_norm: torch.Tensor | None
    """float32 [q_lora_rank]"""
    q_b: PackedWeight | None
    """[heads x (nope + rope), q_lora_rank]"""
    q: PackedWeight | None
    """[heads x (nope + rope), h]"""
    kv_a: PackedWeight
    """[kv_lora_rank + rope, h]"""
    kv_a_norm: torch.Tensor
    """float32 [kv_lora_rank]"""
    kv_b: PackedWeight
    """[heads x (nope + v), kv_lora_rank], for un-absorbed prefill"""
    w_kc: PackedWeight
    """batch heads, [kv_lora_rank, nope]: takes a head's query into the latent space"""
    w_vc: PackedWeight
    """batch heads, [v, kv_lora_rank]: takes a head's latent out of it"""
    o: PackedWeight
    """[h, heads x v]"""


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """A gated MLP of some width: a dense layer's, or a MoE layer's shared experts."""

    gate_up: PackedWeight
    """two parts of [width, h]"""
    down: PackedWeight
    """[h, width]"""


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """A mixture of experts."""

    router: PackedWeight
    """F32 or BF16, [experts, h]"""
    router_bias: torch.Tensor | None
    """float32 [experts]; None for softmax routers"""
    experts_gate_up: PackedWeight
    """batch experts, two parts of [width, h]"""
    experts_down: PackedWeight
    """batch experts, [h, width]"""
    shared: MlpWeights | None
    """width n_shared_experts x moe_intermediate_size"""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attention: AttentionWeights
    post_attention_norm: torch.Tensor
    """float32 [h]"""
    ffn: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole model."""

    embed: torch.Tensor
    """bfloat16 [vocabulary, h]"""
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    """float32 [h]"""
    lm_head: PackedWeight
    """BF16 [vocabulary, h]; packed from `embed` where the two are tied"""

    def matrices(self) -> Iterator[PackedWeight]:
        """Every packed matrix, in the model's order."""
        for layer in self.layers:
            yield from _matrices(layer)
        yield self.lm_head


def _matrices(value: object) -> Iterator[PackedWeight]:
    if isinstance(value, PackedWeight):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _matrices(getattr(value, field.name))
