"""What a step costs at least: bytes that must be read, and operations by the format they run in."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from latentcore.config import ModelConfig
from latentcore.layers.step import latent_row
from latentcore.layers.weights import AttentionWeights, MlpWeights, ModelWeights, MoeWeights
from latentcore.models.chunk import SequenceChunk
from latentcore.quant.packed import Format, PackedWeight


@dataclass
class Cost:
    """Least work.

    nbytes      distinct bytes of packed weights and latent cache; activations are left out
    operations  a multiplication and an addition are two, by the format that they are done in
    """

    nbytes: float = 0.0
    operations: dict[Format, float] = field(default_factory=lambda: defaultdict(float))

    def __add__(self, other: "Cost") -> "Cost":
        total = Cost(self.nbytes + other.nbytes)
        for part in (self, other):
            for fmt, count in part.operations.items():
                total.operations[fmt] += count
        return total

    def multiply(self, weight: PackedWeight, rows: float) -> None:
        """Adds `rows` rows multiplied by every matrix of `weight`, which is read once."""
        self.nbytes += weight.nbytes
        count = weight.batch * weight.parts * weight.rows * weight.cols
        self.operations[weight.format] += 2.0 * rows * count


@dataclass(frozen=True)
class StepCost:
    """A step's least work by kernel name, and the distinct experts that each MoE layer touched."""

    kernels: Mapping[str, Cost]
    experts: tuple[int, ...]

    @property
    def total(self) -> Cost:
        """The whole step."""
        return sum(self.kernels.values(), Cost())


def step_cost(
    config: ModelConfig,
    weights: ModelWeights,
    chunks: Sequence[SequenceChunk],
    experts: Sequence[int],
) -> StepCost:
    """The least work of computing `chunks` in one pass.

    `experts` says how many distinct experts the rows chose, for each MoE layer in order.
    """
    costs: defaultdict[str, Cost] = defaultdict(Cost)
    rows = sum(len(chunk.token_ids) for chunk in chunks)
    wanted = sum(_wanted(chunk) for chunk in chunks)
    touched = iter(experts)
    for layer in weights.layers:
        _attention(costs, config, layer.attention, chunks, rows)
        if isinstance(layer.ffn, MlpWeights):
            _mlp(costs["mlp"], layer.ffn, rows)
        else:
            _moe(costs, config, layer.ffn, rows, next(touched))
    costs["linear"].multiply(weights.lm_head, wanted)
    return StepCost(dict(costs), tuple(experts))


def _attention(
    costs: Mapping[str, Cost],
    config: ModelConfig,
    w: AttentionWeights,
    chunks: Sequence[SequenceChunk],
    rows: int,
) -> None:
    absorbed = [chunk for chunk in chunks if chunk.path == "decode"]
    unabsorbed = [chunk for chunk in chunks if chunk.path == "prefill"]
    heads, latent = config.num_attention_heads, 2 * latent_row(config)
    project = costs["mla_input"]
    for matrix in (w.q, w.q_a, w.q_b, w.kv_a):
        if matrix is not None:
            project.multiply(matrix, rows)
    if absorbed:
        count = sum(len(chunk.token_ids) for chunk in absorbed)
        project.multiply(w.w_kc, count)
        attend = costs["mla_decode"]
        attend.nbytes += latent * _contexts(absorbed)
        pair = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        attend.operations[Format.BF16] += 2.0 * heads * pair * _pairs(absorbed)
        attend.multiply(w.w_vc, count)
    if unabsorbed:
        attend = costs["mla_prefill"]
        attend.nbytes += latent * _contexts(unabsorbed)
        pair = config.qk_head_dim + config.v_head_dim
        attend.operations[Format.BF16] += 2.0 * heads * pair * _pairs(unabsorbed)
        attend.multiply(w.kv_b, _contexts(unabsorbed))
    costs["linear"].multiply(w.o, rows)


def _mlp(cost: Cost, w: MlpWeights, rows: int) -> None:
    cost.multiply(w.gate_up, rows)
    cost.multiply(w.down, rows)


def _moe(
    costs: Mapping[str, Cost], config: ModelConfig, w: MoeWeights, rows: int, touched: int
) -> None:
    costs["route"].multiply(w.router, rows)
    cost, choices = costs["moe"], rows * config.num_experts_per_tok
    for matrix in (w.experts_gate_up, w.experts_down):
        cost.nbytes += touched * matrix.item_nbytes
        count = matrix.parts * matrix.rows * matrix.cols
        cost.operations[matrix.format] += 2.0 * choices * count
    if w.shared is not None:
        _mlp(cost, w.shared, rows)


def _wanted(chunk: SequenceChunk) -> int:
    return {"none": 0, "last": 1, "all": len(chunk.token_ids)}[chunk.logits]


def _contexts(chunks: Iterable[SequenceChunk]) -> int:
    """Latents that are read: each sequence's, once."""
    return sum(chunk.start + len(chunk.token_ids) for chunk in chunks)


def _pairs(chunks: Iterable[SequenceChunk]) -> float:
    """Pairs of a token and one that it attends to."""
    return sum(
        len(chunk.token_ids) * (chunk.start + (len(chunk.token_ids) + 1) / 2) for chunk in chunks
    )
