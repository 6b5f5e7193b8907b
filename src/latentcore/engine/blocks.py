"""The paged latent cache's bookkeeping: who holds which block, and what can be reused.

Blocks are numbered 0..num_blocks-1 and hold `block_size` tokens each. A block that is full and
computed is *cached*: it can be found again by its key, a hash chained over all tokens from the
beginning of the sequence up to the block's end. Cached blocks that nobody holds stay findable until
they are needed; the least recently used goes first.

Equal tokens alone do not make equal bits: a prompt's tokens may have been computed on the prefill
path or on the decode path, which round differently. Each cached block therefore also knows its
*lineage*, a hash over the keys and paths of itself and of all blocks before it. A new request may
reuse any chain of one lineage; a pre-empted one only what has exactly its own.

This module knows nothing of tensors: it is a plain data structure.
"""

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


def chain_lineage(parent: bytes, key: bytes, prefill_tokens: int) -> bytes:
    """The lineage of the block `key` whose first `prefill_tokens` tokens took the prefill path."""
    digest = hashlib.sha256(parent)
    digest.update(key)
    digest.update(prefill_tokens.to_bytes(4, "little"))
    return digest.digest()


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    key: bytes | None = None
    lineage: bytes | None = None
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block found in the cache."""

    index: int
    key: bytes
    lineage: bytes
    prefill_tokens: int


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

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by key, held or not."""
        return len(self._cached)

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
            block = self._blocks[index]
            lineage = chain_lineage(lineage, key, block.prefill_tokens)
            if block.lineage != lineage:
                break
            found.append(CachedBlock(index, key, lineage, block.prefill_tokens))
        return found

    def find_exact(self, keys: Iterable[bytes], lineages: Iterable[bytes]) -> list[CachedBlock]:
        """The longest run of cached blocks that has these keys and these lineages."""
        found: list[CachedBlock] = []
        for key, lineage in zip(keys, lineages, strict=False):
            index = self._cached.get(key)
            if index is None or self._blocks[index].lineage != lineage:
                break
            found.append(CachedBlock(index, key, lineage, self._blocks[index].prefill_tokens))
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
                if block.key is None:
                    self._free.move_to_end(index, last=False)
        table.clear()

    def publish(self, index: int, key: bytes, lineage: bytes, prefill_tokens: int) -> None:
        """Makes a held block, now full and computed, findable. The first with a key keeps it."""
        block = self._blocks[index]
        if block.ref_count < 1:
            raise CacheIntegrityError(f"block {index} is published but nobody holds it")
        if not self.enable_prefix_caching or block.key is not None or key in self._cached:
            return
        block.key = key
        block.lineage = lineage
        block.prefill_tokens = prefill_tokens
        self._cached[key] = index

    def forget_cached(self) -> None:
        """Makes every block unfindable; blocks that are held stay held."""
        for key, index in self._cached.items():
            block = self._blocks[index]
            assert block.key == key
            block.key = None
            block.lineage = None
        self._cached.clear()

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
            if (block.key is None) != (block.lineage is None):
                raise CacheIntegrityError(f"block {index} has a key or a lineage, but not both")
            if block.key is not None and self._cached.get(block.key) != index:
                raise CacheIntegrityError(f"block {index} has a key but cannot be found by it")
            if not 0 <= block.prefill_tokens <= self.block_size:
                raise CacheIntegrityError(f"block {index}: {block.prefill_tokens} prefill tokens")
        for key, index in self._cached.items():
            if self._blocks[index].key != key:
                raise CacheIntegrityError(f"a key leads to block {index}, which has another")
        if not self.enable_prefix_caching and self._cached:
            raise CacheIntegrityError("blocks are cached though prefix caching is off")

    def _take_free(self) -> int:
        index, _ = self._free.popitem(last=False)
        block = self._blocks[index]
        if block.key is not None:
            del self._cached[block.key]
            block.key = None
            block.lineage = None
            block.prefill_tokens = 0
        block.ref_count = 1
        return index
