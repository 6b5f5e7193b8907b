"""What a step of a model gives back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits of the rows that a step was asked for. The next step overwrites them.

    values  float32 [rows, vocabulary]
    best    int32 [rows], the index of each row's largest logit, the lowest among equals
    """

    values: torch.Tensor
    best: torch.Tensor

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> "StepLogits":
        """Room for `rows` rows."""
        return cls(
            torch.empty((rows, vocab_size), dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
        )

    def __len__(self) -> int:
        return len(self.best)

    def first(self, rows: int) -> "StepLogits":
        """The first `rows` rows, in the same memory."""
        return StepLogits(self.values[:rows], self.best[:rows])

    def select(self, rows: Sequence[int]) -> "StepLogits":
        """Some of the rows: the whole itself where it is all of them in order, else a copy."""
        if len(rows) == len(self) and all(row == at for at, row in enumerate(rows)):
            return self
        index = list(rows)
        return StepLogits(self.values[index], self.best[index])
