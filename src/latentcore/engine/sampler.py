"""What the engine needs of a sampler, and the rows that it hands over."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from latentcore.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from latentcore.models.logits import StepLogits


@dataclass(slots=True)
class SampleRow:
    """One row of logits: the next token of one sequence.

    `token_ids` are prompt and output so far, the first `num_prompt_tokens` the prompt. The random
    number used depends on `seed` and the number of output tokens alone. `banned_ids` cannot be
    chosen. `allowed`, where it is not None, has one bit a token (int32 words, lowest bit first):
    tokens with 0 cannot be chosen.
    """

    params: SamplingParams
    seed: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    banned_ids: Sequence[int] = ()
    allowed: "torch.Tensor | None" = None


@dataclass(slots=True)
class TokenLogprobs:
    """A token's log-probability and rank (from 1), and the likeliest tokens, best first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class SampledToken:
    """A chosen token; `logprobs` is None where the row did not ask for any."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler(Protocol):
    """Chooses tokens. Log-probabilities are those of the model, before any parameter applies."""

    def sample(self, logits: "StepLogits", rows: Sequence[SampleRow]) -> list[SampledToken]:
        """Chooses a token for each row of `logits`, which are overwritten."""

    def logprobs(
        self, logits: "torch.Tensor", token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """For each row, the given token's log-probability and `num_top` alternatives."""
