"""The scheduler: chunks, budget, order, pre-emption, and the paths that make bits repeat."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
    num_blocks: int = 16, max_num_seqs: int = 4, budget: int = 8, caching: bool = True
) -> Scheduler:
    blocks = BlockManager(num_blocks, SIZE, enable_prefix_caching=caching)
    return Scheduler(
        blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
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
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (16, 2, True)
    assert second.num_cached_tokens == 16
    assert chunk.path == "decode"
    assert scheduler.prefix_hit_tokens == 16
    assert scheduler.prefix_queried_tokens == 36


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, list(range(16))))
    queue.add(list(range(16)))
    chunk = step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens) == (12, 4)


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


def test_reading_afresh_looks_up_nothing() -> None:
    scheduler = make(num_blocks=32, budget=32)
    queue = Queue(scheduler)
    scheduler.finish(_run_prompt(scheduler, queue, list(range(16))))
    queue.add(list(range(16)), reads_afresh=True)
    chunk = step(scheduler).chunks[0]
    assert (chunk.start, chunk.num_tokens) == (0, 16)


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
        Scheduler(blocks, max_num_seqs=9, max_num_batched_tokens=8, choose_path=choose_path)


def _run_prompt(scheduler: Scheduler, queue: Queue, prompt: list[int]) -> ScheduledSequence:
    sequence = queue.add(prompt)
    while sequence.num_computed < len(prompt):
        step(scheduler)
    return sequence


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests against a model of the cache's contents.

    Each block's slot records, for every token in it, the whole history that the token was computed
    from: the tokens and paths up to it. A chunk may only be computed over exactly its own history,
    and after pre-emption that history must be the one that it had before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(num_blocks=10, max_num_seqs=4, budget=7)
        self.queue = Queue(self.scheduler)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.histories: dict[int, list[tuple[int, Path]]] = {}
        self.live: list[ScheduledSequence] = []
        self.steps_without_finish = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        priority=st.integers(-1, 1),
        reads_afresh=st.booleans(),
    )
    def add(self, prompt: list[int], priority: int, reads_afresh: bool) -> None:
        self.live.append(self.queue.add(prompt, priority, reads_afresh))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.live) - 1))
        self.scheduler.finish(self.live.pop(number))

    @precondition(lambda self: any(s.num_output_tokens for s in self.live))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        ready = [s for s in self.live if s.num_computed >= s.num_prompt_tokens]
        if ready:
            leader = data.draw(st.sampled_from(ready))
            child = self.scheduler.fork(leader, arrival=self.queue.arrivals, priority=0)
            self.queue.arrivals += 1
            self.live.append(child)

    @rule(fails=st.sampled_from([False] * 9 + [True]), token=st.integers(0, 1))
    def step(self, fails: bool, token: int) -> None:
        schedule = self.scheduler.schedule()
        assert schedule.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len({id(c.sequence) for c in schedule.chunks}) == len(schedule.chunks)
        if self.scheduler.has_work:
            assert schedule.chunks or schedule.preempted, "there is work but nothing is done"
        generating = [s for s in self.scheduler.running if s.generating]
        assert all(any(c.sequence is s for c in schedule.chunks) for s in generating)
        for chunk in schedule.chunks:
            self.compute(chunk.sequence, chunk.start, chunk.num_tokens, chunk.path)
        if fails:
            for chunk in schedule.chunks:
                self.scheduler.finish(chunk.sequence)
                self.live.remove(chunk.sequence)
            return
        self.scheduler.complete(schedule)
        for chunk in schedule.chunks:
            if chunk.samples:
                self.scheduler.append_token(chunk.sequence, token)
                if chunk.sequence.num_tokens > 10 * SIZE - 4:
                    self.scheduler.finish(chunk.sequence)
                    self.live.remove(chunk.sequence)

    def compute(self, sequence: ScheduledSequence, start: int, count: int, path: Path) -> None:
        history = self.histories.setdefault(sequence.rank[1], [])
        for position in range(start):
            block, offset = sequence.table[position // SIZE], position % SIZE
            past = self.slots[block, offset]
            if position == len(history):
                history.append((sequence.token_ids[position], sequence.run_at(position)[1]))
            assert past == tuple(history[: position + 1]), "reads what it did not compute"
        for position in range(start, start + count):
            entry = (sequence.token_ids[position], path)
            if position == len(history):
                history.append(entry)
            assert history[position] == entry, "recomputed on another path than before"
            block, offset = sequence.table[position // SIZE], position % SIZE
            self.slots[block, offset] = tuple(history[: position + 1])

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()
        assert {id(s) for s in self.live} == {
            id(s) for s in (*self.scheduler.running, *self.scheduler.waiting)
        }

    def teardown(self) -> None:
        for sequence in self.live:
            self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)
