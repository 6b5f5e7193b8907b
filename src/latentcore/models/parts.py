"""The memory of a model's weights, part by part: embedding, each layer, last norm, output head.

A plan says which tensors there are; who asks for them says where they lie: `Anonymous` memory to be
packed into or read into, or `Meta` tensors that have no memory, for checks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol

import torch

from latentcore.config import ModelConfig
from latentcore.layers.weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)
from latentcore.models.resolve import (
    LayerPlan,
    MatrixPlan,
    MlpPlan,
    ModelPlan,
    MoePlan,
    PlainPlan,
)
from latentcore.quant.packed import Format, PackedWeight, huge_buffer

Part = torch.Tensor | PackedWeight | LayerWeights


class Memory(Protocol):
    """Where weights lie."""

    def packed(self, fmt: Format, batch: int, parts: int, rows: int, cols: int) -> PackedWeight:
        """A packed weight that is still to be filled."""

    def plain(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor that is still to be filled."""


class Anonymous:
    """Private memory, on huge pages where the system gives them."""

    def packed(self, fmt: Format, batch: int, parts: int, rows: int, cols: int) -> PackedWeight:
        """A packed weight whose header is written."""
        return PackedWeight.allocate(fmt, batch, parts, rows, cols)

    def plain(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor of zeros."""
        count = torch.Size(shape).numel()
        return huge_buffer(count * dtype.itemsize).view(dtype).view(shape)


class Meta:
    """No memory."""

    def packed(self, fmt: Format, batch: int, parts: int, rows: int, cols: int) -> PackedWeight:
        """A packed weight on the meta device."""
        return PackedWeight.fake(fmt, batch, parts, rows, cols)

    def plain(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor on the meta device."""
        return torch.empty(shape, dtype=dtype, device="meta")


def parts_of(plan: ModelPlan, memory: Memory) -> Iterator[tuple[str, Part]]:
    """Name and tensors of every part, one after the other, each made when it is asked for."""
    config = plan.config
    yield "embed", memory.plain(torch.bfloat16, config.vocab_size, config.hidden_size)
    for index, layer in enumerate(plan.layers):
        yield f"layers.{index}", _layer(config, layer, memory)
    yield "final_norm", _vector(plan.final_norm, memory)
    yield "lm_head", memory.packed(Format.BF16, 1, 1, config.vocab_size, config.hidden_size)


def assemble(parts: Iterable[tuple[str, Part]]) -> ModelWeights:
    """The model of all parts, in the order of `parts_of`."""
    embed, *layers, final_norm, lm_head = [part for _, part in parts]
    assert isinstance(embed, torch.Tensor)
    assert isinstance(final_norm, torch.Tensor)
    assert isinstance(lm_head, PackedWeight)
    return ModelWeights(
        embed=embed,
        layers=[layer for layer in layers if isinstance(layer, LayerWeights)],
        final_norm=final_norm,
        lm_head=lm_head,
    )


@dataclass(frozen=True)
class Buffer:
    """The memory of one tensor or packed weight.

    groups: equal pieces that are each shared out over all threads: a layer's experts, else 1.
    """

    name: str
    data: torch.Tensor
    groups: int


def buffers_of(name: str, part: object, groups: int = 1) -> Iterator[Buffer]:
    """The memory of everything in a part, in a fixed order."""
    if isinstance(part, torch.Tensor):
        yield Buffer(name, part, groups)
    elif isinstance(part, PackedWeight):
        yield Buffer(name, part.data, groups)
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            experts = isinstance(part, MoeWeights) and field.name.startswith("experts_")
            each = value.batch if experts else 1
            yield from buffers_of(f"{name}.{field.name}", value, each)


def buffers_of_model(weights: ModelWeights) -> Iterator[Buffer]:
    """The memory of a whole model."""
    yield from buffers_of("embed", weights.embed)
    for index, layer in enumerate(weights.layers):
        yield from buffers_of(f"layers.{index}", layer)
    yield from buffers_of("final_norm", weights.final_norm)
    yield from buffers_of("lm_head", weights.lm_head)


def _matrix(plan: MatrixPlan, memory: Memory) -> PackedWeight:
    return memory.packed(plan.format, plan.batch, plan.parts, plan.rows, plan.cols)


def _vector(plan: PlainPlan, memory: Memory) -> torch.Tensor:
    return memory.plain(torch.float32, plan.size)


def _mlp(plan: MlpPlan, memory: Memory) -> MlpWeights:
    return MlpWeights(gate_up=_matrix(plan.gate_up, memory), down=_matrix(plan.down, memory))


def _moe(config: ModelConfig, plan: MoePlan, memory: Memory) -> MoeWeights:
    shape = (config.n_routed_experts, config.hidden_size)
    return MoeWeights(
        router=memory.packed(plan.router_format, 1, 1, *shape),
        router_bias=_vector(plan.router_bias, memory) if plan.router_bias else None,
        experts_gate_up=_matrix(plan.experts_gate_up, memory),
        experts_down=_matrix(plan.experts_down, memory),
        shared=_mlp(plan.shared, memory) if plan.shared else None,
    )


def _layer(config: ModelConfig, plan: LayerPlan, memory: Memory) -> LayerWeights:
    a = plan.attention
    kv_b = a.kv_b
    return LayerWeights(
        attention=AttentionWeights(
            input_norm=_vector(a.input_norm, memory),
            q_a=_matrix(a.q_a, memory) if a.q_a else None,
            q_a_norm=_vector(a.q_a_norm, memory) if a.q_a_norm else None,
            q_b=_matrix(a.q_b, memory) if a.q_b else None,
            q=_matrix(a.q, memory) if a.q else None,
            kv_a=_matrix(a.kv_a, memory),
            kv_a_norm=_vector(a.kv_a_norm, memory),
            kv_b=_matrix(kv_b.linear, memory),
            w_kc=memory.packed(kv_b.format, kv_b.heads, 1, kv_b.rank, kv_b.nope),
            w_vc=memory.packed(kv_b.format, kv_b.heads, 1, kv_b.v, kv_b.rank),
            o=_matrix(a.o, memory),
        ),
        post_attention_norm=_vector(plan.post_attention_norm, memory),
        ffn=(
            _moe(config, plan.ffn, memory)
            if isinstance(plan.ffn, MoePlan)
            else _mlp(plan.ffn, memory)
        ),
    )
