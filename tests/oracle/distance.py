"""How far logits are from the truth."""

import torch


def errors(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Error of each position in log-probability, root mean square over the vocabulary: [length]."""
    ours = torch.log_softmax(logits.to(torch.float64), dim=-1)
    theirs = torch.log_softmax(truth.to(torch.float64), dim=-1)
    return (ours - theirs).square().mean(dim=-1).sqrt()


def widest(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The largest error of any logit's log-probability at each position: fp64 [length]."""
    ours = torch.log_softmax(logits.to(torch.float64), dim=-1)
    theirs = torch.log_softmax(truth.to(torch.float64), dim=-1)
    return (ours - theirs).abs().amax(dim=-1)


def gap(truth: torch.Tensor) -> torch.Tensor:
    """By how much the best logit of each position leads: fp64 [length]."""
    best = truth.to(torch.float64).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]
