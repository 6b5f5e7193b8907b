"""The engine's step: schedule, run, sample, publish."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from latentcore.engine.blocks import BlockManager
from latentcore.engine.detokenizer import Detokenizer
from latentcore.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    LogprobsAtPosition,
    RequestMetrics,
    RequestOutput,
    StepOutputs,
)
from latentcore.engine.request import ModelLimits, PreparedRequest, derive_seed
from latentcore.engine.sampler import SampledToken, Sampler, SampleRow, TokenLogprobs
from latentcore.engine.sampling_params import RequestOutputKind
from latentcore.engine.scheduler import (
    Schedule,
    ScheduledChunk,
    ScheduledSequence,
    Scheduler,
    Status,
)
from latentcore.engine.structured import GrammarError, GrammarMatcher, new_mask
from latentcore.engine.text import StopStringFilter
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import LatentcoreError, RequestError
from latentcore.models.chunk import Path, SequenceChunk

if TYPE_CHECKING:
    import torch

    from latentcore.models.logits import StepLogits

logger = logging.getLogger("latentcore.engine")

MAX_PROMPT_LOGPROB_TOKENS = 512
"""Most tokens of a step within prompts whose log-probabilities are wanted, of all sequences: each
takes a row of logits, half a megabyte with a vocabulary of 129,280."""


class Runner(Protocol):
    """What the engine needs of a model; `latentcore.models.runner.ModelRunner` is one."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

    def forward(self, chunks: Sequence[SequenceChunk]) -> "StepLogits":
        """Logits of the rows that the chunks ask for, in their order."""

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first tokens of one cache block to another, in all layers."""

    def choose_path(self, uncached_tokens: int, context: int) -> Path: ...

    def weight_bytes_per_token(self, batch: int, /) -> float:
        """Bytes of weights read in a step of `batch` sequences, for each of their tokens."""

    def close(self) -> None: ...


class StepFailedError(LatentcoreError):
    """The step that a request was part of failed. The request is lost, the engine goes on."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine schedules. `seed` is the base for requests that bring none."""

    vocab_size: int
    max_num_seqs: int
    enable_prefix_caching: bool
    end_ids: tuple[int, ...]
    seed: int = 0


@dataclass(slots=True)
class StepStats:
    """What one step did; times in seconds."""

    prompt_tokens: int = 0
    """Tokens of prompts computed, those computed again after pre-emption included."""
    generated_tokens: int = 0
    num_sequences: int = 0
    model_time: float = 0.0
    step_time: float = 0.0
    num_preempted: int = 0
    pure_decode: bool = False


class _Choice:
    """One of a request's answers while it is generated."""

    __slots__ = (
        "cumulative_logprob",
        "detokenizer",
        "finish_reason",
        "grammar_after",
        "index",
        "logprobs",
        "matcher",
        "published_finish",
        "published_text",
        "published_tokens",
        "seed",
        "sequence",
        "stop_filter",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, index: int, request: PreparedRequest, seed: int) -> None:
        params = request.params
        self.index = index
        self.seed = derive_seed(seed, index)
        self.sequence: ScheduledSequence | None = None
        self.matcher: GrammarMatcher | None = request.grammar.matcher() if request.grammar else None
        self.grammar_after = request.grammar_after
        self.detokenizer: Detokenizer | None = None
        self.stop_filter = StopStringFilter(
            params.stop_strings, include_stop=params.include_stop_str_in_output
        )
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobsAtPosition] | None = [] if params.logprobs is not None else None
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.published_text = 0
        self.published_tokens = 0
        self.published_finish = False


class _Request:
    """A request in the engine."""

    __slots__ = (
        "arrival",
        "choices",
        "metrics",
        "prepared",
        "priority",
        "prompt_logprobs",
        "prompt_logprobs_published",
        "request_id",
    )

    def __init__(
        self, request_id: str, prepared: PreparedRequest, *, arrival: int, priority: int, seed: int
    ) -> None:
        self.request_id = request_id
        self.prepared = prepared
        self.arrival = arrival
        self.priority = priority
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.choices = [_Choice(i, prepared, seed) for i in range(prepared.params.n)]
        self.prompt_logprobs: list[LogprobsAtPosition | None] | None = (
            [None] if prepared.params.prompt_logprobs is not None else None
        )
        self.prompt_logprobs_published = False

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still missing."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(
            self.prepared.prompt_token_ids
        )


class Engine:
    """Requests in, steps, outputs out. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._options = options
        self.scheduler = Scheduler(
            BlockManager(
                runner.num_blocks,
                runner.block_size,
                enable_prefix_caching=options.enable_prefix_caching,
            ),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_afresh_tokens=MAX_PROMPT_LOGPROB_TOKENS,
            choose_path=runner.choose_path,
        )
        self.limits = ModelLimits(
            vocab_size=options.vocab_size,
            max_model_len=runner.max_model_len,
            cache_tokens=runner.num_blocks * runner.block_size,
        )
        self.last_step = StepStats()
        self._requests: dict[str, _Request] = {}
        self._owners: dict[tuple[int, int], tuple[_Request, _Choice]] = {}
        self._arrivals = 0
        self._aborted: list[str] = []
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="latentcore-masks")

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def has_aborted(self) -> bool:
        """Whether the next step has requests to tell of that were dropped."""
        return bool(self._aborted)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def max_num_seqs(self) -> int:
        return self.scheduler.max_num_seqs

    def add_request(self, request_id: str, prepared: PreparedRequest, *, priority: int = 0) -> None:
        """Queues a request. Lower `priority` is served sooner.

        Raises RequestError for an id that is in use.
        """
        if request_id in self._requests:
            raise RequestError(f"request_id: {request_id!r} is in use")
        params = prepared.params
        arrival = self._arrivals
        self._arrivals += params.n
        seed = params.seed
        if seed is None:
            seed = derive_seed(self._options.seed, arrival)
        request = _Request(request_id, prepared, arrival=arrival, priority=priority, seed=seed)
        if self._tokenizer is not None and params.detokenize:
            for choice in request.choices:
                choice.detokenizer = self._tokenizer.detokenizer(
                    skip_special_tokens=params.skip_special_tokens
                )
        sequence = ScheduledSequence(
            prepared.prompt_token_ids,
            arrival=arrival,
            priority=priority,
            reads_afresh=params.prompt_logprobs is not None,
        )
        self._requests[request_id] = request
        self._adopt(request, request.choices[0], sequence)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its blocks; nothing happens where there is none."""
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request)
            self._aborted.append(request_id)

    def step(self) -> StepOutputs:
        """Runs one step and returns what came of it.

        A step that fails fails its requests and no others; their blocks are freed.
        """
        started = time.monotonic()
        aborted, self._aborted = self._aborted, []
        schedule = self.scheduler.schedule()
        self._note_scheduled(schedule, started)
        self.last_step = stats = StepStats(
            num_sequences=len(schedule.chunks), num_preempted=len(schedule.preempted)
        )
        if not schedule.chunks:
            return StepOutputs(aborted=aborted)
        try:
            touched, failures = self._run(schedule, stats)
        except Exception as error:
            logger.exception("a step failed")
            failure = StepFailedError(f"the engine failed while it computed this request: {error}")
            failure.__cause__ = error
            self.last_step = StepStats(num_preempted=len(schedule.preempted))
            return StepOutputs(failures=self._fail(schedule, failure), aborted=aborted)
        outputs = self._publish(touched)
        stats.step_time = time.monotonic() - started
        return StepOutputs(outputs=outputs, failures=failures, aborted=aborted)

    def check_integrity(self) -> None:
        """Compares requests, queues and blocks with each other; raises on any contradiction."""
        self.scheduler.check_integrity()
        live = {s.rank for s in (*self.scheduler.running, *self.scheduler.waiting)}
        if live != set(self._owners):
            raise LatentcoreError("the engine's sequences are not the scheduler's")

    def close(self) -> None:
        """Drops all requests and gives the model's memory and threads back."""
        for request in list(self._requests.values()):
            self._drop(request)
        self._masks.shutdown()
        self._runner.close()

    # -- the step ----------------------------------------------------------------------------------

    def _run(
        self, schedule: Schedule, stats: StepStats
    ) -> tuple[list[_Request], dict[str, BaseException]]:
        """Runs and samples; returns the requests with news, and those that failed alone."""
        chunks = [self._chunk(chunk) for chunk in schedule.chunks]
        masks = self._start_masks(schedule)
        model_started = time.monotonic()
        for copy in schedule.copies:
            self._runner.copy_block(copy.source, copy.target, copy.num_tokens)
        logits = self._runner.forward(chunks)
        stats.model_time = time.monotonic() - model_started
        self.scheduler.complete(schedule)
        sampling: list[tuple[int, _Request, _Choice]] = []
        touched: dict[str, _Request] = {}
        failures: dict[str, BaseException] = {}
        row = 0
        for scheduled, chunk in zip(schedule.chunks, chunks, strict=True):
            request, choice = self._owners[scheduled.sequence.rank]
            prompt_left = scheduled.sequence.num_prompt_tokens - scheduled.start
            stats.prompt_tokens += max(0, min(scheduled.num_tokens, prompt_left))
            if chunk.logits == "all":
                self._read_prompt_logprobs(
                    request, logits.values[row : row + scheduled.num_tokens], scheduled.start
                )
                row += scheduled.num_tokens - 1
            if scheduled.samples:
                touched[request.request_id] = request
                if request.prepared.max_tokens == 0:
                    self._finish(choice, "length")
                    for other in request.choices[1:]:
                        other.finish_reason = "length"
                else:
                    sampling.append((row, request, choice))
            if chunk.logits != "none":
                row += 1
        if sampling:
            failures = self._sample(logits, sampling, masks)
            stats.generated_tokens = len(sampling)
        stats.pure_decode = all(
            chunk.num_tokens == 1 and chunk.path == "decode" for chunk in schedule.chunks
        )
        found = [request for name, request in touched.items() if name not in failures]
        return found, failures

    def _chunk(self, scheduled: ScheduledChunk) -> SequenceChunk:
        sequence = scheduled.sequence
        request, _ = self._owners[sequence.rank]
        end = scheduled.start + scheduled.num_tokens
        logits: Literal["none", "last", "all"] = "none"
        if request.wants_prompt_logprobs and scheduled.start < sequence.num_prompt_tokens:
            logits = "all"
        elif scheduled.samples and request.prepared.max_tokens > 0:
            logits = "last"
        needed = -(-end // self._runner.block_size)
        return SequenceChunk(
            token_ids=sequence.token_ids[scheduled.start : end].tolist(),
            start=scheduled.start,
            block_table=sequence.table[:needed],
            path=scheduled.path,
            logits=logits,
        )

    def _start_masks(self, schedule: Schedule) -> "dict[tuple[int, int], Future[torch.Tensor]]":
        """Begins to work out the grammars' masks, to be ready when the model is."""
        masks: dict[tuple[int, int], Future[torch.Tensor]] = {}
        for chunk in schedule.chunks:
            _, choice = self._owners[chunk.sequence.rank]
            if chunk.samples and choice.matcher is not None and choice.grammar_after is None:
                masks[chunk.sequence.rank] = self._masks.submit(
                    _fill_mask, choice.matcher, self._options.vocab_size
                )
        return masks

    def _sample(
        self,
        logits: "StepLogits",
        sampling: Sequence[tuple[int, _Request, _Choice]],
        masks: "dict[tuple[int, int], Future[torch.Tensor]]",
    ) -> dict[str, BaseException]:
        """Samples and takes in a token for every row; returns the requests that failed alone."""
        failures: dict[str, BaseException] = {}
        rows: list[SampleRow] = []
        sampled: list[tuple[int, _Request, _Choice]] = []
        for row, request, choice in sampling:
            sequence = choice.sequence
            assert sequence is not None
            params = request.prepared.params
            banned: tuple[int, ...] = ()
            if len(choice.token_ids) < params.min_tokens:
                banned = (*params.stop_tokens, *self._options.end_ids)
            try:
                mask = masks.get(sequence.rank)
                allowed = None if mask is None else mask.result()
            except Exception as error:
                failures[request.request_id] = _grammar_failure(error)
                continue
            sampled.append((row, request, choice))
            rows.append(
                SampleRow(
                    params=params,
                    seed=choice.seed,
                    token_ids=sequence.token_ids,
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    banned_ids=banned,
                    allowed=allowed,
                )
            )
        for request_id in failures:
            self._drop(self._requests[request_id])
        if not sampled:
            return failures
        logits = logits.select([row for row, _, _ in sampled])
        now = time.monotonic()
        for (_, request, choice), token in zip(
            sampled, self._sampler.sample(logits, rows), strict=True
        ):
            if request.request_id not in self._requests:
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            try:
                self._advance(request, choice, token)
            except GrammarError as error:
                self._drop(request)
                failures[request.request_id] = error

        return failures

    def _advance(self, request: _Request, choice: _Choice, sampled: SampledToken) -> None:
        """Takes in a new token: text, log-probabilities, and whether the answer ends here."""
        sequence = choice.sequence
        assert sequence is not None
        params = request.prepared.params
        token_id = sampled.token_id
        if choice.index == 0 and not choice.token_ids:
            self._fork(request, sequence)
        choice.token_ids.append(token_id)
        request.metrics.num_generation_tokens += 1
        request.metrics.max_num_generation_tokens = max(
            request.metrics.max_num_generation_tokens, len(choice.token_ids)
        )
        if choice.logprobs is not None:
            assert sampled.logprobs is not None
            assert params.logprobs is not None
            choice.logprobs.append(self._logprobs_at(token_id, sampled.logprobs, params.logprobs))
            choice.cumulative_logprob += sampled.logprobs.logprob
        if choice.grammar_after is not None:
            if token_id == choice.grammar_after:
                choice.grammar_after = None
        elif choice.matcher is not None:
            choice.matcher.accept(token_id)
        stops_count = len(choice.token_ids) >= params.min_tokens
        stopped = stops_count and self._stops(request, choice, token_id)
        if not stopped or params.include_stop_str_in_output:
            self._add_text(choice, token_id, stops_count=stops_count)
        if choice.finish_reason is None and stopped:
            self._finish(choice, "stop")
        if choice.finish_reason is None and len(choice.token_ids) >= request.prepared.max_tokens:
            self._finish(choice, "length")
        if choice.finish_reason is None:
            self.scheduler.append_token(sequence, token_id)

    def _stops(self, request: _Request, choice: _Choice, token_id: int) -> bool:
        params = request.prepared.params
        if token_id in params.stop_tokens:
            choice.stop_reason = token_id
            return True
        if token_id in self._options.end_ids and not params.ignore_eos:
            return True
        return choice.matcher is not None and choice.matcher.finished

    def _add_text(self, choice: _Choice, token_id: int, *, stops_count: bool) -> None:
        if choice.detokenizer is None:
            return
        text = choice.detokenizer.push(token_id)
        if not text:
            return
        if not stops_count:
            choice.text += text
            return
        shown, stop = choice.stop_filter.push(text)
        choice.text += shown
        if stop is not None:
            choice.stop_reason = stop
            self._finish(choice, "stop")

    def _finish(self, choice: _Choice, reason: FinishReason) -> None:
        """Ends a choice. What its text held back comes out, unless a stop string ended it."""
        if not isinstance(choice.stop_reason, str):
            choice.text += choice.stop_filter.flush()
            if choice.detokenizer is not None:
                choice.text += choice.detokenizer.flush()
        choice.finish_reason = reason
        sequence = choice.sequence
        assert sequence is not None
        self.scheduler.finish(sequence)
        del self._owners[sequence.rank]

    def _fork(self, request: _Request, leader: ScheduledSequence) -> None:
        """Starts a request's other choices, now that its prompt is computed."""
        for choice in request.choices[1:]:
            child = self.scheduler.fork(
                leader, arrival=request.arrival + choice.index, priority=request.priority
            )
            self._adopt(request, choice, child)

    def _read_prompt_logprobs(self, request: _Request, logits: "torch.Tensor", start: int) -> None:
        """Row j of `logits` follows position start + j, so it tells of the token after that."""
        found = request.prompt_logprobs
        num_top = request.prepared.params.prompt_logprobs
        assert found is not None
        assert num_top is not None
        prompt = request.prepared.prompt_token_ids
        first = len(found) - 1 - start
        targets = prompt[len(found) : start + len(logits) + 1]
        if first < 0 or not targets:
            return
        rows = logits[first : first + len(targets)]
        for token_id, logprobs in zip(
            targets, self._sampler.logprobs(rows, targets, num_top), strict=True
        ):
            found.append(self._logprobs_at(token_id, logprobs, num_top))

    def _logprobs_at(
        self, token_id: int, logprobs: TokenLogprobs, num_top: int
    ) -> LogprobsAtPosition:
        found = {token_id: Logprob(logprobs.logprob, logprobs.rank, self._token_text(token_id))}
        for rank, (top_id, value) in enumerate(logprobs.top[:num_top], start=1):
            if top_id not in found:
                found[top_id] = Logprob(value, rank, self._token_text(top_id))
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

    # -- requests ----------------------------------------------------------------------------------

    def _adopt(self, request: _Request, choice: _Choice, sequence: ScheduledSequence) -> None:
        choice.sequence = sequence
        self._owners[sequence.rank] = (request, choice)

    def _drop(self, request: _Request) -> None:
        for choice in request.choices:
            sequence = choice.sequence
            if sequence is not None and sequence.status is not Status.FINISHED:
                self.scheduler.finish(sequence)
                del self._owners[sequence.rank]
        del self._requests[request.request_id]

    def _fail(self, schedule: Schedule, failure: BaseException) -> dict[str, BaseException]:
        failures: dict[str, BaseException] = {}
        for chunk in schedule.chunks:
            owner = self._owners.get(chunk.sequence.rank)
            if owner is not None:
                self._drop(owner[0])
                failures[owner[0].request_id] = failure
        for request in list(self._requests.values()):
            # Finished in the very step that failed: nobody has been told.
            if request.finished:
                self._drop(request)
                failures[request.request_id] = failure
        return failures

    def _note_scheduled(self, schedule: Schedule, now: float) -> None:
        for sequence in schedule.admitted:
            request, _ = self._owners[sequence.rank]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
                request.metrics.num_cached_tokens = sequence.num_cached_tokens
        for sequence in schedule.preempted:
            self._owners[sequence.rank][0].metrics.num_preemptions += 1

    # -- outputs -----------------------------------------------------------------------------------

    def _publish(self, touched: Sequence[_Request]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for request in touched:
            finished = request.finished
            kind = request.prepared.params.output_kind
            if finished:
                request.metrics.finished_time = time.monotonic()
                del self._requests[request.request_id]
            if finished or kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(self._output(request, finished=finished))
        return outputs

    def _output(self, request: _Request, *, finished: bool) -> RequestOutput:
        delta = request.prepared.params.output_kind is RequestOutputKind.DELTA
        prompt_logprobs = request.prompt_logprobs
        if delta and request.prompt_logprobs_published:
            prompt_logprobs = None
        request.prompt_logprobs_published = True
        choices = [
            _delta(choice) if delta else _cumulative(choice)
            for choice in request.choices
            if not delta or _has_news(choice)
        ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prepared.prompt,
            prompt_token_ids=request.prepared.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=choices,
            finished=finished,
            metrics=request.metrics,
            num_cached_tokens=request.metrics.num_cached_tokens,
            n=request.prepared.params.n,
            max_tokens=request.prepared.max_tokens,
        )


def _fill_mask(matcher: GrammarMatcher, vocab_size: int) -> "torch.Tensor":
    mask = new_mask(vocab_size)
    matcher.fill(mask)
    return mask


def _grammar_failure(error: Exception) -> StepFailedError:
    failure = StepFailedError(f"the engine failed while it followed a grammar: {error}")
    failure.__cause__ = error
    return failure


def _has_news(choice: _Choice) -> bool:
    return choice.published_tokens < len(choice.token_ids) or (
        choice.finish_reason is not None and not choice.published_finish
    )


def _cumulative(choice: _Choice) -> CompletionOutput:
    return CompletionOutput(
        index=choice.index,
        text=choice.text,
        token_ids=list(choice.token_ids),
        cumulative_logprob=None if choice.logprobs is None else choice.cumulative_logprob,
        logprobs=None if choice.logprobs is None else list(choice.logprobs),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def _delta(choice: _Choice) -> CompletionOutput:
    """What is new since the last one; a choice that has ended is told of once."""
    output = CompletionOutput(
        index=choice.index,
        text=choice.text[choice.published_text :],
        token_ids=choice.token_ids[choice.published_tokens :],
        cumulative_logprob=None if choice.logprobs is None else choice.cumulative_logprob,
        logprobs=None if choice.logprobs is None else choice.logprobs[choice.published_tokens :],
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )
    choice.published_text = len(choice.text)
    choice.published_tokens = len(choice.token_ids)
    choice.published_finish = choice.finish_reason is not None
    return output
