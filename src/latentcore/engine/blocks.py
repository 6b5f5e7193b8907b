"""The paged latent cache's bookkeeping: who holds which block, and what can be reused.

Blocks are numbered 0..num_blocks-1 and hold `block_size` tokens each. A block that is full and
computed is *cached*: it can be found again by its key, a hash chained over all tokens from the
beginning of the sequence up to the block's end. Cached blocks that nobody holds stay findable until
they are needed; the least recently used goes first.

Equal tokens alone do not make equal bits: a prompt's tokens may have been computed on the prefill
path or on the decode path, which round differently. Each cached block therefore also knows its
*lineage*, a hash over the keys and paths of itself and of all blocks before it. A new request may
reuse any chain of one lineage; a pre-empted one only what has exactly its own.

Reuse does not end at a block's edge. Behind the last full block found, the block whose tokens agree
longest with the wanted ones gives its beginning: a *tail*, to be copied into a block of one's own.
A sequence that ends leaves its last, partly filled block to be found so; that block has no key.
Cached blocks are never written to.

This module knows nothing of tensors: it is a plain data structure.
"""

import bisect
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentcore.errors import LatentcoreError

ROOT = b"latentcore block chain 1"
"""The key and lineage before the first block."""


class CacheIntegrityError(LatentcoreError):
    """The block bookkeeping contradicts itself: a bug of ours."""


class OutOfBlocksError(LatentcoreError):
    """More blocks were asked for than are free; the caller should have looked."""


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block with these tokens after the block with key `parent` (`ROOT` if none)."""
    digest = hashlib.sha256(parent)
    digest.update(array("I", token_ids).tobytes())
    return digest.digest()


def chain_lineage(parent: bytes, key: bytes, paths: int) -> bytes:
    """The lineage of the block `key` whose token i took the prefill path where bit i is set."""
    digest = hashlib.sha256(parent)
    digest.update(key)
    digest.update(paths.to_bytes(-(-paths.bit_length() // 8), "little"))
    return digest.digest()


@dataclass(slots=True)
class _Content:
    """What a cached block holds. `parent` is the lineage of the block before; see `_Children`."""

    parent: bytes
    tokens: "array[int]"
    paths: int
    key: bytes | None
    lineage: bytes | None


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    content: _Content | None = None


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A full block found in the cache. Bit i of `paths`: token i took the prefill path."""

    index: int
    key: bytes
    lineage: bytes
    paths: int


@dataclass(frozen=True, slots=True)
class CachedTail:
    """The first `num_tokens` tokens of a cached block: fewer than a block has, at least one."""

    index: int
    num_tokens: int
    paths: int


class _Children:
    """Cached blocks that follow one lineage, sorted by their tokens."""

    def __init__(self) -> None:
        self._sorted: list[tuple[array[int], int]] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, child: "tuple[array[int], int]") -> bool:
        at = bisect.bisect_left(self._sorted, child)
        return at < len(self._sorted) and self._sorted[at] == child

    def add(self, tokens: "array[int]", index: int) -> None:
        bisect.insort(self._sorted, (tokens, index))

    def remove(self, tokens: "array[int]", index: int) -> None:
        del self._sorted[bisect.bisect_left(self._sorted, (tokens, index))]

    def closest(self, tokens: "array[int]") -> tuple[int, int]:
        """The block that agrees longest with `tokens` from its beginning, and how long."""
        # No other agrees longer than one of the two that `tokens` would stand between.
        at = bisect.bisect_left(self._sorted, (tokens, -1))
        best = (0, 0)
        for other, index in self._sorted[max(0, at - 1) : at + 1]:
            length = _common(tokens, other)
            if length > best[1]:
                best = (index, length)
        return best


def _common(one: "array[int]", other: "array[int]") -> int:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


class BlockManager:
    """Allocates, shares, finds again and evicts cache blocks."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"expected at least one block of one token: {num_blocks=} {block_size=}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))
        self._cached: dict[bytes, int] = {}
        self._children: dict[bytes, _Children] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found, held or not."""
        return sum(map(len, self._children.values()))

    @property
    def usage(self) -> float:
        """Share of blocks held by sequences, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def find_prefix(self, keys: Iterable[bytes]) -> list[CachedBlock]:
        """The longest run of cached blocks for this chain of keys that has one lineage."""
        found: list[CachedBlock] = []
        lineage = ROOT
        for key in keys:
            index = self._cached.get(key)
            if index is None:
                break
            content = self._blocks[index].content
            assert content is not None
            if content.parent != lineage:
                break
            assert content.lineage is not None
            lineage = content.lineage
            found.append(CachedBlock(index, key, lineage, content.paths))
        return found

    def find_tail(self, lineage: bytes, token_ids: "array[int]") -> CachedTail | None:
        """What the cache holds of these tokens, fewer than a block's, behind `lineage`."""
        children = self._children.get(lineage)
        if children is None:
            return None
        index, length = children.closest(token_ids)
        if length == 0:
            return None
        content = self._blocks[index].content
        assert content is not None
        return CachedTail(index, length, content.paths & ((1 << length) - 1))

    def find_exact(self, keys: Iterable[bytes], lineages: Iterable[bytes]) -> list[CachedBlock]:
        """The longest run of cached blocks that has these keys and these lineages."""
        found: list[CachedBlock] = []
        for key, lineage in zip(keys, lineages, strict=False):
            index = self._cached.get(key)
            content = None if index is None else self._blocks[index].content
            if index is None or content is None or content.lineage != lineage:
                break
            found.append(CachedBlock(index, key, lineage, content.paths))
        return found

    def count_free_after(self, hits: Sequence[CachedBlock], new: int) -> int:
        """Free blocks left once `hits` are held and `new` ones allocated; negative if too few."""
        revived = sum(1 for hit in hits if self._blocks[hit.index].ref_count == 0)
        return len(self._free) - revived - new

    def acquire(self, hits: Sequence[CachedBlock], new: int) -> list[int]:
        """Holds the blocks of `hits` and `new` fresh ones; returns the block table.

        Raises OutOfBlocksError, and changes nothing, where there are too few.
        """
        if self.count_free_after(hits, new) < 0:
            raise OutOfBlocksError(
                f"asked for {new} blocks beside {len(hits)} cached ones, {len(self._free)} are free"
            )
        table = [hit.index for hit in hits]
        for index in table:
            block = self._blocks[index]
            if block.ref_count == 0:
                del self._free[index]
            block.ref_count += 1
        table += [self._take_free() for _ in range(new)]
        return table

    def touch(self, tail: CachedTail) -> None:
        """Moves the block of a tail, if nobody holds it, to the end of the line for eviction."""
        if tail.index in self._free:
            self._free.move_to_end(tail.index)

    def append(self, table: list[int]) -> None:
        """Adds one fresh block to a block table."""
        table += self.acquire((), 1)

    def release(self, table: list[int]) -> None:
        """Gives a sequence's blocks back and empties its table.

        The last blocks are evicted before the first, so that prefixes stay whole.
        """
        for index in reversed(table):
            block = self._blocks[index]
            if block.ref_count < 1:
                raise CacheIntegrityError(f"block {index} is released but nobody holds it")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[index] = None
                if block.content is None:
                    self._free.move_to_end(index, last=False)
        table.clear()

    def publish(
        self, index: int, parent: bytes, token_ids: Sequence[int], paths: int, key: bytes
    ) -> None:
        """Makes a held block, now full and computed, findable. The first with a key keeps it.

        `parent` is the lineage of the block before, `ROOT` if none.
        """
        if key not in self._cached and self._cache(
            index,
            _Content(parent, array("I", token_ids), paths, key, chain_lineage(parent, key, paths)),
        ):
            self._cached[key] = index

    def publish_tail(self, index: int, parent: bytes, token_ids: Sequence[int], paths: int) -> None:
        """Makes a held block findable that holds fewer tokens than it could and gets no more."""
        children = self._children.get(parent)
        if children is not None and children.closest(array("I", token_ids))[1] == len(token_ids):
            return  # another block has all of them
        self._cache(index, _Content(parent, array("I", token_ids), paths, None, None))

    def forget_cached(self) -> None:
        """Makes every block unfindable; blocks that are held stay held."""
        for block in self._blocks:
            block.content = None
        self._cached.clear()
        self._children.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compares the bookkeeping with itself and with all block tables in use.

        Raises CacheIntegrityError naming the first contradiction.
        """
        held = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise CacheIntegrityError(f"a block table names a block twice: {list(table)}")
            for index in table:
                if not 0 <= index < self.num_blocks:
                    raise CacheIntegrityError(f"a block table names block {index}")
                held[index] += 1
        for index, block in enumerate(self._blocks):
            if block.ref_count != held[index]:
                raise CacheIntegrityError(
                    f"block {index} counts {block.ref_count} holders, {held[index]} tables name it"
                )
            if (index in self._free) != (block.ref_count == 0):
                raise CacheIntegrityError(
                    f"block {index} with {block.ref_count} holders is "
                    f"{'' if index in self._free else 'not '}on the free list"
                )
            if block.content is not None:
                self._check_content(index, block.content)
        for key, index in self._cached.items():
            content = self._blocks[index].content
            if content is None or content.key != key:
                raise CacheIntegrityError(f"a key leads to block {index}, which has another")
        if self.num_cached != sum(block.content is not None for block in self._blocks):
            raise CacheIntegrityError("a block can be found that has no contents")
        if not self.enable_prefix_caching and self.num_cached:
            raise CacheIntegrityError("blocks are cached though prefix caching is off")

    def _check_content(self, index: int, content: _Content) -> None:
        filled = len(content.tokens)
        children = self._children.get(content.parent)
        if children is None or (content.tokens, index) not in children:
            raise CacheIntegrityError(f"block {index} has contents but cannot be found by them")
        if not 0 <= content.paths < 1 << filled:
            raise CacheIntegrityError(f"block {index}: paths {content.paths:#x} of {filled} tokens")
        if content.key is None:
            if content.lineage is not None or not 0 < filled < self.block_size:
                raise CacheIntegrityError(f"block {index} holds {filled} tokens but has no key")
            return
        if filled != self.block_size:
            raise CacheIntegrityError(f"block {index} has a key but holds {filled} tokens")
        if content.lineage != chain_lineage(content.parent, content.key, content.paths):
            raise CacheIntegrityError(f"block {index} has the lineage of another")
        if self._cached.get(content.key) != index:
            raise CacheIntegrityError(f"block {index} has a key but cannot be found by it")

    def _cache(self, index: int, content: _Content) -> bool:
        block = self._blocks[index]
        if block.ref_count < 1:
            raise CacheIntegrityError(f"block {index} is published but nobody holds it")
        if not self.enable_prefix_caching or block.content is not None:
            return False
        block.content = content
        self._children.setdefault(content.parent, _Children()).add(content.tokens, index)
        return True

    def _take_free(self) -> int:
        index, _ = self._free.popitem(last=False)
        block = self._blocks[index]
        content = block.content
        if content is not None:
            children = self._children[content.parent]
            children.remove(content.tokens, index)
            if not children:
                del self._children[content.parent]
            if content.key is not None:
                del self._cached[content.key]
            block.content = None
        block.ref_count = 1
        return index
