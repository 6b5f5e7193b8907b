"""The block manager: sharing, reuse, eviction, and its own integrity check."""

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

from latentcore.engine.blocks import (
    ROOT,
    BlockManager,
    CacheIntegrityError,
    OutOfBlocksError,
    chain_key,
    chain_lineage,
)

SIZE = 4


def keys_of(tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = keys[-1] if keys else ROOT
        keys.append(chain_key(parent, tokens[start : start + SIZE]))
    return keys


def fill(blocks: BlockManager, tokens: list[int], prefill: list[int] | None = None) -> list[int]:
    """Holds blocks for `tokens` and publishes the full ones."""
    keys = keys_of(tokens)
    table = blocks.acquire((), -(-len(tokens) // SIZE))
    lineage = ROOT
    for number, key in enumerate(keys):
        count = SIZE if prefill is None else prefill[number]
        lineage = chain_lineage(lineage, key, count)
        blocks.publish(table[number], key, lineage, count)
    return table


def test_keys_depend_on_every_earlier_token() -> None:
    one = keys_of([1, 2, 3, 4, 5, 6, 7, 8])
    two = keys_of([9, 2, 3, 4, 5, 6, 7, 8])
    assert one[0] != two[0]
    assert one[1] != two[1]
    assert one == keys_of([1, 2, 3, 4, 5, 6, 7, 8])


def test_keys_are_stable_between_processes() -> None:
    program = (
        "from latentcore.engine.blocks import ROOT, chain_key;"
        "print(chain_key(ROOT, [1, 2, 3, 70000]).hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    assert runs == {chain_key(ROOT, [1, 2, 3, 70000]).hex()}


def test_a_released_prefix_is_found_and_shared() -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=True)
    tokens = list(range(10))
    table = fill(blocks, tokens)
    assert len(table) == 3
    first_two = table[:2]
    blocks.release(table)
    assert table == []
    assert blocks.num_free == 8
    hits = blocks.find_prefix(keys_of([*range(8), 99, 99, 99, 99]))
    assert [hit.index for hit in hits] == first_two
    one = blocks.acquire(hits, 1)
    two = blocks.acquire(hits, 1)
    assert one[:2] == two[:2] == first_two
    assert one[2] != two[2]
    blocks.check_integrity([one, two])
    assert blocks.num_free == 4


def test_eviction_takes_uncached_first_then_least_recently_used_tails() -> None:
    blocks = BlockManager(6, SIZE, enable_prefix_caching=True)
    old = fill(blocks, list(range(8)))
    new = fill(blocks, list(range(100, 108)))
    spare = blocks.acquire((), 2)
    old_blocks, new_blocks, spare_blocks = list(old), list(new), list(spare)
    blocks.release(old)
    blocks.release(new)
    blocks.release(spare)
    order = blocks.acquire((), 6)
    assert set(order[:2]) == set(spare_blocks)
    assert order[2:] == [*reversed(old_blocks), *reversed(new_blocks)]
    assert blocks.num_cached == 0
    blocks.check_integrity([order])


def test_touching_a_prefix_saves_it_from_eviction() -> None:
    blocks = BlockManager(4, SIZE, enable_prefix_caching=True)
    old = fill(blocks, [1, 2, 3, 4])
    new = fill(blocks, [5, 6, 7, 8])
    blocks.release(old)
    blocks.release(new)
    again = blocks.acquire(blocks.find_prefix(keys_of([1, 2, 3, 4])), 0)
    blocks.release(again)
    held = blocks.acquire((), 3)
    assert blocks.find_prefix(keys_of([1, 2, 3, 4]))
    assert not blocks.find_prefix(keys_of([5, 6, 7, 8]))
    blocks.check_integrity([held])


def test_exact_search_wants_the_same_lineage() -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=True)
    tokens = list(range(8))
    keys = keys_of(tokens)
    table = fill(blocks, tokens, prefill=[SIZE, 1])
    first = chain_lineage(ROOT, keys[0], SIZE)
    same = [first, chain_lineage(first, keys[1], 1)]
    other = [first, chain_lineage(first, keys[1], 0)]
    assert len(blocks.find_exact(keys, same)) == 2
    assert len(blocks.find_exact(keys, other)) == 1
    assert [hit.prefill_tokens for hit in blocks.find_prefix(keys)] == [SIZE, 1]
    blocks.check_integrity([table])


def test_a_chain_of_mixed_lineages_is_not_followed() -> None:
    """A block computed after another version of its predecessor must not follow this one."""
    blocks = BlockManager(4, SIZE, enable_prefix_caching=True)
    keys = keys_of(list(range(8)))
    table = blocks.acquire((), 2)
    blocks.publish(table[0], keys[0], chain_lineage(ROOT, keys[0], SIZE), SIZE)
    decoded_first = chain_lineage(ROOT, keys[0], 0)
    blocks.publish(table[1], keys[1], chain_lineage(decoded_first, keys[1], 0), 0)
    assert [hit.index for hit in blocks.find_prefix(keys)] == [table[0]]


def test_caching_off_finds_nothing() -> None:
    blocks = BlockManager(4, SIZE, enable_prefix_caching=False)
    table = fill(blocks, [1, 2, 3, 4])
    assert blocks.find_prefix(keys_of([1, 2, 3, 4])) == []
    assert blocks.num_cached == 0
    blocks.check_integrity([table])


def test_asking_for_too_many_changes_nothing() -> None:
    blocks = BlockManager(3, SIZE, enable_prefix_caching=True)
    table = fill(blocks, list(range(8)))
    blocks.release(table)
    hits = blocks.find_prefix(keys_of(list(range(8))))
    assert blocks.count_free_after(hits, 1) == 0
    with pytest.raises(OutOfBlocksError):
        blocks.acquire(hits, 2)
    assert blocks.num_free == 3
    blocks.check_integrity([])


def test_integrity_check_notices_faults() -> None:
    blocks = BlockManager(3, SIZE, enable_prefix_caching=True)
    table = fill(blocks, [1, 2, 3, 4])
    blocks.check_integrity([table])
    with pytest.raises(CacheIntegrityError, match="counts 1 holders, 0 tables"):
        blocks.check_integrity([])
    with pytest.raises(CacheIntegrityError, match="names a block twice"):
        blocks.check_integrity([[table[0], table[0]]])
    with pytest.raises(CacheIntegrityError, match="names block 3"):
        blocks.check_integrity([[3]])
    blocks._cached[b"stray"] = table[0]
    with pytest.raises(CacheIntegrityError, match="a key leads to block"):
        blocks.check_integrity([table])


def test_releasing_twice_is_noticed() -> None:
    blocks = BlockManager(3, SIZE, enable_prefix_caching=True)
    table = blocks.acquire((), 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(CacheIntegrityError, match="nobody holds it"):
        blocks.release(copy)


class BlockMachine(RuleBasedStateMachine):
    """Random holders of random token chains; what is found must be what was stored."""

    operations = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, SIZE, enable_prefix_caching=True)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        path=st.sampled_from([0, SIZE]),
    )
    def hold(self, tokens: list[int], path: int) -> None:
        keys = keys_of(tokens)
        hits = self.blocks.find_prefix(keys)
        for hit in hits:
            assert self.contents[hit.index] == hit.lineage, "a hit has someone else's contents"
        new = -(-len(tokens) // SIZE) - len(hits)
        if self.blocks.count_free_after(hits, new) < 0:
            with pytest.raises(OutOfBlocksError):
                self.blocks.acquire(hits, new)
            return
        table = self.blocks.acquire(hits, new)
        lineage = hits[-1].lineage if hits else ROOT
        for number in range(len(hits), len(table)):
            self.contents.pop(table[number], None)
            if number < len(keys):
                lineage = chain_lineage(lineage, keys[number], path)
                self.contents[table[number]] = lineage
                self.blocks.publish(table[number], keys[number], lineage, path)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        if self.blocks.num_free:
            self.blocks.append(table)
            self.contents.pop(table[-1], None)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.tables) - 1))
        self.blocks.release(self.tables.pop(number))

    @rule()
    def forget(self) -> None:
        self.blocks.forget_cached()
        assert self.blocks.num_cached == 0

    @invariant()
    def whole(self) -> None:
        type(self).operations += 1
        self.blocks.check_integrity(self.tables)

    def teardown(self) -> None:
        for table in self.tables:
            self.blocks.release(table)
        self.blocks.check_integrity([])
        assert self.blocks.num_free == self.blocks.num_blocks


def test_ten_thousand_random_operations() -> None:
    """Each followed by `check_integrity`; examples may be shorter than Hypothesis is told."""
    BlockMachine.operations = 0
    while BlockMachine.operations < 10_000:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            BlockMachine, settings=settings(max_examples=50, stateful_step_count=100, deadline=None)
        )
