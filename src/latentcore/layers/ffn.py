"""Feed-forward part of one layer: a dense MLP or a mixture of experts."""

from latentcore.config import ModelConfig
from latentcore.layers.step import Buffers, Step
from latentcore.layers.weights import MlpWeights, MoeWeights
from latentcore.ops import dense, moe


class Mlp:
    """A dense layer's MLP: b.normed [rows, h] to b.delta [rows, h]."""

    def __init__(self, weights: MlpWeights) -> None:
        self.weights = weights

    def forward(self, step: Step, b: Buffers) -> None:
        """Runs the op."""
        n = step.rows
        dense.mlp(b.normed[:n], self.weights.gate_up, self.weights.down, b.delta[:n])


class Moe:
    """Router, routed and shared experts: b.normed [rows, h] to b.delta [rows, h]."""

    def __init__(self, config: ModelConfig, weights: MoeWeights) -> None:
        self.router = config.router
        self.weights = weights

    def forward(self, step: Step, b: Buffers) -> None:
        """Chooses experts, then runs them."""
        n, w = step.rows, self.weights
        self._route(step, b)
        ids, weights = b.expert_ids[:n], b.expert_weights[:n]
        x, out = b.normed[:n], b.delta[:n]
        if w.shared is None:
            moe.moe(x, ids, weights, w.experts_gate_up, w.experts_down, out)
        else:
            moe.moe_shared(
                x,
                ids,
                weights,
                w.experts_gate_up,
                w.experts_down,
                w.shared.gate_up,
                w.shared.down,
                out,
            )

    def _route(self, step: Step, b: Buffers) -> None:
        n, r = step.rows, self.router
        choice = (
            r.n_group,
            r.topk_group,
            r.top_k,
            r.norm_topk_prob,
            r.routed_scaling_factor,
            b.expert_ids[:n],
            b.expert_weights[:n],
        )
        if self.weights.router_bias is not None:
            moe.route_sigmoid(b.normed[:n], self.weights.router, self.weights.router_bias, *choice)
        else:
            moe.route_softmax(b.normed[:n], self.weights.router, *choice)


def build_ffn(config: ModelConfig, weights: MlpWeights | MoeWeights) -> Mlp | Moe:
    """The layer that these weights call for."""
    return Moe(config, weights) if isinstance(weights, MoeWeights) else Mlp(weights)
