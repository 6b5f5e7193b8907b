"""Router and experts. Every op writes into its `out`, `ids` and `weights` arguments."""

import torch

from latentcore.ops.native import flag, op, unpack
from latentcore.quant.packed import PackedWeight

_route_softmax = op("route_softmax")
_route_sigmoid = op("route_sigmoid")
_moe = op("moe")
_moe_shared = op("moe_shared")


def route_softmax(
    x: torch.Tensor,
    w: PackedWeight,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    factor: float,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Chooses experts by softmax scores (DeepSeek-V2); a group's score is its best expert's.

    x bf16 [n, hidden], w F32 or BF16 of [experts, hidden]; ids int32 and weights f32 [n, top_k].
    Ties go to the lowest index. Weights are the scores (summing to 1 if `normalize`) x `factor`.
    """
    _route_softmax(
        x,
        *unpack("route_softmax", "w", w),
        n_group,
        topk_group,
        top_k,
        flag("route_softmax", "normalize", normalize),
        factor,
        ids,
        weights,
    )


def route_sigmoid(
    x: torch.Tensor,
    w: PackedWeight,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    factor: float,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Chooses experts by sigmoid scores plus bias f32 [experts] (DeepSeek-V3, `noaux_tc`).

    A group's score is the sum of its two best. The bias decides the choice only: weights are the
    plain scores (summing to 1 if `normalize`) times `factor`.
    """
    _route_sigmoid(
        x,
        *unpack("route_sigmoid", "w", w),
        bias,
        n_group,
        topk_group,
        top_k,
        flag("route_sigmoid", "normalize", normalize),
        factor,
        ids,
        weights,
    )


def moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    out: torch.Tensor,
) -> None:
    """out = sum over a token's experts of weight * mlp_expert(x). x, out bf16 [n, hidden].

    gate_up and down are stacks of as many matrices as there are experts.
    """
    _moe(x, ids, weights, *unpack("moe", "gate_up", gate_up), *unpack("moe", "down", down), out)


def moe_shared(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared_gate_up: PackedWeight,
    shared_down: PackedWeight,
    out: torch.Tensor,
) -> None:
    """The same plus a shared MLP, of its own width and scheme, that every token passes."""
    _moe_shared(
        x,
        ids,
        weights,
        *unpack("moe_shared", "gate_up", gate_up),
        *unpack("moe_shared", "down", down),
        *unpack("moe_shared", "shared_gate_up", shared_gate_up),
        *unpack("moe_shared", "shared_down", shared_down),
        out,
    )
