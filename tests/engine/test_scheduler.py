"""The scheduler: chunks, budget, order, pre-emption, and the paths that make bits repeat."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from latentcore.engine.blocks import BlockManager
from latentcore.engine.scheduler import (
    PRIORITY_STRIDE,
    Schedule,
    ScheduledSequence,
    Scheduler,
    Status,
)
from latentcore.models.chunk import Path

SIZE = 4


def choose_path(uncached: int, context: int) -> Path:
    return "prefill" if 2 * uncached >= context else "decode"


def make(
    num_blocks: int = 16,
    max_num_seqs: int = 4,
    budget: int = 8,
    caching: bool = True,
    max_afresh_tokens: int = 99,
) -> Scheduler:
    blocks = BlockManager(num_blocks, SIZE, enable_prefix_caching=caching)
    return Scheduler(
        blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_afresh_tokens=max_afresh_tokens,
        choose_path=choose_path,
    )


class Queue:
    """Hands out arrival numbers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.arrivals = 0

    def add(
        self, prompt: list[int], priority: int = 0, reads_afresh: bool = False
    ) -> ScheduledSequence:
        sequence = ScheduledSequence(
            prompt, arrival=self.arrivals, priority=priority, reads_afresh=reads_afresh
        )
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence


def step(scheduler: Scheduler, token: int = 7) -> Schedule:
    """Schedules, pretends to compute, and appends `token` wherever one follows."""
    schedule = scheduler.schedule()
    scheduler.complete(schedule)
    for chunk in schedule.chunks:
        if chunk.samples:
            scheduler.append_token(chunk.sequence, token)
    scheduler.check_integrity()
    return schedule


def test_imports_no_torch() -> None:
    program = (
        "import sys; import latentcore.engine.scheduler;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'numpy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_prompt_is_read_in_chunks_then_generates() -> None:
    scheduler = make(budget=8)
    sequence = Queue(scheduler).add(list(range(19)))
    seen = [
        (c.start, c.num_tokens, c.path, c.samples) for _ in range(4) for c in step(scheduler).chunks
    ]
    assert seen == [
        (0, 8, "prefill", False),
        (8, 8, "prefill", False),
        (16, 3, "prefill", True),
        (19, 1, "decode", True),
    ]
    assert sequence.num_output_tokens == 2


def test_generation_always_goes_along_with_a_long_prompt() -> None:
    scheduler = make(num_blocks=64, budget=8)
    queue = Queue(scheduler)
    short = queue.add([1, 2])
    step(scheduler)
    long = queue.add(list(range(100, 150)))
    for _ in range(7):
        schedule = step(scheduler)
        assert schedule.chunks[0].sequence is short
        assert schedule.chunks[0].num_tokens == 1
        assert schedule.chunks[1].sequence is long
        assert schedule.num_tokens == 8
    assert long.num_computed == 49


def test_order_is_first_come_first_served() -> None:
    scheduler = make(budget=8)
    queue = Queue(scheduler)
    first, second = queue.add([1] * 10), queue.add([2] * 3)
    assert [c.sequence for c in step(scheduler).chunks] == [first]
    assert [(c.sequence, c.num_tokens) for c in step(scheduler).chunks] == [(first, 2), (second, 3)]


def test_priority_goes_first_but_starves_nobody() -> None:
    scheduler = make(max_num_seqs=1, budget=8)
    queue = Queue(scheduler)
    patient = queue.add([1], priority=1)
    finished_before = 0
    while patient.status is Status.WAITING:
        queue.add([2], priority=0)
        for chunk in step(scheduler).chunks:
            if chunk.sequence is not patient:
                scheduler.finish(chunk.sequence)
                finished_before += 1
        assert finished_before < 2 * PRIORITY_STRIDE
    assert finished_before == PRIORITY_STRIDE - 1


def test_nobody_overtakes_the_first_in_line() -> None:
    scheduler = make(num_blocks=4, budget=16)
    queue = Queue(scheduler)
    running = queue.add([1] * 9)
    step(scheduler)
    large = queue.add([2] * 13)
    small = queue.add([3])
    for _ in range(3):
        step(scheduler)
    assert large.status is small.status is Status.WAITING
    scheduler.finish(running)
    assert step(scheduler).admitted[0] is large


def test_a_repeated_prompt_reuses_its_full_blocks() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    prompt = list(range(18))
    first = queue.add(prompt)
    step(scheduler)
    scheduler.finish(first)
    second = queue.add(prompt)
    chunk = step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (17, 1, True)
    assert second.num_cached_tokens == 17
    assert chunk.path == "decode"
    assert scheduler.prefix_hit_tokens == 17
    assert scheduler.prefix_queried_tokens == 36


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, list(range(16))))
    queue.add(list(range(16)))
    chunk = step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens) == (15, 1)


def test_generated_blocks_are_reused_by_the_next_turn() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    first = queue.add([1, 2, 3])
    for token in range(10, 16):
        step(scheduler, token)
    tokens = list(first.token_ids)
    scheduler.finish(first)
    second = queue.add([*tokens[:8], 50, 51])
    chunk = step(scheduler).chunks[0]
    assert chunk.start == 8
    assert second.runs[:2] == [(3, "prefill"), (10, "decode")]


def test_the_next_turn_goes_on_in_the_middle_of_a_block() -> None:
    """Path after path in one block, and the same bits again after pre-emption."""
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    first = queue.add(list(range(9)))
    for token in (20, 21):
        step(scheduler, token)
    source = first.table[2]
    tokens = list(first.token_ids[:-1])
    scheduler.finish(first)
    second = queue.add([*tokens, *range(50, 80)])
    schedule = step(scheduler)
    chunk = schedule.chunks[0]
    (copy,) = schedule.copies
    assert (copy.source, copy.target, copy.num_tokens) == (source, second.table[2], 2)
    assert (chunk.start, chunk.num_tokens, chunk.path) == (10, 30, "prefill")
    assert second.runs == [(9, "prefill"), (10, "decode"), (40, "prefill")]
    assert second.num_cached_tokens == 10
    assert second.paths_in(8, 12) == 0b1101
    scheduler.check_integrity()


def test_a_tail_does_not_choose_the_path() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, [1, 2, 3]))
    chunk = queue.add([1, 2, 3, 4]) and step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens, chunk.path) == (3, 1, "prefill")


def test_a_copy_that_failed_is_not_found_again() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, [1, 2, 3]))
    before = scheduler.blocks.num_cached
    second = queue.add([1, 2, 9])
    assert scheduler.schedule().copies
    scheduler.finish(second)
    assert scheduler.blocks.num_cached == before
    scheduler.check_integrity()


def test_reading_afresh_looks_up_nothing() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, list(range(16))))
    queue.add(list(range(16)), reads_afresh=True)
    chunk = step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens) == (0, 16)


def test_prompts_read_afresh_share_an_allowance() -> None:
    """Each of their tokens takes a row of logits."""
    scheduler = make(num_blocks=64, max_num_seqs=8, budget=16, max_afresh_tokens=5)
    queue = Queue(scheduler)
    fresh = [queue.add([number] * 7, reads_afresh=True) for number in range(3)]
    step(scheduler)
    other = queue.add([9] * 6)
    steps = 1
    while any(sequence.num_output_tokens < 1 for sequence in fresh):
        schedule = step(scheduler)
        steps += 1
        reading = [c for c in schedule.chunks if c.sequence in fresh and c.path == "prefill"]
        assert sum(c.num_tokens for c in reading) == min(5, 21 - 5 * (steps - 1))
    assert steps == 5
    assert other.num_output_tokens > 0
    assert [c.num_tokens for c in step(scheduler).chunks] == [1, 1, 1, 1]


def test_preemption_takes_the_last_and_recomputes_on_the_same_paths() -> None:
    scheduler = make(num_blocks=5, max_num_seqs=2, budget=16, caching=False)
    queue = Queue(scheduler)
    first, second = queue.add([1] * 6), queue.add([2] * 6)
    while not scheduler.num_preemptions:
        schedule = step(scheduler)
    assert schedule.preempted == [second]
    assert second.status is Status.WAITING
    assert first.status is Status.RUNNING
    tokens = list(second.token_ids)
    scheduler.finish(first)
    chunks = []
    while not (chunks and chunks[-1].samples):
        chunks += step(scheduler).chunks
    assert list(second.token_ids)[:-1] == tokens
    assert [(c.start, c.num_tokens, c.path) for c in chunks] == [
        (0, 6, "prefill"),
        (6, len(tokens) - 6, "decode"),
    ]


def test_a_preempted_sequence_refuses_equal_tokens_of_another_path() -> None:
    paths: list[Path] = ["prefill"]
    scheduler = Scheduler(
        BlockManager(5, SIZE, enable_prefix_caching=True),
        max_num_seqs=3,
        max_num_batched_tokens=16,
        max_afresh_tokens=16,
        choose_path=lambda uncached, context: paths[0],
    )
    queue = Queue(scheduler)
    first, second = queue.add([1] * 6), queue.add([2] * 6)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert second.status is Status.WAITING
    scheduler.finish(first)
    scheduler.blocks.forget_cached()
    paths[0] = "decode"
    twin = queue.add([2] * 6, priority=-1)
    step(scheduler)
    assert twin.num_computed == 6
    scheduler.finish(twin)
    chunk = step(scheduler).chunks[0]
    assert (chunk.sequence, chunk.start, chunk.path) == (second, 0, "prefill")


def test_a_fork_shares_the_prompts_blocks_and_paths() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    leader = _run_prompt(scheduler, queue, list(range(10)))
    child = scheduler.fork(leader, arrival=queue.arrivals, priority=0)
    schedule = step(scheduler)
    chunk = next(c for c in schedule.chunks if c.sequence is child)
    assert (chunk.start, chunk.num_tokens, chunk.path) == (8, 2, "prefill")
    assert child.table[:2] == leader.table[:2]
    assert child.table[2] != leader.table[2]


def test_the_number_of_running_sequences_is_limited() -> None:
    scheduler = make(num_blocks=32, max_num_seqs=2, budget=32)
    queue = Queue(scheduler)
    for _ in range(5):
        queue.add([1])
    step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 3)


def test_limits_must_make_sense() -> None:
    blocks = BlockManager(1, SIZE, enable_prefix_caching=True)
    with pytest.raises(ValueError, match="max_num_seqs"):
        Scheduler(
            blocks,
            max_num_seqs=9,
            max_num_batched_tokens=8,
            max_afresh_tokens=8,
            choose_path=choose_path,
        )
    with pytest.raises(ValueError, match="max_afresh_tokens"):
        make(max_afresh_tokens=0)


def _run_prompt(scheduler: Scheduler, queue: Queue, prompt: list[int]) -> ScheduledSequence:
    sequence = queue.add(prompt)
    while sequence.num_computed < len(prompt):
        step(scheduler)
    return sequence


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests against a model of the cache's contents.

    Each block's slot records, for every token in it, the whole history that the token was computed
    from, as a hash of the tokens and paths up to it. A chunk may only be computed over exactly its
    own history, and after pre-emption that history must be the one that it had before. Whatever
    came before, all that is left at the end finishes in a number of steps that its tokens allow.
    """

    BLOCKS = 10
    LONGEST = BLOCKS * SIZE - 4
    AFRESH = 5
    steps_taken = 0

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(
            num_blocks=self.BLOCKS, max_num_seqs=4, budget=7, max_afresh_tokens=self.AFRESH
        )
        self.queue = Queue(self.scheduler)
        self.slots: dict[tuple[int, int], int] = {}
        self.histories: dict[int, list[int]] = {}
        self.live: list[ScheduledSequence] = []
        self.told: list[list[int]] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        priority=st.integers(-1, 1),
        reads_afresh=st.booleans(),
    )
    def add(self, prompt: list[int], priority: int, reads_afresh: bool) -> None:
        self.live.append(self.queue.add(prompt, priority, reads_afresh))

    @precondition(lambda self: self.told)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def next_turn(self, data: st.DataObject, more: list[int]) -> None:
        """A chat goes on: what was asked and answered before is the new prompt's beginning."""
        before = data.draw(st.sampled_from(self.told))
        self.live.append(self.queue.add([*before, *more][: self.LONGEST]))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.end(self.live[data.draw(st.integers(0, len(self.live) - 1))])

    @precondition(lambda self: any(s.num_output_tokens for s in self.live))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        ready = [s for s in self.live if s.num_computed >= s.num_prompt_tokens]
        if ready:
            leader = data.draw(st.sampled_from(ready))
            child = self.scheduler.fork(leader, arrival=self.queue.arrivals, priority=0)
            self.queue.arrivals += 1
            self.live.append(child)

    @rule()
    def forget(self) -> None:
        self.scheduler.blocks.forget_cached()

    @rule(fails=st.sampled_from([False] * 9 + [True]), token=st.integers(0, 1))
    def step(self, fails: bool, token: int) -> None:
        schedule = self.scheduler.schedule()
        self.check(schedule)
        for copy in schedule.copies:
            for offset in range(copy.num_tokens):
                self.slots[copy.target, offset] = self.slots[copy.source, offset]
        for chunk in schedule.chunks:
            self.compute(chunk.sequence, chunk.start, chunk.num_tokens, chunk.path)
        if fails:
            for chunk in schedule.chunks:
                self.end(chunk.sequence)
            return
        self.scheduler.complete(schedule)
        for chunk in schedule.chunks:
            if chunk.samples:
                self.scheduler.append_token(chunk.sequence, token)
                if chunk.sequence.num_tokens > self.LONGEST:
                    self.end(chunk.sequence)

    def check(self, schedule: Schedule) -> None:
        scheduler = self.scheduler
        assert schedule.num_tokens <= scheduler.max_num_batched_tokens
        taken = [chunk.sequence for chunk in schedule.chunks]
        assert len(set(map(id, taken))) == len(taken)
        if scheduler.has_work:
            assert taken, "there is work but nothing is done"
            assert scheduler.running[0] in taken, "the first in rank does not advance"
        for sequence in scheduler.running:
            assert not sequence.generating or sequence in taken, "a generating sequence waits"
        for sequence in schedule.preempted:
            assert sequence.rank > scheduler.running[0].rank, "the first in rank is pre-empted"
        afresh = [
            chunk.num_tokens
            for chunk in schedule.chunks
            if chunk.sequence.reads_afresh and chunk.start < chunk.sequence.num_prompt_tokens
        ]
        assert sum(afresh) <= self.AFRESH

    def compute(self, sequence: ScheduledSequence, start: int, count: int, path: Path) -> None:
        history = self.histories.setdefault(sequence.rank[1], [])
        for position in range(start + count):
            taken = sequence.run_at(position)[1] if position < start else path
            past = history[position - 1] if position else 0
            now = hash((past, sequence.token_ids[position], taken))
            if position == len(history):
                history.append(now)
            assert history[position] == now, "recomputed on another path than before"
            slot = sequence.table[position // SIZE], position % SIZE
            if position < start:
                assert self.slots[slot] == now, "reads what it did not compute"
            self.slots[slot] = now

    def end(self, sequence: ScheduledSequence) -> None:
        self.told.append(list(sequence.token_ids))
        self.scheduler.finish(sequence)
        self.live.remove(sequence)

    @invariant()
    def whole(self) -> None:
        type(self).steps_taken += 1
        self.scheduler.check_integrity()
        assert {id(s) for s in self.live} == {
            id(s) for s in (*self.scheduler.running, *self.scheduler.waiting)
        }

    def teardown(self) -> None:
        # The first in rank advances in every step, by one token at least; it can be pre-empted by
        # nobody. So each sequence takes at most as many steps as it has tokens, once it is first.
        allowed = len(self.live) * (self.LONGEST + 1)
        while self.live:
            self.step(False, 0)
            self.whole()
            allowed -= 1
            assert allowed >= 0, "somebody starves"
        assert not self.scheduler.has_work
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


def test_ten_thousand_random_steps() -> None:
    """Each followed by `check_integrity`; examples may be shorter than Hypothesis is told."""
    SchedulerMachine.steps_taken = 0
    while SchedulerMachine.steps_taken < 10_000:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            SchedulerMachine,
            settings=settings(max_examples=50, stateful_step_count=100, deadline=None),
        )
