"""The unit of work handed to a model runner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Path = Literal["prefill", "decode"]
"""How a chunk attends: keys and values un-absorbed tile by tile, or absorbed in latent space."""


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Tokens of one sequence to compute now.

    token_ids    the tokens, at positions start, start + 1, ...
    block_table  cache block of every 64 positions (the runner's block_size), up to the last token
    path         chosen once a prompt, whatever its chunks; generated tokens always decode
    logits       of which tokens logits are wanted
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    path: Path
    logits: Literal["none", "last", "all"]
