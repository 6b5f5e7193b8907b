"""The demo model: DeepSeek-V3's architecture in miniature, in plain PyTorch.

Documents are packed one after another without padding; attention stays inside a document. Shapes:
T tokens of a batch, H hidden, E experts, K experts a token, I expert width.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """Sizes, in the names of the published configuration."""

    vocab_size: int = 4608
    hidden_size: int = 320
    intermediate_size: int = 704
    moe_intermediate_size: int = 112
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    q_lora_rank: int = 160
    kv_lora_rank: int = 96
    qk_nope_head_dim: int = 48
    qk_rope_head_dim: int = 16
    v_head_dim: int = 64
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 1.8
    first_k_dense_replace: int = 1
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    rope_factor: float = 4.0
    rope_original: int = 1024
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(width), times yarn's magnitude scale squared (mscale_all_dim 1)."""
        mscale = 0.1 * math.log(self.rope_factor) + 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    def to_hf(self) -> dict[str, Any]:
        """config.json as published checkpoints spell it."""
        own = {k: v for k, v in asdict(self).items() if not k.startswith("rope_")}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **own,
            "num_key_value_heads": self.num_attention_heads,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_theta": self.rope_theta,
            "rope_scaling": {
                "type": "yarn",
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.rope_original,
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
        }


def yarn_frequencies(c: Config) -> Tensor:
    """Angular frequencies f32[rope / 2]: slow ones are divided by the factor, fast ones kept."""
    dim = c.qk_rope_head_dim
    plain = c.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def dim_of(rotations: float) -> float:
        return (
            dim
            * math.log(c.rope_original / (rotations * 2 * math.pi))
            / (2 * math.log(c.rope_theta))
        )

    low = max(math.floor(dim_of(c.rope_beta_fast)), 0)
    high = min(math.ceil(dim_of(c.rope_beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return plain / c.rope_factor * (1 - keep) + plain * keep


@dataclass
class Packed:
    """A batch of packed documents.

    tokens i64[T]; bounds i32[documents + 1], the last ones may repeat T; segment i64[T], the
    document of a token; positions i64[T], counted within the document; longest: a bound on the
    length of a document.
    """

    tokens: Tensor
    bounds: Tensor
    segment: Tensor
    positions: Tensor
    longest: int

    @classmethod
    def of(cls, tokens: Tensor, bounds: Tensor, longest: int) -> "Packed":
        """Derive segments and positions."""
        place = torch.arange(tokens.numel(), device=tokens.device)
        segment = torch.bucketize(place, bounds[1:].long(), right=True)
        return cls(tokens, bounds, segment, place - bounds.long()[segment], longest)


class Linear(nn.Module):
    """A bias-free linear layer; weights are kept in f32 and used in the activation's dtype."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in f32, back to x's dtype before the weight as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, batch: Packed, scale: float) -> Tensor:
    """Causal attention inside each document. q, k, v [T, heads, width] -> [T, heads, width]."""
    if q.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            batch.bounds,
            batch.bounds,
            batch.longest,
            batch.longest,
            0.0,
            True,
            False,
            scale=scale,
        )[0]
    same = batch.segment[:, None] == batch.segment[None, :]
    mask = same & torch.ones_like(same).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rope on x [T, heads, rope]: pairs (2i, 2i+1); the order of outputs is free."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, un-absorbed."""

    def __init__(self, c: Config, out_std: float) -> None:
        super().__init__()
        self.c = c
        heads = c.num_attention_heads
        std = c.hidden_size**-0.5
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, std)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, c.q_lora_rank**-0.5)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, std)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank**-0.5
        )
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, out_std)

    def forward(self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor) -> Tensor:
        c, heads = self.c, self.c.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(-1, heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(-1, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out = attend(q, k, v.contiguous(), batch, c.softmax_scale)
        return self.o_proj(out.reshape(x.shape[0], -1))


class Mlp(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, hidden: int, width: int, out_std: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, hidden**-0.5)
        self.up_proj = Linear(hidden, width, hidden**-0.5)
        self.down_proj = Linear(width, hidden, out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Dispatch(torch.autograd.Function):
    """x [T, H] -> rows of the expert buffer [M, H]; the gradient is gathered, not scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_slot: Tensor, slot_of_entry: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_entry)
        return x[token_of_slot]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_entry,) = ctx.saved_tensors
        return grad[slot_of_entry].sum(1), None, None


class _Combine(torch.autograd.Function):
    """Rows of the expert buffer y [M, H] -> entries [T, K, H]."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slot_of_entry: Tensor, entry_of_slot: Tensor, real: Tensor
    ) -> Tensor:
        ctx.save_for_backward(entry_of_slot, real)
        return y[slot_of_entry]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        entry_of_slot, real = ctx.saved_tensors
        rows = grad.flatten(0, 1)[entry_of_slot]
        return torch.where(real[:, None], rows, torch.zeros_like(rows)), None, None, None


class Gate(nn.Module):
    """The sigmoid router without auxiliary loss; its bias is moved by the training loop."""

    e_score_correction_bias: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts i64[T, K] and their weights f32[T, K]."""
        c = self.c
        scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            groups = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            group_scores = groups.topk(2, -1).values.sum(-1)
            best = group_scores.topk(c.topk_group, -1).indices
            keep = torch.zeros_like(group_scores).scatter(1, best, 1.0).bool()
            masked = groups.masked_fill(~keep[..., None], float("-inf")).flatten(1)
            experts = masked.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts of a layer; their matrices are stacked for the grouped product."""

    ALIGN = 16

    def __init__(self, c: Config, out_std: float) -> None:
        super().__init__()
        e, h, i = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.count = e
        self.gate_up = nn.Parameter(torch.randn(e, 2 * i, h) * h**-0.5)
        self.down = nn.Parameter(torch.randn(e, h, i) * out_std)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the chosen experts [T, H], and the load of each expert f32[E]."""
        tokens, k = experts.shape
        entries = tokens * k
        slots = entries + self.count * self.ALIGN
        with torch.no_grad():
            ids = experts.flatten()
            every = torch.arange(self.count, device=x.device)
            load = (ids[:, None] == every).sum(0)
            # each expert's rows start at a multiple of ALIGN
            ends = ((load + self.ALIGN - 1) // self.ALIGN * self.ALIGN).cumsum(0)
            starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
            order = ids.argsort(stable=True)
            ordered = ids[order]
            place = torch.arange(entries, device=x.device)
            slot = starts[ordered] + place - (load.cumsum(0) - load)[ordered]
            slot_of_entry = torch.empty_like(order).scatter(0, order, slot).view(tokens, k)
            entry_of_slot = torch.zeros(slots, dtype=torch.long, device=x.device)
            entry_of_slot = entry_of_slot.scatter(0, slot, order)
            real = torch.zeros(slots, dtype=torch.bool, device=x.device)
            real = real.scatter(0, slot, torch.ones_like(slot, dtype=torch.bool))
            offsets = ends.to(torch.int32)
        rows = _Dispatch.apply(x, entry_of_slot // k, slot_of_entry)
        gate_up = self.gate_up.to(x.dtype).transpose(1, 2)
        gate, up = torch._grouped_mm(rows, gate_up, offs=offsets).chunk(2, -1)
        inner = functional.silu(gate) * up
        y = torch._grouped_mm(inner, self.down.to(x.dtype).transpose(1, 2), offs=offsets)
        entry = _Combine.apply(y, slot_of_entry, entry_of_slot, real)
        out = (entry * weights.to(x.dtype)[..., None]).sum(1)
        return out, load.float()


class Moe(nn.Module):
    """Routed experts and the shared expert."""

    def __init__(self, c: Config, out_std: float) -> None:
        super().__init__()
        self.gate = Gate(c)
        self.experts = Experts(c, out_std)
        width = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = Mlp(c.hidden_size, width, out_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = self.gate(x)
        routed, load = self.experts(x, experts, weights)
        return routed + self.shared_experts(x), load


class Layer(nn.Module):
    """A decoder layer; dense or MoE."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        depth = 2 * (c.num_hidden_layers + 1)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        wide = c.num_attention_heads * c.v_head_dim
        self.self_attn = Attention(c, (wide * depth) ** -0.5)
        self.dense = index < c.first_k_dense_replace
        if self.dense:
            width = c.intermediate_size
            self.mlp: nn.Module = Mlp(c.hidden_size, width, (width * depth) ** -0.5)
        else:
            self.mlp = Moe(c, (c.moe_intermediate_size * depth) ** -0.5)

    def forward(
        self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), batch, cos, sin)
        h = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(h), None
        y, load = self.mlp(h)
        return x + y, load


class Mtp(Layer):
    """The multi-token prediction layer: hidden state and next token's embedding to one more."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, c.num_hidden_layers)
        h = c.hidden_size
        self.enorm = RMSNorm(h, c.rms_norm_eps)
        self.hnorm = RMSNorm(h, c.rms_norm_eps)
        self.eh_proj = Linear(2 * h, h, (2 * h) ** -0.5)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(h, c.rms_norm_eps)})

    def predict(
        self, embedded: Tensor, hidden: Tensor, batch: Packed, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normed hidden states for the shared head, and the load of each expert."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        x, load = self(x, batch, cos, sin)
        assert load is not None
        return self.shared_head["norm"](x), load


class DemoModel(nn.Module):
    """The language model with its MTP layer."""

    frequencies: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.5)
        self.layers = nn.ModuleList([Layer(c, i) for i in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, c.hidden_size**-0.5 * 0.2)
        self.mtp = Mtp(c)
        self.register_buffer("frequencies", yarn_frequencies(c), persistent=False)

    def forward(self, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states before the head [T, H], those of the MTP layer, loads f32[MoE layers, E].

        Row i of the first predicts token i + 1, row i of the second token i + 2.
        """
        angles = batch.positions[:, None].float() * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        embedded = functional.embedding(batch.tokens, self.embed_tokens).to(dtype)
        x, loads = embedded, []
        for layer in self.layers:
            x, load = layer(x, batch, cos, sin)
            if load is not None:
                loads.append(load)
        hidden = self.norm(x)
        ahead, load = self.mtp.predict(embedded.roll(-1, 0), hidden, batch, cos, sin)
        return hidden, ahead, torch.stack([*loads, load])

    def gates(self) -> list[Gate]:
        """Routers in the order of the loads."""
        layers = [*self.layers, self.mtp]
        return [layer.mlp.gate for layer in layers if isinstance(layer.mlp, Moe)]


def head_loss(states: Tensor, head: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy over the valid positions. states [T, H], head f32[V, H]."""
    logits = functional.linear(states, head.to(states.dtype)).float()
    each = functional.cross_entropy(logits, wanted, reduction="none")
    return (each * valid).sum() / valid.sum().clamp(min=1)


def loss(
    model: DemoModel,
    batch: Packed,
    targets: Tensor,
    dtype: torch.dtype,
    head: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = head_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of the next token, of the one after it (MTP), and expert loads.

    `targets` bool[T]: whether a token is to be predicted (never the first of a document).
    """
    hidden, ahead, loads = model(batch, dtype)
    losses = []
    for states, shift in ((hidden, 1), (ahead, 2)):
        wanted = batch.tokens.roll(-shift)
        valid = targets.roll(-shift) & (batch.segment == batch.segment.roll(-shift))
        valid = valid & (batch.positions.roll(-shift) >= shift)
        losses.append(head(states, model.lm_head.weight, wanted, valid))
    return losses[0], losses[1], loads
