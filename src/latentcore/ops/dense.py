"""Embedding, norms, linear layers and the dense MLP. Every op writes into its `out` arguments."""

import torch

from latentcore.ops.native import op, unpack
from latentcore.quant.packed import PackedWeight

_embedding = op("embedding")
_rms_norm = op("rms_norm")
_add_rms_norm = op("add_rms_norm")
_linear = op("linear")
_logits = op("logits")
_heads = op("heads")
_mlp = op("mlp")


def embedding(table: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = table[token_ids[i]]. table bf16 [vocab, hidden], token_ids int32 [n]."""
    _embedding(table, token_ids, out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight. x, out bf16 [n, hidden], weight f32 [hidden]."""
    _rms_norm(x, weight, eps, out)


def add_rms_norm(
    residual: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += delta, rounded to bf16; out = rms_norm(residual). All bf16 [n, hidden]."""
    _add_rms_norm(residual, delta, weight, eps, out)


def linear(x: torch.Tensor, w: PackedWeight, out: torch.Tensor) -> None:
    """out = x w^T. x bf16 [n, cols], w BF16, INT8 or FP8 of [rows, cols], out bf16 [n, rows]."""
    _linear(x, *unpack("linear", "w", w), out)


def logits(x: torch.Tensor, w: PackedWeight, out: torch.Tensor) -> None:
    """The same with out f32 [n, rows]."""
    _logits(x, *unpack("logits", "w", w), out)


def heads(x: torch.Tensor, w: PackedWeight, out: torch.Tensor) -> None:
    """out[:, h] = x[:, h] w[h]^T.

    x bf16 [n, batch, cols], w BF16 or INT8_WIDE, out bf16 [n, batch, rows].
    """
    _heads(x, *unpack("heads", "w", w), out)


def mlp(x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight, out: torch.Tensor) -> None:
    """out = (silu(x gate^T) * (x up^T)) down^T. x, out bf16 [n, hidden]."""
    _mlp(x, *unpack("mlp", "gate_up", gate_up), *unpack("mlp", "down", down), out)
