"""Packs the mixture into batches and feeds them to the training loop.

    python -m demo.data .data TOKENIZER OUT --shards 600 --workers 12

A shard holds `BATCHES` batches of `TOKENS` tokens; shard `i` depends on its number alone, so a run
is repeatable whatever the timing. Documents stay whole; the last one of a batch is cut to fit.
Documents over `SHORT` tokens go to the last batches of a shard, so that attention over the other
batches can be launched for short sequences.
"""

import argparse
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from demo.chat import ASSISTANT, EOS, OUTPUT_BEGIN, OUTPUT_END, TOKEN_IDS
from demo.mixture import TEXT_SHARES, Mixture, sample

TOKENS = 131072
BATCHES = 16
LONG_BATCHES = 4
SHORT, LONG = 1024, 4096
#: most documents a batch may hold
DOCUMENTS = 2048


def targets(ids: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which tokens are to be predicted: all but the first of a text; of a chat, the replies."""
    wanted = np.ones(len(ids), dtype=bool)
    wanted[0] = False
    marks = {TOKEN_IDS[m] for m in (ASSISTANT, EOS, OUTPUT_BEGIN, OUTPUT_END)}
    if TOKEN_IDS[ASSISTANT] not in ids:
        return wanted
    wanted[:] = False
    start = -1
    for place in np.flatnonzero(np.isin(ids, list(marks))):
        mark = int(ids[place])
        if mark == TOKEN_IDS[ASSISTANT]:
            start = int(place) + 2  # after <think> or </think>, which the template gives
        elif mark == TOKEN_IDS[OUTPUT_END]:
            start = int(place) + 1
        elif start >= 0:
            if mark == TOKEN_IDS[EOS]:
                wanted[start : place + 1] = True
            start = -1
    return wanted


Document = NDArray[np.uint16]


class ShardBuilder:
    """Builds shards from the mixture."""

    def __init__(self, data_dir: Path, tokenizer: Path) -> None:
        self.mixture = Mixture(data_dir)
        self.tokenizer = Tokenizer.from_file(str(tokenizer))

    def encode(self, texts: list[str]) -> list[Document]:
        """Token ids of texts that carry their own special tokens."""
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint16) for e in found]

    def build(self, index: int) -> dict[str, NDArray[np.generic]]:
        """tokens u16[BATCHES, TOKENS], wanted bool of the same shape, bounds i32[BATCHES, ...]."""
        rng = Random(1000 + index)
        short: list[Document] = []
        long: list[Document] = []
        total, need = 0, BATCHES * TOKENS + 3 * LONG
        while total < need:
            for ids in self.encode(list(sample(self.mixture, rng, 2000))):
                if len(ids) > LONG:
                    continue
                (long if len(ids) > SHORT else short).append(ids)
                total += len(ids)
        tokens = np.zeros((BATCHES, TOKENS), dtype=np.uint16)
        wanted = np.zeros((BATCHES, TOKENS), dtype=bool)
        bounds = np.full((BATCHES, DOCUMENTS + 1), TOKENS, dtype=np.int32)
        for b in range(BATCHES):
            with_long = b >= BATCHES - LONG_BATCHES
            # long documents first, spread evenly over their batches; short ones fill the rest
            share = -(-len(long) // (BATCHES - b)) if with_long else 0
            at, count = 0, 0
            while at < TOKENS:
                if share > 0 and len(long[-1]) <= TOKENS - at:
                    ids = long.pop()
                    share -= 1
                elif short:
                    ids = short.pop()
                else:
                    texts = self.mixture.texts[rng.choice(list(TEXT_SHARES))]
                    ids = self.encode([rng.choice(texts)])[0][:SHORT]
                if count == DOCUMENTS - 1:
                    raise ValueError(f"shard {index}: over {DOCUMENTS} documents in a batch")
                ids = ids[: TOKENS - at]
                bounds[b, count] = at
                tokens[b, at : at + len(ids)] = ids
                wanted[b, at : at + len(ids)] = targets(ids)
                at += len(ids)
                count += 1
        return {"tokens": tokens, "wanted": wanted, "bounds": bounds}


_builder: ShardBuilder | None = None


def _start(data_dir: Path, tokenizer: Path) -> None:
    global _builder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(5)
    _builder = ShardBuilder(data_dir, tokenizer)


def _write(job: tuple[int, Path]) -> int:
    index, out = job
    assert _builder is not None
    np.savez(out / f"{index}.tmp.npz", **_builder.build(index))  # type: ignore[arg-type]
    os.rename(out / f"{index}.tmp.npz", out / f"{index}.npz")
    return index


@dataclass
class Batch:
    """One batch on the device: tokens i64[T], wanted bool[T], bounds i32[documents + 1]."""

    tokens: Tensor
    wanted: Tensor
    bounds: Tensor
    longest: int


def batches(shards: Path, device: str, tokens: int = TOKENS) -> Iterator[Batch]:
    """All batches in order, for ever; waits for shards that are being written, deletes them.

    `tokens` cuts each batch (for a toy run); whole batches otherwise.
    """
    ready: queue.Queue[Batch] = queue.Queue(8)

    def read() -> None:
        index = 0
        while True:
            path = shards / f"{index}.npz"
            while not path.exists():
                time.sleep(0.05)
            with np.load(path) as shard:
                arrays = {k: shard[k] for k in ("tokens", "wanted", "bounds")}
            path.unlink()
            # the order of batches inside a shard is shuffled, so that long ones are spread
            order = list(range(BATCHES))
            Random(index).shuffle(order)
            for b in order:
                longest = LONG if b >= BATCHES - LONG_BATCHES else SHORT
                ready.put(
                    Batch(
                        torch.from_numpy(arrays["tokens"][b, :tokens].astype(np.int64)).to(device),
                        torch.from_numpy(arrays["wanted"][b, :tokens]).to(device),
                        torch.from_numpy(arrays["bounds"][b].clip(max=tokens)).to(device),
                        longest,
                    )
                )
            index += 1

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield ready.get()


def main() -> None:
    """Write shards with a pool of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(i, args.out) for i in range(args.shards)]
    began = time.time()
    with get_context("fork").Pool(args.workers, _start, (args.data, args.tokenizer)) as pool:
        for done, _ in enumerate(pool.imap(_write, jobs), 1):
            if done % 50 == 0:
                print(f"{done} shards in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
