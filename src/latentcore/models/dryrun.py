"""Runs the real model code on tensors without memory, so that every call meets every op's checks.

The weights are PackedWeight.fake, buffers and cache lie on the meta device: an op then runs the
same C++ checks as with data, and nothing else. A disagreement between a kernel, its weights and its
call site shows here, in about a second, before any weight is read.
"""

from collections.abc import Iterator

import torch

from latentcore.config import EngineConfig, ModelConfig
from latentcore.errors import LatentcoreError
from latentcore.layers.step import Limits, Step
from latentcore.layers.weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)
from latentcore.models.deepseek import DeepseekDecoder
from latentcore.models.logits import StepLogits
from latentcore.models.resolve import (
    LayerPlan,
    MatrixPlan,
    MlpPlan,
    ModelPlan,
    MoePlan,
    PlainPlan,
)
from latentcore.ops import dense, mla, runtime
from latentcore.quant.packed import Format, PackedWeight

_META = torch.device("meta")


class ContractError(LatentcoreError):
    """An op refused what the model's own code handed it: a bug of latentcore's, not the user's."""


def _matrix(plan: MatrixPlan) -> PackedWeight:
    return PackedWeight.fake(plan.format, plan.batch, plan.parts, plan.rows, plan.cols)


def _vector(plan: PlainPlan) -> torch.Tensor:
    return torch.empty(plan.size, dtype=torch.float32, device=_META)


def _mlp(plan: MlpPlan) -> MlpWeights:
    return MlpWeights(gate_up=_matrix(plan.gate_up), down=_matrix(plan.down))


def _moe(config: ModelConfig, plan: MoePlan) -> MoeWeights:
    router = PackedWeight.fake(
        plan.router_format, 1, 1, config.n_routed_experts, config.hidden_size
    )
    return MoeWeights(
        router=router,
        router_bias=_vector(plan.router_bias) if plan.router_bias else None,
        experts_gate_up=_matrix(plan.experts_gate_up),
        experts_down=_matrix(plan.experts_down),
        shared=_mlp(plan.shared) if plan.shared else None,
    )


def _layer(config: ModelConfig, plan: LayerPlan) -> LayerWeights:
    a = plan.attention
    kv_b = a.kv_b
    return LayerWeights(
        attention=AttentionWeights(
            input_norm=_vector(a.input_norm),
            q_a=_matrix(a.q_a) if a.q_a else None,
            q_a_norm=_vector(a.q_a_norm) if a.q_a_norm else None,
            q_b=_matrix(a.q_b) if a.q_b else None,
            q=_matrix(a.q) if a.q else None,
            kv_a=_matrix(a.kv_a),
            kv_a_norm=_vector(a.kv_a_norm),
            kv_b=_matrix(kv_b.linear),
            w_kc=PackedWeight.fake(kv_b.format, kv_b.heads, 1, kv_b.rank, kv_b.nope),
            w_vc=PackedWeight.fake(kv_b.format, kv_b.heads, 1, kv_b.v, kv_b.rank),
            o=_matrix(a.o),
        ),
        post_attention_norm=_vector(plan.post_attention_norm),
        ffn=_moe(config, plan.ffn) if isinstance(plan.ffn, MoePlan) else _mlp(plan.ffn),
    )


def fake_weights(plan: ModelPlan) -> ModelWeights:
    """The weights that `plan` will become, without memory."""
    config = plan.config
    return ModelWeights(
        embed=torch.empty(
            (config.vocab_size, config.hidden_size), dtype=torch.bfloat16, device=_META
        ),
        layers=[_layer(config, layer) for layer in plan.layers],
        final_norm=_vector(plan.final_norm),
        lm_head=PackedWeight.fake(Format.BF16, 1, 1, config.vocab_size, config.hidden_size),
    )


def _steps(limits: Limits) -> Iterator[tuple[str, int, int, int]]:
    """What is run: name, rows, absorbed rows, un-absorbed chunks."""
    most, block = limits.max_tokens, limits.block_size
    yield "prefill of one token", 1, 0, 1
    yield "prefill in one chunk", min(most, block + 1), 0, 1
    yield "prefill, the largest chunk", most, 0, 1
    yield "prefill of several sequences", min(most, 3 * block + 1), 0, min(3, limits.max_seqs)
    yield "short prompt after a prefix hit", min(most, 17), min(most, 17), 0
    if limits.max_seqs > 1 and most > block + 1:
        yield "mixed batch", block + 1, 1, 1


def dry_run(plan: ModelPlan, engine: EngineConfig, limits: Limits) -> list[str]:
    """Drives prefill, decode at every batch size, mixed batches and capture through all checks.

    Returns the names of the steps that were run. Raises ContractError with the op's own message.
    """
    config = plan.config
    decoder = DeepseekDecoder(config, fake_weights(plan), limits, _META)
    done: list[str] = []
    try:
        for name, rows, absorbed, chunks in _steps(limits):
            _load(decoder, rows, max(1, chunks))
            _eager(decoder, rows, absorbed, chunks)
            done.append(name)
        for batch in range(1, engine.max_num_seqs + 1):
            _load(decoder, batch, batch)
            if engine.use_graph:
                with runtime.Graph.capture() as graph:
                    _decode(decoder, batch)
                graph.free()
            else:
                _decode(decoder, batch)
        done.append(f"decode of 1 to {engine.max_num_seqs} sequences")
    except (RuntimeError, TypeError) as error:
        message = str(error).splitlines()[0]
        where = done[-1] if done else "the start"
        raise ContractError(f"after {where}: {message}") from error
    return done


def _load(decoder: DeepseekDecoder, rows: int, sequences: int) -> None:
    limits, b = decoder.limits, decoder.buffers

    def int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=_META)

    mla.load_step(
        int32(rows),
        int32(rows),
        int32(rows),
        int32(sequences, limits.table_width),
        decoder.config.vocab_size,
        limits.num_blocks,
        limits.block_size,
        limits.max_position,
        b.token_ids,
        b.positions,
        b.row_seq,
        b.block_tables,
    )


def _eager(decoder: DeepseekDecoder, rows: int, absorbed: int, chunks: int) -> None:
    segments = torch.empty((chunks, 4), dtype=torch.int32, device=_META)
    hidden = decoder.forward(Step(rows, absorbed, segments))
    wanted = max(1, chunks)
    gathered = torch.empty((wanted, hidden.shape[1]), dtype=torch.bfloat16, device=_META)
    dense.embedding(hidden, decoder.buffers.logit_rows[:wanted], gathered)
    _logits(decoder, gathered)


def _decode(decoder: DeepseekDecoder, batch: int) -> None:
    segments = torch.empty((0, 4), dtype=torch.int32, device=_META)
    _logits(decoder, decoder.forward(Step(batch, batch, segments)))


def _logits(decoder: DeepseekDecoder, hidden: torch.Tensor) -> None:
    decoder.logits(hidden, StepLogits.empty(len(hidden), decoder.config.vocab_size, _META))
