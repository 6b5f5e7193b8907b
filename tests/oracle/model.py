"""The DeepSeek decoder written for reading: fp64, one sequence, every step as its formula says.

It is the truth for weights that transformers does not run, and shares no code with the package.
With `rounding` on it rounds to bf16 after each operation and becomes the yardstick: how far from
the truth a careful bf16 implementation of the same model lands.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle.quantizers import dequantize, int8_rows

F64 = torch.float64


class Linear:
    """One stored weight, applied as its format says."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, rounding: bool) -> None:
        suffixes = ("weight", "weight_scale", "weight_scale_inv")
        stored = {s: tensors[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in tensors}
        self.weight = dequantize(stored)
        self.quantized = "weight_scale" in stored
        self.rounding = rounding

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, cols] to [n, rows]; int8 quantizes the rows of x, as bf16 holds them."""
        if self.quantized:
            codes, scale = int8_rows(x.to(torch.float32).to(torch.bfloat16))
            x = codes.to(F64) * scale.to(F64)
        return self.plain(x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The same on activations as they are."""
        return rounded(x @ self.weight.t(), self.rounding)


def rounded(x: torch.Tensor, rounding: bool) -> torch.Tensor:
    """x, in bf16's precision where `rounding` is on."""
    return x.to(torch.float32).to(torch.bfloat16).to(F64) if rounding else x


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1.0 + torch.exp(-x))


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling, from either spelling of a config."""
    newer = config.get("rope_parameters")
    if newer is not None:
        return {**newer, "type": newer["rope_type"]}
    return {"type": "default", "rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}


def mscale(factor: float, weight: float) -> float:
    """How yarn magnifies queries and keys when it stretches positions by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def rope_angles(config: Mapping[str, Any], length: int) -> torch.Tensor:
    """Angles of positions 0 to length - 1: [length, rope / 2]."""
    rope, dim = rope_settings(config), config["qk_rope_head_dim"]
    theta = rope["rope_theta"]
    pairs = range(dim // 2)
    frequencies = [theta ** (-2 * i / dim) for i in pairs]
    if rope["type"] == "yarn":
        original = rope["original_max_position_embeddings"]

        def pair_turning(times: float) -> float:
            return float(dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta)))

        low = max(math.floor(pair_turning(rope.get("beta_fast", 32))), 0)
        high: float = min(math.ceil(pair_turning(rope.get("beta_slow", 1))), dim - 1)
        high = high + 0.001 if low == high else high
        share = [min(max((i - low) / (high - low), 0.0), 1.0) for i in pairs]
        factor = rope["factor"]
        frequencies = [
            f / factor * s + f * (1 - s) for f, s in zip(frequencies, share, strict=True)
        ]
    return torch.arange(length, dtype=F64)[:, None] * torch.tensor(frequencies, dtype=F64)


def rope_factors(config: Mapping[str, Any]) -> tuple[float, float]:
    """What cos and sin are multiplied by, and what the softmax scale is."""
    rope = rope_settings(config)
    head_dim = int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    scale = 1.0 / math.sqrt(head_dim)
    if rope["type"] != "yarn":
        return 1.0, scale
    factor, one, every = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    by_angle: float = (
        mscale(factor, one) / mscale(factor, every) if one and every else mscale(factor, 1.0)
    )
    return by_angle, scale * mscale(factor, every or 0.0) ** 2


def rotate(x: torch.Tensor, angles: torch.Tensor, factor: float) -> torch.Tensor:
    """Rotates the pairs (2i, 2i + 1) of x [length, ..., dim] by angles [length, dim / 2]."""
    shape = [angles.shape[0]] + [1] * (x.dim() - 2) + [angles.shape[1]]
    cos, sin = angles.cos().view(shape) * factor, angles.sin().view(shape) * factor
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def choice_scores(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What experts are chosen by, for router logits [n, experts]: fp64 [n, experts]."""
    scores = torch.softmax(logits, dim=-1) if bias is None else torch.sigmoid(logits)
    return scores if bias is None else scores + bias.to(F64)


def _group_scores(config: Mapping[str, Any], choice: torch.Tensor, best: int) -> torch.Tensor:
    """The mean of the `best` largest scores of each group: [n, groups]."""
    groups = choice.view(choice.shape[0], config["n_group"], -1)
    return groups.topk(best, dim=-1).values.mean(dim=-1)


def _limited(config: Mapping[str, Any]) -> bool:
    return bool(config["topk_method"] != "greedy" and config["n_group"] > 1)


def choose_experts(
    config: Mapping[str, Any], logits: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Experts [n, k] for router logits [n, experts].

    Experts of groups that do not take part are excluded (-inf), ties go to the lowest index.
    """
    n, experts = logits.shape
    choice = choice_scores(logits, bias)
    if _limited(config):
        group_scores = _group_scores(config, choice, 1 if bias is None else 2)
        ranks = group_scores.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, ranks[:, : config["topk_group"]], True)
        groups = choice.view(n, config["n_group"], -1)
        choice = groups.masked_fill(~kept[..., None], -math.inf).view(n, experts)
    return choice.argsort(dim=-1, descending=True, stable=True)[:, : config["num_experts_per_tok"]]


def expert_weights(
    config: Mapping[str, Any], logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor
) -> torch.Tensor:
    """Weights [n, k] of the experts `ids` [n, k] for router logits [n, experts]."""
    scores = torch.softmax(logits, dim=-1) if bias is None else torch.sigmoid(logits)
    weights = scores.gather(1, ids)
    if config["norm_topk_prob"] and bias is not None:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * config["routed_scaling_factor"]


def overreach(
    config: Mapping[str, Any], choice: torch.Tensor, ids: torch.Tensor, biased: bool
) -> torch.Tensor:
    """How far scores [n, experts] lie from letting the experts `ids` [n, k] be chosen: [n].

    0 where they are the best. Else some expert (or group) that was left out scores higher than one
    that was taken, by this much, whichever groups one says took part: a router whose scores are off
    by less than half of it cannot have made this choice.
    """
    n, experts = choice.shape
    taken = torch.zeros(n, experts, dtype=torch.bool).scatter_(1, ids, True)

    def deficit(scores: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        worst = scores.masked_fill(~inside, math.inf).amin(dim=-1)
        best = scores.masked_fill(~outside, -math.inf).amax(dim=-1)
        return (best - worst).clamp(min=0.0)

    if not _limited(config):
        return deficit(choice, taken, ~taken)
    groups = _group_scores(config, choice, 2 if biased else 1)
    size = experts // config["n_group"]
    least = torch.full((n,), math.inf, dtype=F64)
    for chosen in itertools.combinations(range(config["n_group"]), config["topk_group"]):
        kept = torch.zeros(config["n_group"], dtype=torch.bool)
        kept[list(chosen)] = True
        allowed = kept.repeat_interleave(size)
        found = torch.maximum(
            deficit(groups, kept.expand_as(groups), ~kept.expand_as(groups)),
            deficit(choice, taken, allowed & ~taken),
        )
        found = found.masked_fill((taken & ~allowed).any(dim=-1), math.inf)
        least = torch.minimum(least, found)
    return least


@dataclass(frozen=True)
class Run:
    """What became of a token sequence.

    logits   fp64 [length, vocabulary]
    chosen   experts of each MoE layer: int64 [length, k] each
    choice   the scores that they are chosen by: fp64 [length, experts] each
    """

    logits: torch.Tensor
    chosen: list[torch.Tensor] = field(default_factory=list)
    choice: list[torch.Tensor] = field(default_factory=list)


class Model:
    """A checkpoint (config and tensors by their published names) as fp64 arithmetic."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], rounding: bool = False
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.rounding = rounding
        self.linears: dict[str, Linear] = {}

    def logits(self, token_ids: list[int], absorbed_from: int) -> torch.Tensor:
        """Logits of every position: fp64 [length, vocabulary]; see `run`."""
        return self.run(token_ids, absorbed_from).logits

    def run(
        self,
        token_ids: list[int],
        absorbed_from: int,
        chosen: Sequence[torch.Tensor] | None = None,
    ) -> Run:
        """Runs a whole sequence.

        Positions from `absorbed_from` on attend absorbed, as decoding does: they take `kv_b_proj`
        for its dequantized weights, while earlier ones run it as a linear of its format. `chosen`
        [length, k] of each MoE layer takes the place of the router's choice; the experts' weights
        are still the router's.
        """
        config = self.config
        routed: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        x = self.tensors["model.embed_tokens.weight"].to(F64)[token_ids]
        angles = rope_angles(config, len(token_ids))
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = self._norm(x, f"{name}.input_layernorm", config["rms_norm_eps"])
            x = self._round(x + self._attend(name, normed, angles, absorbed_from))
            normed = self._norm(x, f"{name}.post_attention_layernorm", config["rms_norm_eps"])
            if self._routed(layer):
                router = self._router_logits(f"{name}.mlp", normed)
                bias = self._router_bias(f"{name}.mlp")
                scores.append(choice_scores(router, bias))
                if chosen is None:
                    ids = choose_experts(config, router, bias)
                else:
                    ids = chosen[len(routed)]
                routed.append(ids)
                weights = expert_weights(config, router, bias, ids)
                out = self._experts(f"{name}.mlp", normed, ids, weights)
            else:
                out = self._mlp(f"{name}.mlp", normed)
            x = self._round(x + out)
        x = self._norm(x, "model.norm", config["rms_norm_eps"])
        head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        logits = x @ self.tensors[f"{head}.weight"].to(F64).t()
        return Run(logits, routed, scores)

    def _routed(self, layer: int) -> bool:
        config = self.config
        if not config["n_routed_experts"] or layer < config["first_k_dense_replace"]:
            return False
        return layer % config.get("moe_layer_freq", 1) == 0

    def _router_logits(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[f"{name}.gate.weight"].to(F64).t()

    def _router_bias(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(f"{name}.gate.e_score_correction_bias")

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, self.rounding)

    def _linear(self, name: str) -> Linear:
        if name not in self.linears:
            self.linears[name] = Linear(self.tensors, name, self.rounding)
        return self.linears[name]

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        normed = self._round(x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt())
        return self._round(normed * self.tensors[f"{name}.weight"].to(F64))

    def _attend(
        self, layer: str, x: torch.Tensor, angles: torch.Tensor, absorbed_from: int
    ) -> torch.Tensor:
        c, name, length = self.config, f"{layer}.self_attn", x.shape[0]
        heads, nope, v_dim = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
        rank = c["kv_lora_rank"]
        if c["q_lora_rank"] is None:
            q = self._linear(f"{name}.q_proj")(x)
        else:
            low = self._linear(f"{name}.q_a_proj")(x)
            low = self._norm(low, f"{name}.q_a_layernorm", 1e-6)
            q = self._linear(f"{name}.q_b_proj")(low)
        q = q.view(length, heads, -1)
        kv = self._linear(f"{name}.kv_a_proj_with_mqa")(x)
        latent = self._norm(kv[:, :rank], f"{name}.kv_a_layernorm", 1e-6)
        by_angle, scale = rope_factors(c)
        q_rope = self._round(rotate(q[..., nope:], angles, by_angle))
        k_rope = self._round(rotate(kv[:, rank:], angles, by_angle))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

        def attend(expanded: torch.Tensor) -> torch.Tensor:
            k_nope, v = torch.split(expanded.view(length, heads, -1), [nope, v_dim], dim=-1)
            scores = torch.einsum("qhd,khd->hqk", q[..., :nope], k_nope)
            scores = (scores + torch.einsum("qhd,kd->hqk", q_rope, k_rope)) * scale
            probabilities = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
            return self._round(torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1))

        kv_b = self._linear(f"{name}.kv_b_proj")
        attended = attend(kv_b(latent))
        if absorbed_from < length:
            attended[absorbed_from:] = attend(kv_b.plain(latent))[absorbed_from:]
        return self._linear(f"{name}.o_proj")(attended)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = self._round(silu(self._linear(f"{name}.gate_proj")(x)))
        up = self._linear(f"{name}.up_proj")(x)
        return self._linear(f"{name}.down_proj")(self._round(gate * up))

    def _experts(
        self, name: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in torch.unique(ids).tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            y = self._mlp(f"{name}.experts.{expert}", x[rows])
            out[rows] = self._round(out[rows] + self._round(y * weights[rows, slots, None]))
        if self.config["n_shared_experts"]:
            out = self._round(out + self._mlp(f"{name}.shared_experts", x))
        return out
