"""Multi-head latent attention of one layer."""

import torch

from latentcore.config import ModelConfig
from latentcore.layers.step import Buffers, Step
from latentcore.layers.weights import AttentionWeights
from latentcore.ops import dense, mla


class Attention:
    """From the normed stream to the layer's delta; writes the layer's latent cache on the way."""

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        cache: torch.Tensor,
        rope_table: torch.Tensor,
    ) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.rope_table = rope_table

    def forward(self, step: Step, b: Buffers) -> None:
        """b.normed [rows, h] to b.delta [rows, h]."""
        n = step.rows
        self._project(step, b)
        if step.absorbed:
            rows = step.absorbed
            mla.mla_decode_attention(
                b.q_latent[:rows],
                self.weights.w_vc,
                b.positions[:rows],
                b.row_seq[:rows],
                b.block_tables,
                self.cache,
                self.config.softmax_scale,
                b.attended[:rows],
            )
        if step.absorbed < n:
            mla.mla_prefill_attention(
                b.q[:n],
                self.weights.kv_b,
                step.segments,
                b.block_tables,
                self.cache,
                self.config.kv_lora_rank,
                self.config.qk_rope_head_dim,
                self.config.v_head_dim,
                self.config.softmax_scale,
                b.attended[:n],
            )
        dense.linear(b.attended[:n], self.weights.o, b.delta[:n])

    def _project(self, step: Step, b: Buffers) -> None:
        w, n = self.weights, step.rows
        shared = (
            w.kv_a,
            w.kv_a_norm,
            w.w_kc,
            self.config.inner_norm_eps,
            self.rope_table,
            b.positions[:n],
            b.row_seq[:n],
            b.block_tables,
            self.cache,
            step.absorbed,
            b.q[:n],
            b.q_latent[:n],
        )
        if w.q is not None:
            mla.mla_input_direct(b.normed[:n], w.q, *shared)
        else:
            assert w.q_a is not None and w.q_a_norm is not None and w.q_b is not None
            mla.mla_input_lora(b.normed[:n], w.q_a, w.q_a_norm, w.q_b, *shared)
