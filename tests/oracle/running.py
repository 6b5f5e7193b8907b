"""Drives a ModelRunner over whole prompts: in chunks, several at a time, or token by token."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentcore.config import EngineConfig
from latentcore.layers.ffn import Moe
from latentcore.layers.step import Buffers, Step
from latentcore.models.chunk import Path as AttentionPath
from latentcore.models.chunk import SequenceChunk
from latentcore.models.runner import ModelRunner

MAX_LENGTH = 256
MAX_SEQUENCES = 16
MAX_BATCHED_TOKENS = 512


@contextmanager
def loaded(
    folder: Path,
    *,
    quantization: str = "auto",
    threads: int = 1,
    use_graph: bool = True,
    max_length: int = MAX_LENGTH,
) -> Iterator[ModelRunner]:
    """The checkpoint in `folder`, ready to run a handful of short sequences."""
    engine = EngineConfig(
        quantization=quantization,
        threads=threads,
        max_model_len=max_length,
        max_num_seqs=MAX_SEQUENCES,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        use_graph=use_graph,
    )
    runner = ModelRunner.load(folder, engine, None)
    try:
        yield runner
    finally:
        runner.close()


@contextmanager
def recorded_routing() -> Iterator[list[torch.Tensor]]:
    """The experts that are chosen inside, op by op in order: int64 [rows, k] each.

    Only of runners without graphs: replaying one chooses unseen.
    """
    found: list[torch.Tensor] = []
    route = Moe._route

    def and_record(moe: Moe, step: Step, b: Buffers) -> None:
        route(moe, step, b)
        found.append(b.expert_ids[: step.rows].to(torch.int64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Moe, "_route", and_record)
        yield found


@dataclass(frozen=True)
class Piece:
    """Some more tokens of sequence `index`, and how they attend."""

    index: int
    token_ids: Sequence[int]
    path: AttentionPath


class Sequences:
    """Sequences in a runner's cache, their blocks scattered over it."""

    def __init__(self, runner: ModelRunner, count: int) -> None:
        self.runner = runner
        each = runner.max_model_len // runner.block_size
        blocks = random.Random(count).sample(range(runner.num_blocks), count * each)
        self.tables = [blocks[i * each : (i + 1) * each] for i in range(count)]
        self.lengths = [0] * count

    def step(self, *pieces: Piece) -> list[torch.Tensor]:
        """Computes the pieces in one pass; logits of each: [its tokens, vocabulary]."""
        chunks = []
        for piece in pieces:
            start = self.lengths[piece.index]
            self.lengths[piece.index] = end = start + len(piece.token_ids)
            table = self.tables[piece.index][: -(-end // self.runner.block_size)]
            chunks.append(SequenceChunk(piece.token_ids, start, table, piece.path, "all"))
        rows = self.runner.forward(chunks).values.clone()
        return list(torch.split(rows, [len(piece.token_ids) for piece in pieces]))


def run(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    path: AttentionPath,
    chunks: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """Logits of every position of every prompt: [length, vocabulary] each.

    chunks[i] holds the sizes of the chunks of prompt i; step n computes chunk n of all prompts that
    have one.
    """
    sequences = Sequences(runner, len(prompts))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for number in range(max(map(len, chunks))):
        pieces = []
        for index, sizes in enumerate(chunks):
            if number < len(sizes):
                start = sequences.lengths[index]
                ids = prompts[index][start : start + sizes[number]]
                pieces.append(Piece(index, ids, path))
        for piece, rows in zip(pieces, sequences.step(*pieces), strict=True):
            parts[piece.index].append(rows)
    return [torch.cat(rows) for rows in parts]
