"""Choosing tokens from logits. A row's result depends on that row's inputs alone, not on the other
rows or the number of threads.

The steps of sampling, in order: `restrict` (grammar), `add_bias` (bias, bans), `penalize`,
`sample`. The first three change logits in place, only for the rows and tokens that they are given;
`sample`, `greedy` and `logprobs` leave them as they are. A NaN logit counts as -inf: it is never
chosen while another token can be. All ops but `greedy` check the contents of their arguments and
therefore run eagerly only; `greedy` can be captured in a graph. A vocabulary has at
most 2^24 tokens.
"""

import torch

from latentcore.ops.native import op

_restrict = op("restrict")
_add_bias = op("add_bias")
_penalize = op("penalize")
_sample = op("sample")
_greedy = op("greedy")
_logprobs = op("logprobs")


def restrict(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """Sets logits[rows[i], t] to -inf wherever bit t of allowed[i] is 0.

    logits f32 [n, vocab]; rows int32 [m], within 0..n-1; allowed int32 [m, ceil(vocab / 32)], bit
    t % 32 of word t // 32 (xgrammar's layout; bits beyond the vocabulary are ignored).
    """
    _restrict(logits, rows, allowed)


def add_bias(
    logits: torch.Tensor, offsets: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor
) -> None:
    """Adds bias[j] to logits[i, token_ids[j]] for j in offsets[i]..offsets[i + 1].

    logits f32 [n, vocab]; offsets int32 [n + 1], rising from 0 to m; token_ids int32 [m]; bias
    f32 [m], finite, or -inf for a banned token. An id given twice in a row is added twice.
    """
    _add_bias(logits, offsets, token_ids, bias)


def penalize(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    output_offsets: torch.Tensor,
    token_ids: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Penalizes the tokens that a row's sequence holds already, as vLLM defines it.

    logits f32 [n, vocab]; the sequence of row i is token_ids[offsets[i]:offsets[i + 1]], its
    output starts at output_offsets[i]: offsets int32 [n + 1], rising from 0 to m; output_offsets
    int32 [n]; token_ids int32 [m]. A row with penalties of 1, 0, 0 may have an empty sequence. For
    each token of the sequence: positive logits are divided, others multiplied, by repetition f32
    [n] (> 0); then, for tokens of the output, frequency f32 [n] times the token's count and
    presence f32 [n] are subtracted.
    """
    _penalize(logits, offsets, output_offsets, token_ids, repetition, presence, frequency)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
) -> None:
    """Chooses a token for each row: temperature, then min_p, top_k, top_p, then a draw.

    logits f32 [n, vocab]. Parameters, each [n]: temperature f32, 0 is greedy (lowest index among
    equals); top_k int32, below 1 or from vocab on it is off; top_p f32 in 0..1, 1 is off, 0 keeps
    the likeliest; min_p f32 in 0..1, 0 is off. Tokens as likely as the last one kept are kept too.
    seeds and counters int64 [n]: the same pair draws the same random number (Philox4x32-10); use a
    new counter for each token of a sequence.

    Writes token_ids int32 [n] and logprobs f32 [n]: the token's log-probability among the tokens
    kept (0 where greedy; not the model's: see `logprobs`). A row with nothing to choose, every
    logit -inf or NaN, gets token 0 with log-probability -inf.
    """
    _sample(logits, temperature, top_k, top_p, min_p, seeds, counters, token_ids, logprobs)


def greedy(logits: torch.Tensor, token_ids: torch.Tensor) -> None:
    """token_ids int32 [n] = the index of each row's largest logit, the lowest among equals.

    logits f32 [n, vocab]. A row of -inf and NaN gives 0.
    """
    _greedy(logits, token_ids)


def logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    ranks: torch.Tensor,
    top_ids: torch.Tensor,
    top_values: torch.Tensor,
) -> None:
    """Log-softmax of given tokens and of the likeliest.

    logits f32 [n, vocab]; token_ids int32 [n, m]. Writes values f32 [n, m], their
    log-probabilities; ranks int32 [n, m], 1 + how many tokens are likelier; top_ids int32 and
    top_values f32 [n, k], the k likeliest tokens, best first, the lowest index first among equals.
    m and k may be 0, k at most 1024 and vocab. Tokens that cannot be chosen (-inf or NaN) have
    log-probability -inf.
    """
    _logprobs(logits, token_ids, values, ranks, top_ids, top_values)
