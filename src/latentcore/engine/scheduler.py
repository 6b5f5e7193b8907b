"""Decides what each step computes. A plain data structure over the block manager: no tensors here.

Every step gives each chosen sequence a number of its tokens to compute now. Reading a prompt in
chunks, generating one token, and recomputing after pre-emption are this one mechanism:

* Sequences that generate always go along, one token each.
* What is left of the step's token budget goes to prompts, in order of rank.
* Waiting sequences are admitted in order of rank, as soon as all blocks for the tokens that they
  have are free. Nobody overtakes the first in line, so nobody starves. What the cache holds of
  their tokens is not computed again: full blocks are shared, part of a block is copied.
* Where a generating sequence needs a block and none is free, the running sequence with the last
  rank gives its blocks back and waits; later its tokens are computed again on the same paths, so
  that the same bits come out. The first in rank always advances.

Rank is the order of arrival, shifted by priority: one step of priority (lower is sooner, as in
vLLM) is worth `PRIORITY_STRIDE` arrivals, so that a stream of urgent requests delays the others
but cannot starve them.
"""

import bisect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from latentcore.engine.blocks import (
    ROOT,
    BlockManager,
    CachedBlock,
    CachedTail,
    CacheIntegrityError,
    chain_key,
    chain_lineage,
)
from latentcore.models.chunk import Path

PRIORITY_STRIDE = 64
"""Arrivals that one step of priority is worth."""


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class ScheduledSequence:
    """One sequence's tokens, its place in the cache, and the paths its tokens are computed on.

    `runs` lists (end position, path) for the positions of the prompt, in order, once the paths are
    chosen; positions past the last run are generated ones, on the decode path.
    """

    __slots__ = (
        "copying",
        "keys",
        "lineages",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "rank",
        "reads_afresh",
        "runs",
        "status",
        "table",
        "token_ids",
    )

    def __init__(
        self, prompt_token_ids: Sequence[int], *, arrival: int, priority: int, reads_afresh: bool
    ) -> None:
        """`arrival` counts up and is unique.

        `reads_afresh`: logits are wanted at every token of the prompt, so the prefix cache is not
        looked at, and few of its tokens are read in a step.
        """
        if not prompt_token_ids:
            raise ValueError("a sequence needs at least one token")
        self.token_ids = array("I", prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.rank = (arrival + priority * PRIORITY_STRIDE, arrival)
        self.reads_afresh = reads_afresh
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.copying = False
        """Whether its first step is still to copy some of the tokens that count as computed."""
        self.table: list[int] = []
        self.keys: list[bytes] = []
        self.lineages: list[bytes] = []
        self.runs: list[tuple[int, Path]] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generating(self) -> bool:
        """Whether all but the token generated last is computed."""
        return self.num_computed == len(self.token_ids) - 1 >= self.num_prompt_tokens

    def run_at(self, position: int) -> tuple[int, Path]:
        """The end and the path of the run that `position` lies in."""
        for end, path in self.runs:
            if position < end:
                return end, path
        return len(self.token_ids), "decode"

    def key_of(self, block: int, block_size: int) -> bytes:
        """The key of this sequence's full block number `block`."""
        while len(self.keys) <= block:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else ROOT
            self.keys.append(chain_key(parent, self.token_ids[start : start + block_size]))
        return self.keys[block]

    def lineage_before(self, block: int) -> bytes:
        """The lineage of the blocks before number `block`, which are computed."""
        return self.lineages[block - 1] if block else ROOT

    def paths_in(self, start: int, end: int) -> int:
        """Which of the positions start..end-1 take the prefill path: bit i for start + i."""
        paths = 0
        position = start
        while position < end:
            run_end, path = self.run_at(position)
            stop = min(run_end, end)
            if path == "prefill":
                paths |= (1 << (stop - start)) - (1 << (position - start))
            position = stop
        return paths


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first `num_tokens` tokens of one cache block, to be copied to another."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens start..start+num_tokens-1 of one sequence, to be computed in this step.

    `samples`: the chunk ends with the sequence's last token, so a next token follows from it.
    """

    sequence: ScheduledSequence
    start: int
    num_tokens: int
    path: Path
    samples: bool


@dataclass(slots=True)
class Schedule:
    """One step's work: its copies, in their order, then its chunks.

    `afresh_tokens` of its tokens are of prompts that are read afresh.
    """

    copies: list[BlockCopy] = field(default_factory=list)
    chunks: list[ScheduledChunk] = field(default_factory=list)
    afresh_tokens: int = 0
    admitted: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[ScheduledSequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Queues, budget and pre-emption.

    `max_afresh_tokens`: how many tokens a step holds at most of prompts that are read afresh, since
    each takes a row of logits. `choose_path(uncached tokens, context)` is the runner's.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_afresh_tokens: int,
        choose_path: Callable[[int, int], Path],
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                "expected 1 <= max_num_seqs <= max_num_batched_tokens, found "
                f"{max_num_seqs} and {max_num_batched_tokens}"
            )
        if max_afresh_tokens < 1:
            raise ValueError(f"expected max_afresh_tokens of at least 1, found {max_afresh_tokens}")
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_afresh_tokens = max_afresh_tokens
        self._choose_path = choose_path
        self._waiting: list[ScheduledSequence] = []
        self._running: list[ScheduledSequence] = []
        self.num_preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def waiting(self) -> Sequence[ScheduledSequence]:
        """Sequences without blocks, in order of rank."""
        return self._waiting

    @property
    def running(self) -> Sequence[ScheduledSequence]:
        """Sequences that hold blocks, in order of rank."""
        return self._running

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens fits in the empty cache."""
        return self.blocks_for(num_tokens) <= self.blocks.num_blocks

    def add(self, sequence: ScheduledSequence) -> None:
        """Queues a sequence that `can_ever_hold` accepts at its greatest length."""
        assert sequence.status is Status.WAITING
        _insert(self._waiting, sequence)

    def fork(self, leader: ScheduledSequence, *, arrival: int, priority: int) -> ScheduledSequence:
        """Queues another continuation of the leader's prompt; the leader has computed it.

        Its prompt takes the leader's paths, so that it gets the leader's bits; the prompt's full
        blocks are shared while they are cached.
        """
        assert leader.num_computed >= leader.num_prompt_tokens
        prompt = leader.token_ids[: leader.num_prompt_tokens]
        sequence = ScheduledSequence(prompt, arrival=arrival, priority=priority, reads_afresh=False)
        full = leader.num_prompt_tokens // self.blocks.block_size
        sequence.runs = list(leader.runs)
        sequence.keys = leader.keys[:full]
        sequence.lineages = leader.lineages[:full]
        sequence.num_cached_tokens = leader.num_cached_tokens
        self.add(sequence)
        return sequence

    def schedule(self) -> Schedule:
        """Chooses the next step's chunks, admitting and pre-empting sequences as needed."""
        schedule = Schedule()
        for sequence in list(self._running):
            if (
                sequence.status is Status.RUNNING
                and sequence.generating
                and self._grow(sequence, schedule)
            ):
                self._take(schedule, sequence, 1)
        budget = self.max_num_batched_tokens - len(schedule.chunks)
        for sequence in self._running:
            if budget == 0:
                break
            if not sequence.generating and self._has_room(schedule, sequence):
                budget -= self._take(schedule, sequence, budget)
        while (
            budget > 0
            and self._waiting
            and not schedule.preempted
            and len(self._running) < self.max_num_seqs
            and self._has_room(schedule, self._waiting[0])
            and self._admit(self._waiting[0], schedule)
        ):
            sequence = self._waiting.pop(0)
            _insert(self._running, sequence)
            schedule.admitted.append(sequence)
            budget -= self._take(schedule, sequence, budget)
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """Notes that the step was computed; blocks it filled become findable."""
        size = self.blocks.block_size
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_computed = chunk.start + chunk.num_tokens
            sequence.copying = False
            for block in range(chunk.start // size, sequence.num_computed // size):
                start, end = block * size, (block + 1) * size
                key = sequence.key_of(block, size)
                parent = sequence.lineage_before(block)
                paths = sequence.paths_in(start, end)
                if block == len(sequence.lineages):
                    sequence.lineages.append(chain_lineage(parent, key, paths))
                self.blocks.publish(
                    sequence.table[block], parent, sequence.token_ids[start:end], paths, key
                )

    def append_token(self, sequence: ScheduledSequence, token_id: int) -> None:
        """Adds the token that was sampled after the sequence's last one."""
        assert sequence.status is Status.RUNNING
        assert sequence.num_computed == len(sequence.token_ids)
        sequence.token_ids.append(token_id)

    def finish(self, sequence: ScheduledSequence) -> None:
        """Takes a sequence out, at its end or before, and frees its blocks. Safe to repeat."""
        if sequence.status is Status.RUNNING:
            _remove(self._running, sequence)
            self._leave_tail(sequence)
            self.blocks.release(sequence.table)
        elif sequence.status is Status.WAITING:
            _remove(self._waiting, sequence)
        sequence.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Compares queues, tables and blocks with each other; CacheIntegrityError on any fault."""
        size = self.blocks.block_size
        for queue, status in ((self._waiting, Status.WAITING), (self._running, Status.RUNNING)):
            ranks = [sequence.rank for sequence in queue]
            if ranks != sorted(set(ranks)):
                raise CacheIntegrityError(f"the {status.value} queue is out of order: {ranks}")
            if any(sequence.status is not status for sequence in queue):
                raise CacheIntegrityError(f"the {status.value} queue holds another's sequence")
        if len(self._running) > self.max_num_seqs:
            raise CacheIntegrityError(f"{len(self._running)} sequences run")
        for sequence in self._waiting:
            if sequence.table or sequence.num_computed:
                raise CacheIntegrityError("a waiting sequence holds blocks")
        for sequence in self._running:
            if len(sequence.table) < self.blocks_for(max(sequence.num_computed, 1)):
                raise CacheIntegrityError("a running sequence has computed more than it holds")
            if len(sequence.table) > self.blocks_for(len(sequence.token_ids)):
                raise CacheIntegrityError("a running sequence holds blocks that it has no use for")
            if not 0 <= sequence.num_computed <= len(sequence.token_ids):
                raise CacheIntegrityError("a running sequence has computed tokens that it lacks")
            if len(sequence.lineages) < sequence.num_computed // size:
                raise CacheIntegrityError("a full block has no lineage")
        self.blocks.check_integrity(sequence.table for sequence in self._running)

    def _take(self, schedule: Schedule, sequence: ScheduledSequence, budget: int) -> int:
        start = sequence.num_computed
        run_end, path = sequence.run_at(start)
        num_tokens = min(run_end - start, budget)
        if sequence.reads_afresh and start < sequence.num_prompt_tokens:
            num_tokens = min(num_tokens, self.max_afresh_tokens - schedule.afresh_tokens)
            schedule.afresh_tokens += num_tokens
        samples = start + num_tokens == len(sequence.token_ids)
        schedule.chunks.append(ScheduledChunk(sequence, start, num_tokens, path, samples))
        return num_tokens

    def _has_room(self, schedule: Schedule, sequence: ScheduledSequence) -> bool:
        """Whether the step may hold more of a sequence that is not generating."""
        return (
            not sequence.reads_afresh
            or sequence.num_computed >= sequence.num_prompt_tokens
            or schedule.afresh_tokens < self.max_afresh_tokens
        )

    def _grow(self, sequence: ScheduledSequence, schedule: Schedule) -> bool:
        """Makes room for the sequence's next token; False where it was pre-empted itself."""
        if len(sequence.table) * self.blocks.block_size > sequence.num_computed:
            return True
        while self.blocks.num_free == 0:
            victim = self._running[-1]
            self._preempt(victim)
            schedule.preempted.append(victim)
            if victim is sequence:
                return False
        self.blocks.append(sequence.table)
        return True

    def _preempt(self, sequence: ScheduledSequence) -> None:
        _remove(self._running, sequence)
        self.blocks.release(sequence.table)
        sequence.num_computed = 0
        sequence.copying = False
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.num_preemptions += 1
        _insert(self._waiting, sequence)

    def _admit(self, sequence: ScheduledSequence, schedule: Schedule) -> bool:
        """Gives a waiting sequence its blocks, if they are free, and chooses its paths."""
        hits = self._find_hits(sequence)
        new = self.blocks_for(len(sequence.token_ids)) - len(hits)
        reserve = -(-len(self._running) // 4)
        if self.blocks.count_free_after(hits, new) < reserve:
            return False
        tail = None if sequence.runs else self._find_tail(sequence, hits)
        if tail is not None:
            self.blocks.touch(tail)
        sequence.table = self.blocks.acquire(hits, new)
        sequence.num_computed = len(hits) * self.blocks.block_size
        if tail is not None:
            target = sequence.table[len(hits)]
            schedule.copies.append(BlockCopy(tail.index, target, tail.num_tokens))
            sequence.num_computed += tail.num_tokens
            sequence.copying = True
        sequence.status = Status.RUNNING
        if not sequence.runs:
            self._choose_runs(sequence, hits, tail)
        return True

    def _find_hits(self, sequence: ScheduledSequence) -> list[CachedBlock]:
        if sequence.reads_afresh or not self.blocks.enable_prefix_caching:
            return []
        size = self.blocks.block_size
        # The last token is always computed: the next one follows from its logits.
        full = (len(sequence.token_ids) - 1) // size
        keys = (sequence.key_of(block, size) for block in range(full))
        if sequence.runs:
            return self.blocks.find_exact(keys, sequence.lineages)
        return self.blocks.find_prefix(keys)

    def _find_tail(
        self, sequence: ScheduledSequence, hits: Sequence[CachedBlock]
    ) -> CachedTail | None:
        if sequence.reads_afresh or not self.blocks.enable_prefix_caching:
            return None
        size = self.blocks.block_size
        start = len(hits) * size
        end = min(start + size, len(sequence.token_ids)) - 1
        lineage = hits[-1].lineage if hits else ROOT
        return self.blocks.find_tail(lineage, sequence.token_ids[start:end])

    def _leave_tail(self, sequence: ScheduledSequence) -> None:
        """Makes what a sequence that ends has computed of its last block findable."""
        size = self.blocks.block_size
        block, filled = divmod(sequence.num_computed, size)
        if filled == 0 or sequence.copying:
            return
        start, end = block * size, sequence.num_computed
        self.blocks.publish_tail(
            sequence.table[block],
            sequence.lineage_before(block),
            sequence.token_ids[start:end],
            sequence.paths_in(start, end),
        )

    def _choose_runs(
        self,
        sequence: ScheduledSequence,
        hits: Sequence[CachedBlock],
        tail: CachedTail | None,
    ) -> None:
        size = self.blocks.block_size
        runs: list[tuple[int, Path]] = []
        for number, hit in enumerate(hits):
            _extend_by_paths(runs, number * size, size, hit.paths)
        cached = whole = len(hits) * size
        if tail is not None:
            _extend_by_paths(runs, cached, tail.num_tokens, tail.paths)
            cached += tail.num_tokens
        total = sequence.num_prompt_tokens
        # A tail does not change the path: a short prompt gives the same bits with it and without.
        _extend_runs(runs, total, self._choose_path(total - whole, total))
        sequence.runs = runs
        sequence.lineages = [hit.lineage for hit in hits]
        sequence.num_cached_tokens = cached
        self.prefix_queried_tokens += total
        self.prefix_hit_tokens += cached


def _extend_by_paths(runs: list[tuple[int, Path]], start: int, count: int, paths: int) -> None:
    """Adds runs for `count` positions from `start` on; bit i of `paths`: prefill."""
    done = 0
    while done < count:
        rest = paths >> done
        prefill = bool(rest & 1)
        # As many ones (or zeros) as stand at the low end.
        turned = ~rest if prefill else rest
        length = (turned & -turned).bit_length() - 1 if turned else count
        done = min(count, done + length)
        _extend_runs(runs, start + done, "prefill" if prefill else "decode")


def _extend_runs(runs: list[tuple[int, Path]], end: int, path: Path) -> None:
    if end <= (runs[-1][0] if runs else 0):
        return
    if runs and runs[-1][1] == path:
        runs[-1] = (end, path)
    else:
        runs.append((end, path))


def _rank(sequence: ScheduledSequence) -> tuple[int, int]:
    return sequence.rank


def _insert(queue: list[ScheduledSequence], sequence: ScheduledSequence) -> None:
    bisect.insort(queue, sequence, key=_rank)


def _remove(queue: list[ScheduledSequence], sequence: ScheduledSequence) -> None:
    index = bisect.bisect_left(queue, sequence.rank, key=_rank)
    assert queue[index] is sequence
    del queue[index]
