"""Runs the real model code on tensors without memory, so that every call meets every op's checks.

Weights, buffers and cache lie on the meta device: an op then runs the same C++ checks as with data,
and nothing else. The runner itself, capture and replay included, is the one that serves. A
disagreement between a kernel, its weights and its call site shows here, in about a second, before
any weight is read.
"""

from collections.abc import Iterator
from typing import Literal

from latentcore.config import EngineConfig, ModelConfig
from latentcore.errors import LatentcoreError
from latentcore.layers.step import Limits
from latentcore.models.chunk import Path, SequenceChunk
from latentcore.models.parts import Meta, assemble, parts_of
from latentcore.models.resolve import ModelPlan
from latentcore.models.runner import ModelRunner


class ContractError(LatentcoreError):
    """An op refused what the model's own code handed it: a bug of latentcore's, not the user's."""


def dry_run(plan: ModelPlan, engine: EngineConfig, limits: Limits) -> list[str]:
    """Drives the real runner through every kind of step: each call meets its op's checks.

    Returns the names of the steps that were run. Raises ContractError with the op's own message.
    """
    done: list[str] = []
    name = "capture of the decode graphs" if engine.use_graph else "the start"
    try:
        runner = ModelRunner(plan.config, engine, assemble(parts_of(plan, Meta())), plan, limits)
        if engine.use_graph:
            done.append(name)
        for name, wanted, chunks in _steps(plan.config, limits):
            found = runner.forward(chunks)
            if len(found) != wanted:
                raise RuntimeError(f"expected {wanted} rows of logits, found {len(found)}")
            done.append(name)
        runner.close()
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise ContractError(f"the model's code and an op disagree: {name}: {message}") from error
    return list(dict.fromkeys(done))


def _steps(config: ModelConfig, limits: Limits) -> Iterator[tuple[str, int, list[SequenceChunk]]]:
    """What is run: name, number of rows whose logits are wanted, chunks."""
    most, longest, block = limits.max_tokens, limits.max_position, limits.block_size
    token = config.vocab_size - 1

    def chunk(
        count: int,
        path: Path = "prefill",
        start: int = 0,
        logits: Literal["none", "last", "all"] = "last",
    ) -> SequenceChunk:
        blocks = range(-(-(start + count) // block))
        return SequenceChunk([token] * count, start, blocks, path, logits)

    yield "prefill of one token", 1, [chunk(1)]
    largest = min(most, longest)
    yield "prefill in one chunk", 1, [chunk(largest)]
    first = min(block + 1, most, longest - 1)
    if first > 0:
        then = min(most, longest - first)
        yield "prefill in several chunks", 0, [chunk(first, logits="none")]
        yield "prefill in several chunks", 1, [chunk(then, start=first)]
        hit = min(block, longest - 1)
        rest = min(17, most, longest - hit)
        yield "prefill after a prefix hit", 1, [chunk(rest, start=hit)]
        yield "prefill after a prefix hit, absorbed", 1, [chunk(rest, "decode", hit)]
    yield "logits of every prompt token", largest, [chunk(largest, logits="all")]
    several = min(3, limits.max_seqs, most)
    each = max(1, min(block + 1, most // several, longest))
    yield "prefill of several sequences", several, [chunk(each)] * several
    if several > 1:
        mixed = [chunk(1, "decode", longest - 1), chunk(min(each, most - 1))]
        yield "mixed batch", 2, mixed
    yield "decode at the end of the longest sequence", 1, [chunk(1, "decode", longest - 1)]
    at = min(block, longest - 1)
    for batch in range(1, min(limits.max_seqs, most) + 1):
        name = f"decode of 1 to {limits.max_seqs} sequences"
        yield name, batch, [chunk(1, "decode", at)] * batch
