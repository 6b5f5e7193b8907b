"""The sampler's rows become the right arrays for the native ops."""

import pytest
import torch

from latentcore.engine.native_sampler import NativeSampler
from latentcore.engine.sampler import SampledToken, SampleRow
from latentcore.engine.sampling_params import SamplingParams
from tests.engine.fakes import step_logits

VOCAB = 97


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def row(params: SamplingParams, tokens: tuple[int, ...] = (1, 2, 3), prompt: int = 2) -> SampleRow:
    return SampleRow(params=params, seed=7, token_ids=tokens, num_prompt_tokens=prompt)


def sample(values: torch.Tensor, *rows: SampleRow) -> list[SampledToken]:
    return NativeSampler(VOCAB).sample(step_logits(values.clone()), rows)


def test_greedy_takes_the_largest() -> None:
    values = logits(3)
    found = sample(values, *[row(SamplingParams(temperature=0))] * 3)
    assert [one.token_id for one in found] == values.argmax(dim=1).tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    values = logits(4)
    rows = [
        row(SamplingParams(temperature=0)),
        row(SamplingParams(temperature=0.8, top_p=0.9)),
        row(SamplingParams(temperature=1.2, top_k=5, frequency_penalty=1.0)),
        row(SamplingParams(min_p=0.1, repetition_penalty=1.3)),
    ]
    together = sample(values, *rows)
    for number, one in enumerate(rows):
        alone = sample(values[number : number + 1], one)
        assert alone[0].token_id == together[number].token_id


def test_seed_and_output_length_decide_the_draw() -> None:
    values = logits(1).expand(40, VOCAB)
    rows = [row(SamplingParams(), tokens=tuple(range(3 + number))) for number in range(40)]
    first, second = sample(values, *rows), sample(values, *rows)
    assert first == second
    assert len({one.token_id for one in first}) > 5


def test_banned_and_biased_tokens() -> None:
    values = logits(2)
    best = values.argmax(dim=1).tolist()
    banned = row(SamplingParams(temperature=0, logit_bias={best[0]: 50.0}))
    banned.banned_ids = (best[0],)
    biased = row(SamplingParams(temperature=0, logit_bias={5: 90.0, 6: -1.0}))
    found = sample(values, banned, biased)
    expected = values[0].clone()
    expected[best[0]] = -torch.inf
    assert [one.token_id for one in found] == [int(expected.argmax()), 5]


def test_a_mask_restricts_its_row_alone() -> None:
    values = logits(2)
    mask = torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32)
    mask[0, 2] = 1 << 3
    masked = row(SamplingParams(temperature=0))
    masked.allowed = mask
    found = sample(values, row(SamplingParams(temperature=0)), masked)
    assert [one.token_id for one in found] == [int(values[0].argmax()), 67]


def test_penalties_count_the_output_alone_and_repetition_everything() -> None:
    values = torch.zeros(3, VOCAB)
    values[:, 1] = 3.0
    values[:, 3] = 2.0
    values[:, 9] = 1.9
    presence = row(SamplingParams(temperature=0, presence_penalty=2.0), tokens=(1, 1, 3))
    frequency = row(SamplingParams(temperature=0, frequency_penalty=1.5), tokens=(5, 5, 1))
    repetition = row(SamplingParams(temperature=0, repetition_penalty=2.0), tokens=(1, 1, 3))
    found = sample(values, presence, frequency, repetition)
    assert [one.token_id for one in found] == [1, 3, 9]


def test_logprobs_are_the_models_own() -> None:
    values = logits(3)
    expected = values.double().log_softmax(dim=1)
    rows = [
        row(SamplingParams(temperature=0, logprobs=2, logit_bias={4: 80.0})),
        row(SamplingParams(temperature=0)),
        row(SamplingParams(temperature=0.5, logprobs=0)),
    ]
    first, second, third = sample(values, *rows)
    assert second.logprobs is None
    assert first.token_id == 4
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(expected[0, 4].item(), abs=1e-5)
    assert first.logprobs.rank == 1 + int((values[0] > values[0, 4]).sum())
    top = expected[0].topk(2)
    assert [token for token, _ in first.logprobs.top] == top.indices.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(
        top.values.tolist(), abs=1e-5
    )
    assert third.logprobs is not None
    assert third.logprobs.logprob == pytest.approx(expected[2, third.token_id].item(), abs=1e-5)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (found,) = NativeSampler(VOCAB).logprobs(logits(1), [3], 128)
    assert len(found.top) == VOCAB
    (none,) = NativeSampler(VOCAB).logprobs(logits(1), [3], 0)
    assert none.top == []


def test_seeds_of_all_64_bits_are_taken() -> None:
    values = logits(1)
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        one = row(SamplingParams())
        one.seed = seed
        assert 0 <= sample(values, one)[0].token_id < VOCAB
