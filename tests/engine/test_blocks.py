"""The block manager: sharing, reuse, eviction, and its own integrity check."""

import subprocess
import sys
from array import array

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


ALL = (1 << SIZE) - 1
"""Every token of a block on the prefill path."""


def fill(blocks: BlockManager, tokens: list[int], paths: list[int] | None = None) -> list[int]:
    """Holds blocks for `tokens`, publishes the full ones, and the last one if it is not."""
    keys = keys_of(tokens)
    table = blocks.acquire((), -(-len(tokens) // SIZE))
    lineage = ROOT
    for number, key in enumerate(keys):
        own = ALL if paths is None else paths[number]
        part = tokens[number * SIZE : (number + 1) * SIZE]
        blocks.publish(table[number], lineage, part, own, key)
        lineage = chain_lineage(lineage, key, own)
    if rest := tokens[len(keys) * SIZE :]:
        blocks.publish_tail(table[-1], lineage, rest, (1 << len(rest)) - 1)
    return table


def lineage_of(tokens: list[int], paths: int = ALL) -> bytes:
    """The lineage of a chain of full blocks, all on the same paths."""
    lineage = ROOT
    for key in keys_of(tokens):
        lineage = chain_lineage(lineage, key, paths)
    return lineage


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
    table = fill(blocks, tokens, paths=[ALL, 1])
    first = chain_lineage(ROOT, keys[0], ALL)
    same = [first, chain_lineage(first, keys[1], 1)]
    other = [first, chain_lineage(first, keys[1], 0)]
    assert len(blocks.find_exact(keys, same)) == 2
    assert len(blocks.find_exact(keys, other)) == 1
    assert [hit.paths for hit in blocks.find_prefix(keys)] == [ALL, 1]
    blocks.check_integrity([table])


def test_a_chain_of_mixed_lineages_is_not_followed() -> None:
    """A block computed after another version of its predecessor must not follow this one."""
    blocks = BlockManager(4, SIZE, enable_prefix_caching=True)
    keys = keys_of(list(range(8)))
    table = blocks.acquire((), 2)
    blocks.publish(table[0], ROOT, range(4), ALL, keys[0])
    decoded_first = chain_lineage(ROOT, keys[0], 0)
    blocks.publish(table[1], decoded_first, range(4, 8), 0, keys[1])
    assert [hit.index for hit in blocks.find_prefix(keys)] == [table[0]]
    assert blocks.find_tail(chain_lineage(ROOT, keys[0], ALL), array("I", [4, 5, 6])) is None
    blocks.check_integrity([table])


@pytest.mark.parametrize(
    ("wanted", "length", "owner"),
    [
        ([4, 5, 6], 2, 0),
        ([4, 5, 7, 8], 3, 1),
        ([4, 5, 7], 3, 1),
        ([4], 1, None),
        ([3, 5, 7], 0, None),
        ([9, 9, 9], 2, 2),
        ([9, 9], 2, 2),
        ([], 0, None),
    ],
)
def test_a_tail_is_the_longest_common_beginning(
    wanted: list[int], length: int, owner: int | None
) -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=True)
    ends = [[4, 5], [4, 5, 7, 7], [9, 9]]
    tables = [fill(blocks, [0, 1, 2, 3, *end]) for end in ends]
    tail = blocks.find_tail(lineage_of([0, 1, 2, 3]), array("I", wanted))
    assert (tail.num_tokens if tail else 0) == length
    if tail is not None:
        assert tail.paths == (1 << length) - 1
        if owner is not None:
            assert tail.index == tables[owner][1]
    assert blocks.find_tail(ROOT, array("I", [9, 9])) is None
    blocks.check_integrity(tables)


def test_a_tail_that_another_block_holds_is_not_kept_twice() -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=True)
    tables = [fill(blocks, [0, 1, 2]), fill(blocks, [0, 1]), fill(blocks, [0, 1, 2])]
    assert blocks.num_cached == 1
    blocks.check_integrity(tables)


def test_a_touched_tail_is_evicted_last() -> None:
    blocks = BlockManager(4, SIZE, enable_prefix_caching=True)
    for tokens in ([0, 1], [2, 3], [4, 5], [6, 7]):
        table = fill(blocks, tokens)
        blocks.release(table)
    tail = blocks.find_tail(ROOT, array("I", [0, 1, 2]))
    assert tail is not None
    blocks.touch(tail)
    table = blocks.acquire((), 3)
    assert blocks.find_tail(ROOT, array("I", [0, 1, 2])) == tail
    blocks.append(table)
    assert blocks.find_tail(ROOT, array("I", [0, 1, 2])) is None
    blocks.check_integrity([table])


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
    del blocks._cached[b"stray"]
    blocks._children[ROOT].add(array("I", [1, 2]), table[0])
    with pytest.raises(CacheIntegrityError, match="has no contents"):
        blocks.check_integrity([table])
    del blocks._children[ROOT]
    with pytest.raises(CacheIntegrityError, match="cannot be found by them"):
        blocks.check_integrity([table])


def test_releasing_twice_is_noticed() -> None:
    blocks = BlockManager(3, SIZE, enable_prefix_caching=True)
    table = blocks.acquire((), 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(CacheIntegrityError, match="nobody holds it"):
        blocks.release(copy)


class BlockMachine(RuleBasedStateMachine):
    """Random holders of random token chains; what is found must be what was stored.

    `contents`: for every block, the history of each of its tokens.
    """

    operations = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, SIZE, enable_prefix_caching=True)
        self.tables: list[list[int]] = []
        self.contents: dict[int, list[tuple[int, ...]]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        path=st.integers(0, 1),
    )
    def hold(self, tokens: list[int], path: int) -> None:
        keys = keys_of(tokens)
        hits = self.blocks.find_prefix(keys)
        history: tuple[int, ...] = ()
        for number, hit in enumerate(hits):
            for offset in range(SIZE):
                history += (tokens[number * SIZE + offset], hit.paths >> offset & 1)
                assert self.contents[hit.index][offset] == history, "someone else's contents"
        start = len(hits) * SIZE
        wanted = tokens[start : start + SIZE - 1]
        tail = self.blocks.find_tail(hits[-1].lineage if hits else ROOT, array("I", wanted))
        copied: list[tuple[int, ...]] = []
        if tail is not None:
            for offset in range(tail.num_tokens):
                copied.append(
                    (copied[-1] if copied else history) + (wanted[offset], tail.paths >> offset & 1)
                )
            assert self.contents[tail.index][: tail.num_tokens] == copied
            self.blocks.touch(tail)
        new = -(-len(tokens) // SIZE) - len(hits)
        if self.blocks.count_free_after(hits, new) < 0:
            with pytest.raises(OutOfBlocksError):
                self.blocks.acquire(hits, new)
            return
        table = self.blocks.acquire(hits, new)
        lineage = hits[-1].lineage if hits else ROOT
        for number in range(len(hits), len(table)):
            block = table[number]
            part = tokens[number * SIZE : (number + 1) * SIZE]
            self.contents[block] = copied
            paths = tail.paths if copied and tail is not None else 0
            for token in part[len(copied) :]:
                past = self.contents[block][-1] if self.contents[block] else history
                paths |= path << len(self.contents[block])
                self.contents[block] = [*self.contents[block], (*past, token, path)]
            history, copied = self.contents[block][-1], []
            if number < len(keys):
                self.blocks.publish(block, lineage, part, paths, keys[number])
                lineage = chain_lineage(lineage, keys[number], paths)
            else:
                self.blocks.publish_tail(block, lineage, part, paths)
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
