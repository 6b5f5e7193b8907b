"""Drives a ModelRunner over whole prompts: in chunks, several at a time, or token by token."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from latentcore.config import EngineConfig
from latentcore.models.chunk import Path as AttentionPath
from latentcore.models.chunk import SequenceChunk
from latentcore.models.runner import ModelRunner

MAX_LENGTH = 256
MAX_SEQUENCES = 16


@contextmanager
def loaded(
    folder: Path, *, quantization: str = "auto", threads: int = 1, use_graph: bool = True
) -> Iterator[ModelRunner]:
    """The checkpoint in `folder`, ready to run a handful of short sequences."""
    engine = EngineConfig(
        quantization=quantization,
        threads=threads,
        max_model_len=MAX_LENGTH,
        max_num_seqs=MAX_SEQUENCES,
        max_num_batched_tokens=512,
        use_graph=use_graph,
    )
    runner = ModelRunner.load(folder, engine, None)
    try:
        yield runner
    finally:
        runner.close()


class Sequences:
    """Sequences in a runner's cache, their blocks scattered over it."""

    def __init__(self, runner: ModelRunner, count: int) -> None:
        self.runner = runner
        each = MAX_LENGTH // runner.block_size
        blocks = random.Random(count).sample(range(runner.num_blocks), count * each)
        self.tables = [blocks[i * each : (i + 1) * each] for i in range(count)]
        self.lengths = [0] * count

    def step(
        self, tokens: dict[int, Sequence[int]], path: AttentionPath
    ) -> dict[int, torch.Tensor]:
        """Computes more tokens of some sequences in one pass.

        Logits of each sequence: [tokens, vocabulary].
        """
        chunks = []
        for index, ids in tokens.items():
            start = self.lengths[index]
            self.lengths[index] = start + len(ids)
            used = -(-self.lengths[index] // self.runner.block_size)
            chunks.append(SequenceChunk(ids, start, self.tables[index][:used], path, "all"))
        rows = self.runner.forward(chunks).clone()
        parts = torch.split(rows, [len(ids) for ids in tokens.values()])
        return dict(zip(tokens, parts, strict=True))


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
        tokens = {}
        for index, sizes in enumerate(chunks):
            if number < len(sizes):
                start = sequences.lengths[index]
                tokens[index] = prompts[index][start : start + sizes[number]]
        for index, rows in sequences.step(tokens, path).items():
            parts[index].append(rows)
    return [torch.cat(rows) for rows in parts]
