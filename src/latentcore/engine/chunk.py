"""The unit of work handed to the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Tokens of one sequence to compute now; see ModelRunner."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    path: Literal["prefill", "decode"]
    logits: Literal["none", "last", "all"]
