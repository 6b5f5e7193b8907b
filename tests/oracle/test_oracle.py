"""The oracles against each other, and the quantizers against their definition worked by hand."""

import pytest
import torch
from oracle import published
from oracle.distance import errors
from oracle.families import FAMILIES, Family, prompt
from oracle.model import Model, choice_scores, choose_experts, expert_weights, overreach
from oracle.quantizers import (
    FP8_MAX,
    dequantize,
    int8_rows,
    quantize_fp8,
    quantize_int8,
)

TOKENS = prompt(100)


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def test_the_fp64_model_is_transformers_model(family: Family) -> None:
    tensors = family.stored("bf16")
    theirs = published.logits(published.build(family.config, tensors, torch.float32), TOKENS)
    ours = Model(family.config, tensors).logits(TOKENS, len(TOKENS))
    assert errors(theirs, ours).max() < 1e-4


def test_its_rounding_is_as_coarse_as_transformers_in_bf16(family: Family) -> None:
    tensors = family.stored("bf16")
    truth = Model(family.config, tensors).logits(TOKENS, len(TOKENS))
    rounding = Model(family.config, tensors, rounding=True).logits(TOKENS, len(TOKENS))
    theirs = published.logits(published.build(family.config, tensors, torch.bfloat16), TOKENS)
    ours, yardstick = errors(rounding, truth).median(), errors(theirs, truth).median()
    assert 0.5 * yardstick < ours < 1.5 * yardstick


def test_absorbed_attention_differs_by_kv_b_alone(family: Family) -> None:
    """Absorbed is the same function of weights that are not applied to quantized activations."""
    fp8 = Model(family.config, family.stored("fp8"))
    torch.testing.assert_close(fp8.logits(TOKENS, 0), fp8.logits(TOKENS, len(TOKENS)))
    int8 = Model(family.config, family.stored("int8"))
    absorbed, plain, half = (int8.logits(TOKENS, n) for n in (0, len(TOKENS), 50))
    assert errors(absorbed, plain).median() > 1e-3
    torch.testing.assert_close(half[:50], plain[:50])


def test_groups_that_take_no_part_are_excluded_below_zero_too() -> None:
    config = {
        "topk_method": "noaux_tc",
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    }
    logits = torch.tensor([[0.0, 1.0, -9.0, 2.0, -3.0, -4.0]], dtype=torch.float64)
    bias = torch.full((6,), -5.0)
    ids = choose_experts(config, logits, bias)
    assert ids.tolist() == [[1, 0, 2]]  # 3 scores best of all, but its group is the weaker one
    assert expert_weights(config, logits, bias, ids).sum() == pytest.approx(2.0)
    tied = choose_experts(config, torch.zeros(1, 6, dtype=torch.float64), torch.zeros(6))
    assert tied.tolist() == [[0, 1, 2]]


def test_int8_rounds_half_to_even_and_leaves_zeros() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -3.0], [0.0] * 6])
    codes, scale = int8_rows(row)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -3], [0] * 6]
    assert scale.tolist() == [[1.0], [0.0]]


def test_fp8_blocks_do_not_overflow_and_may_be_partial() -> None:
    weight = torch.zeros(130, 200, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 128], weight[129, 199] = 3.0, -896.0, 0.25
    stored = quantize_fp8(weight)
    assert stored["weight_scale_inv"].shape == (2, 2)
    expected = torch.tensor([[3.0, 896.0], [0.0, 0.25]]) / FP8_MAX
    assert torch.equal(stored["weight_scale_inv"], expected)
    assert stored["weight"].float().abs().max() == FP8_MAX
    torch.testing.assert_close(dequantize(stored), weight.to(torch.float64))


@pytest.mark.parametrize(("quantize", "step"), [(quantize_int8, 1 / 254), (quantize_fp8, 1 / 28)])
def test_dequantized_weights_are_within_half_a_step(quantize: object, step: float) -> None:
    assert callable(quantize)
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    error = (dequantize(quantize(weight)) - weight.double()).abs().max()
    assert error <= step * weight.abs().max()


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_choice_overreaches_by_what_the_scores_lack(groups: int, kept: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    config = {
        "topk_method": "noaux_tc",
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": 3,
    }
    logits = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(12, generator=generator) if biased else None
    scores = choice_scores(logits, bias)
    assert overreach(config, scores, choose_experts(config, logits, bias), biased).max() == 0
    # What a router off by at most `noise` chooses overreaches by less than twice that; what one
    # off by much chooses overreaches by more.
    for noise in (0.001, 0.02):
        off = logits + noise * (2 * torch.rand(logits.shape, generator=generator) - 1)
        error = (choice_scores(off, bias) - scores).abs().amax(dim=-1)
        found = overreach(config, scores, choose_experts(config, off, bias), biased)
        assert (found <= 2 * error).all()
    wild = choose_experts(config, torch.randn(200, 12, generator=generator).double(), bias)
    assert (overreach(config, scores, wild, biased) > 0.02).float().mean() > 0.9


def test_other_experts_make_another_model() -> None:
    family = FAMILIES["v3"]
    model = Model(family.config, family.stored("bf16"))
    free = model.run(TOKENS, len(TOKENS))
    again = model.run(TOKENS, len(TOKENS), free.chosen)
    assert torch.equal(again.logits, free.logits)
    other = [ids.clone() for ids in free.chosen]
    other[0][50, -1] = next(e for e in range(16) if e not in other[0][50].tolist())
    pinned = model.run(TOKENS, len(TOKENS), other)
    torch.testing.assert_close(pinned.logits[:50], free.logits[:50])
    assert errors(pinned.logits, free.logits)[50] > 1e-3
