"""The engine's sampler: rows to parameter arrays for the ops of `latentcore.ops.sampling`."""

from collections.abc import Sequence

import numpy as np
import torch

from latentcore.engine.sampler import SampledToken, SampleRow, TokenLogprobs
from latentcore.engine.sampling_params import SamplingParams
from latentcore.models.logits import StepLogits
from latentcore.ops import sampling


class NativeSampler:
    """Chooses tokens with the native sampling ops; log-probabilities are the model's own."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def sample(self, logits: StepLogits, rows: Sequence[SampleRow]) -> list[SampledToken]:
        """Chooses a token for each row of `logits`, which are overwritten."""
        changed = [row for row in rows if _changes_logits(row)]
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        raw = _rows_of(logits.values, wanted, copy=bool(changed)) if wanted else None
        if changed:
            self._restrict(logits.values, rows)
            self._add_bias(logits.values, rows)
            self._penalize(logits.values, rows)
        if any(not row.params.greedy for row in rows):
            chosen = self._draw(logits.values, rows)
        elif changed:
            best = torch.empty(len(rows), dtype=torch.int32)
            sampling.greedy(logits.values, best)
            chosen = best.tolist()
        else:
            chosen = logits.best.tolist()
        sampled = [SampledToken(token_id) for token_id in chosen]
        if raw is not None:
            num_top = max(rows[i].params.logprobs or 0 for i in wanted)
            found = self.logprobs(raw, [chosen[i] for i in wanted], num_top)
            for i, logprobs in zip(wanted, found, strict=True):
                sampled[i].logprobs = logprobs
        return sampled

    def logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """For each row, the given token's log-probability and `num_top` alternatives."""
        count = len(token_ids)
        num_top = min(num_top, self._vocab_size)
        values = torch.empty((count, 1), dtype=torch.float32)
        ranks = torch.empty((count, 1), dtype=torch.int32)
        top_ids = torch.empty((count, num_top), dtype=torch.int32)
        top_values = torch.empty((count, num_top), dtype=torch.float32)
        ids = torch.tensor(token_ids, dtype=torch.int32).unsqueeze(1)
        sampling.logprobs(logits, ids, values, ranks, top_ids, top_values)
        return [
            TokenLogprobs(value, rank, list(zip(tops, logs, strict=True)))
            for (value,), (rank,), tops, logs in zip(
                values.tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
            )
        ]

    def _restrict(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        masked = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
        if masked:
            allowed = torch.cat([mask for _, mask in masked])
            sampling.restrict(logits, _int32([i for i, _ in masked]), allowed)

    def _add_bias(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        if not any(row.params.biases or row.banned_ids for row in rows):
            return
        offsets = [0]
        token_ids: list[int] = []
        bias: list[float] = []
        for row in rows:
            banned = dict.fromkeys(row.banned_ids)
            for token_id, value in row.params.biases.items():
                if token_id not in banned:
                    token_ids.append(token_id)
                    bias.append(value)
            token_ids += banned
            bias += [-torch.inf] * len(banned)
            offsets.append(len(token_ids))
        sampling.add_bias(
            logits, _int32(offsets), _int32(token_ids), torch.tensor(bias, dtype=torch.float32)
        )

    def _penalize(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        penalized = [_penalizes(row.params) for row in rows]
        if not any(penalized):
            return
        offsets = [0]
        output_offsets: list[int] = []
        sequences: list[np.ndarray] = []
        for row, wanted in zip(rows, penalized, strict=True):
            start = offsets[-1]
            output_offsets.append(start + row.num_prompt_tokens if wanted else start)
            if wanted:
                sequences.append(np.asarray(row.token_ids, dtype=np.int32))
            offsets.append(start + len(row.token_ids) if wanted else start)
        sampling.penalize(
            logits,
            _int32(offsets),
            _int32(output_offsets),
            torch.from_numpy(np.concatenate(sequences)),
            _float32([row.params.repetition_penalty for row in rows]),
            _float32([row.params.presence_penalty for row in rows]),
            _float32([row.params.frequency_penalty for row in rows]),
        )

    def _draw(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        token_ids = torch.empty(len(rows), dtype=torch.int32)
        counters = [len(row.token_ids) - row.num_prompt_tokens for row in rows]
        sampling.sample(
            logits,
            _float32([row.params.temperature for row in rows]),
            _int32([row.params.top_k for row in rows]),
            _float32([row.params.top_p for row in rows]),
            _float32([row.params.min_p for row in rows]),
            torch.tensor([_signed(row.seed) for row in rows], dtype=torch.int64),
            torch.tensor(counters, dtype=torch.int64),
            token_ids,
            torch.empty(len(rows), dtype=torch.float32),
        )
        chosen: list[int] = token_ids.tolist()
        return chosen


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _changes_logits(row: SampleRow) -> bool:
    return bool(
        row.allowed is not None or row.banned_ids or row.params.biases or _penalizes(row.params)
    )


def _rows_of(logits: torch.Tensor, rows: Sequence[int], *, copy: bool) -> torch.Tensor:
    """The given rows; the tensor itself where those are all and no copy is asked for."""
    if len(rows) == len(logits) and not copy:
        return logits
    return logits[list(rows)]


def _signed(seed: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _float32(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
