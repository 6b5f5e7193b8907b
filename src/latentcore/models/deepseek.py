"""The DeepSeek decoder (V2, V3, R1, V3.1 and what shares their architecture), op by op."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from latentcore.config import ModelConfig, rope_table
from latentcore.layers.attention import Attention
from latentcore.layers.ffn import Mlp, Moe, build_ffn
from latentcore.layers.step import Buffers, Limits, Step, latent_row
from latentcore.layers.weights import ModelWeights
from latentcore.models.logits import StepLogits
from latentcore.ops import dense, sampling


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and feed-forward with the norms before them."""

    input_norm: torch.Tensor
    attention: Attention
    post_attention_norm: torch.Tensor
    ffn: Mlp | Moe


class DeepseekDecoder:
    """The forward pass over fixed buffers; all state is the latent cache.

    On the meta device (weights made by PackedWeight.fake) the same code runs every op's checks
    without memory: `preflight` uses it so.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, limits: Limits, device: torch.device
    ) -> None:
        self.config = config
        self.limits = limits
        self.weights = weights
        self.buffers = Buffers(config, limits, device)
        table = rope_table(config.rope, 1 if device.type == "meta" else limits.max_position)
        self.rope_table = (
            torch.empty(limits.max_position, config.rope.dim, device=device)
            if device.type == "meta"
            else table
        )
        self.cache = [
            torch.empty(
                (limits.num_blocks, limits.block_size, latent_row(config)),
                dtype=torch.bfloat16,
                device=device,
            )
            for _ in weights.layers
        ]
        self.layers = [
            DecoderLayer(
                w.attention.input_norm,
                Attention(config, w.attention, cache, self.rope_table),
                w.post_attention_norm,
                build_ffn(config, w.ffn),
            )
            for w, cache in zip(weights.layers, self.cache, strict=True)
        ]

    def forward(self, step: Step) -> torch.Tensor:
        """The normed last hidden states of the loaded step, bf16 [rows, h] (a view of a buffer)."""
        for _ in self.run_layers(step):
            pass
        return self.buffers.normed[: step.rows]

    def run_layers(self, step: Step) -> Iterator[DecoderLayer]:
        """Computes the loaded step, and gives each layer when it is done.

        The buffers then hold what that layer left: its choice of experts, say.
        """
        b, n, eps = self.buffers, step.rows, self.config.rms_norm_eps
        residual, normed, delta = b.residual[:n], b.normed[:n], b.delta[:n]
        dense.embedding(self.weights.embed, b.token_ids[:n], residual)
        dense.rms_norm(residual, self.layers[0].input_norm, eps, normed)
        after = [layer.input_norm for layer in self.layers[1:]] + [self.weights.final_norm]
        for layer, next_norm in zip(self.layers, after, strict=True):
            layer.attention.forward(step, b)
            dense.add_rms_norm(residual, delta, layer.post_attention_norm, eps, normed)
            layer.ffn.forward(step, b)
            dense.add_rms_norm(residual, delta, next_norm, eps, normed)
            yield layer

    def logits(self, hidden: torch.Tensor, out: StepLogits) -> None:
        """Logits of `hidden`, bf16 [rows, h], and each row's likeliest token, into `out`."""
        dense.logits(hidden, self.weights.lm_head, out.values)
        sampling.greedy(out.values, out.best)
