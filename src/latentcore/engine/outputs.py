"""What a request gives back. Shapes and names are vLLM's."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at a position, before temperature and penalties.

    `rank` counts from 1 (the likeliest token). `decoded_token` is the token's text, or None where
    the model has no tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsAtPosition = dict[int, Logprob]
"""Token id to its log-probability: the position's own token, and the alternatives asked for."""


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request.

    `logprobs[i]` belongs to `token_ids[i]`. `finish_reason` is None while it is being generated;
    `stop_reason` is the stop string or stop token that ended it, None for the model's own end
    token and for a length limit. `cumulative_logprob` is the sum over generated tokens, None
    unless logprobs were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether it is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of `time.monotonic()`, and what it took.

    `num_generation_tokens`: of all choices, `max_num_generation_tokens`: of the longest one.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_generation_tokens: int = 0
    max_num_generation_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its choices so far.

    `prompt_logprobs[i]` maps token ids to `Logprob`s, is None at 0 and always holds the prompt's
    own token. `num_cached_tokens` is how many prompt tokens came from the prefix cache.
    `max_tokens` is the longest that a choice may become, the room that is left included.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAtPosition | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    n: int = 1
    max_tokens: int = 0


@dataclass(slots=True)
class StepOutputs:
    """What one engine step published.

    `failures`: the requests that failed in it. `aborted`: those that were dropped since the step
    before, of which nothing more will come.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
