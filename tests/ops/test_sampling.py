"""The sampling ops against plain fp64 arithmetic and an independent Philox4x32-10.

In the three tiers: BF16 and VBMI make no difference to these ops.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from latentcore.ops import runtime, sampling

INF = math.inf
NAN = math.nan
LARGEST = torch.finfo(torch.float32).max
VOCABS = (1, 17, 1000, 129280)
ROWS = (1, 3, 17)
POISON = -77


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def float32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32)


# ---- calling the ops ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Params:
    """One row's parameters."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    counter: int = 0


def draw(logits: torch.Tensor, rows: Sequence[Params]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and log-probabilities of `sample`; the logits must not change."""
    before = logits.clone()
    ids = torch.full((len(rows),), POISON, dtype=torch.int32)
    logprobs = torch.full((len(rows),), 99.0)
    sampling.sample(
        logits,
        float32(*(r.temperature for r in rows)),
        int32(*(r.top_k for r in rows)),
        float32(*(r.top_p for r in rows)),
        float32(*(r.min_p for r in rows)),
        torch.tensor([r.seed for r in rows], dtype=torch.int64),
        torch.tensor([r.counter for r in rows], dtype=torch.int64),
        ids,
        logprobs,
    )
    assert torch.equal(bits(logits), bits(before))
    return ids, logprobs


def greedy(logits: torch.Tensor) -> list[int]:
    ids = torch.full((logits.shape[0],), POISON, dtype=torch.int32)
    sampling.greedy(logits, ids)
    found: list[int] = ids.tolist()
    return found


@dataclass(frozen=True)
class Logprobs:
    values: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    n, m = token_ids.shape
    found = Logprobs(
        torch.full((n, m), 99.0),
        torch.full((n, m), POISON, dtype=torch.int32),
        torch.full((n, k), POISON, dtype=torch.int32),
        torch.full((n, k), 99.0),
    )
    sampling.logprobs(logits, token_ids, found.values, found.ranks, found.top_ids, found.top_values)
    return found


# ---- what they must give -----------------------------------------------------------------------


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return tuple(c)


def uniform(seed: int, counter: int) -> float:
    """The number in [0, 1) that belongs to a seed and a counter: 53 bits of two words."""
    words = philox(
        [counter % (1 << 32), counter // (1 << 32) % (1 << 32), 0, 0],
        [seed % (1 << 32), seed // (1 << 32) % (1 << 32)],
    )
    return ((words[1] << 32 | words[0]) >> 11) * 2.0**-53


def sane(x: torch.Tensor) -> torch.Tensor:
    """Logits as fp64: NaN is -inf, +inf the largest fp32 number."""
    return x.double().nan_to_num(nan=-INF, posinf=LARGEST, neginf=-INF)


def keeps(x: torch.Tensor, p: Params, slack: float) -> torch.Tensor:
    """bool [vocab]: what min_p, top_k and top_p leave; `slack` widens what is compared in fp32."""
    x = sane(x)
    weights = ((x - x.max()) / p.temperature).exp()
    best = x == x.max()
    keep = (x > -INF) & (best | (weights >= p.min_p * (1 - slack)))
    if 0 < p.top_k < x.numel():
        keep &= x >= x.sort(descending=True).values[p.top_k - 1]
    if p.top_p < 1.0:
        values, inverse = torch.unique(x, return_inverse=True)  # rising
        mass = torch.zeros_like(values).index_add_(0, inverse, weights * keep)
        likelier = mass.flip(0).cumsum(0).flip(0) - mass
        keep &= (likelier < p.top_p * (1 + slack) * mass.sum())[inverse] | best
    return keep


def check_draw(x: torch.Tensor, p: Params, token: int, logprob: float) -> None:
    """The token is the one that its random number points at, give or take fp32's rounding."""
    lowest, highest = keeps(x, p, -1e-6), keeps(x, p, 1e-6)
    weights = ((sane(x) - sane(x).max()) / p.temperature).exp()
    assert 0 <= token < x.numel()
    assert bool(highest[token]), f"token {token} was excluded: {p}"
    totals = [float((weights * keep).sum()) for keep in (lowest, highest)]
    own = float((sane(x)[token] - sane(x).max()) / p.temperature)
    assert own - math.log(totals[1]) - 1e-5 <= logprob <= own - math.log(totals[0]) + 1e-5
    if torch.equal(lowest, highest):
        ends = (weights * highest).cumsum(0)
        point = uniform(p.seed, p.counter) * totals[1]
        begin = float(ends[token - 1]) if token else 0.0
        off = 1e-5 * totals[1]
        assert begin - off <= point <= float(ends[token]) + off, f"token {token}: {p}"


def chi_square(counts: torch.Tensor, chances: torch.Tensor) -> tuple[float, float]:
    """The statistic, and the limit that chance alone passes once in a million (Wilson-Hilferty).

    Outcomes that are expected less than 10 times are counted together.
    """
    expected = chances.double() * counts.sum()
    rare = expected < 10
    seen = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    due = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert bool((seen[due == 0] == 0).all()), "an outcome without a chance"
    seen, due = seen[due > 0], due[due > 0]
    freedom = max(1, due.numel() - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((seen - due) ** 2 / due).sum()), limit


def model_like(seed: int, n: int, vocab: int) -> torch.Tensor:
    """Logits as language models have them: some tokens stand out from many unlikely ones."""
    g = generator(seed)
    x = torch.randn(n, vocab, generator=g) * 2.5
    x[:, torch.randperm(vocab, generator=g)[:20]] += 9.0
    return x


def flat(seed: int, n: int, vocab: int) -> torch.Tensor:
    return torch.randn(n, vocab, generator=generator(seed)) * 0.5


def tied(seed: int, n: int, vocab: int) -> torch.Tensor:
    """Few different values, each held by many tokens."""
    return (torch.randn(n, vocab, generator=generator(seed)) * 4).round() / 2


SHAPES: Mapping[str, Callable[[int, int, int], torch.Tensor]] = {
    "model_like": model_like,
    "flat": flat,
    "tied": tied,
}

MIXED = (
    Params(),
    Params(temperature=0.7, top_p=0.9),
    Params(temperature=0.0, top_k=5, top_p=0.5),
    Params(top_k=50),
    Params(top_k=40, top_p=0.95),
    Params(min_p=0.05),
    Params(temperature=1.7, top_k=700, top_p=0.8, min_p=0.001),
    Params(temperature=0.25, top_p=0.999),
    Params(top_k=1),
    Params(temperature=3.0, top_p=0.3),
    Params(top_p=0.0),
    Params(min_p=1.0),
    Params(top_k=-1, top_p=0.6, min_p=0.02),
    Params(temperature=0.01, top_k=3),
    Params(temperature=100.0, top_k=100000, top_p=0.99),
    Params(temperature=1.3, top_k=2),
    Params(top_p=0.05),
)


def mixed(n: int, salt: int) -> list[Params]:
    """n rows of different parameters, seeds and counters."""
    return [
        replace(MIXED[(i + salt) % len(MIXED)], seed=7919 * i - salt, counter=(i << 33) + salt)
        for i in range(n)
    ]


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_is_argmax(main_tier: str, vocab: int, n: int) -> None:
    for name, make in SHAPES.items():
        x = make(vocab, n, vocab)
        want = [int((row == row.max()).nonzero()[0]) for row in x]
        for threads in (1, 2):
            runtime.set_threads(threads)
            assert greedy(x) == want, name
            ids, logprob = draw(x, [Params(temperature=0.0)] * n)
            assert ids.tolist() == want
            assert logprob.tolist() == [0.0] * n


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 8191, 8192, 8193, 20000])
def test_greedy_finds_every_place(main_tier: str, vocab: int) -> None:
    """At the ends of vectors and chunks too; the first of two equals wherever they stand."""
    places = sorted({p for p in (0, 1, 7, 15, 16, 8191, 8192, 16384, vocab - 1) if p < vocab})
    x = torch.full((len(places), vocab), -3.5)
    for row, place in enumerate(places):
        x[row, place] = -3.25
    assert greedy(x) == places
    for row, place in enumerate(places):
        x[row, places[-1]] = -3.25
        x[row, place] = -3.25
    assert greedy(x) == places


def test_rows_without_sense_still_give_a_token(main_tier: str) -> None:
    vocab = 20000
    x = torch.full((6, vocab), -INF)
    x[1] = NAN
    x[2, ::2] = NAN
    x[3, 12345] = -LARGEST
    x[4] = NAN
    x[4, 9000] = -80.0
    x[4, 9001] = INF
    x[5] = 1.0
    x[5, 7] = x[5, 17000] = INF
    x[5, 3] = NAN
    want = [0, 0, 0, 12345, 9001, 7]
    assert greedy(x) == want
    for p in (Params(temperature=0.0), Params(top_k=1), Params(top_p=0.1), Params(), *MIXED):
        ids, logprob = draw(x, [p] * 6)
        assert ids[:5].tolist() == want[:5]
        assert int(ids[5]) in (7, 17000)
        assert logprob[:3].tolist() == [-INF] * 3
        assert logprob[3:5].tolist() == [0.0, 0.0]
    # Two tokens of +inf share everything.
    rows = [Params(seed=i) for i in range(200)]
    ids, logprob = draw(x[5].expand(200, vocab).contiguous(), rows)
    assert {7, 17000} == set(ids.tolist())
    assert torch.allclose(logprob, torch.full_like(logprob, -math.log(2.0)))


# ---- which tokens are kept, and which one is drawn -----------------------------------------------


def test_philox_reference() -> None:
    """Known answers of Random123."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox([ones] * 4, [ones] * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox(pi, [0xA4093822, 0x299F31D0]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_what_the_reference_draws(main_tier: str, vocab: int, n: int, shape: str) -> None:
    x = SHAPES[shape](vocab + n, n, vocab)
    rounds = 1 if vocab * n > 1_000_000 else 6 if vocab > 1000 else 17
    for salt in range(rounds):
        rows = mixed(n, salt)
        ids, logprob = draw(x, rows)
        for i, p in enumerate(rows):
            if p.temperature > 0.0:
                check_draw(x[i], p, int(ids[i]), float(logprob[i]))
            else:
                assert int(ids[i]) == int((x[i] == x[i].max()).nonzero()[0])


def test_seeds_and_counters_use_all_their_bits(main_tier: str) -> None:
    """Uniform logits: the token is floor(u * vocab)."""
    vocab = 4096
    values = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5, 2**63 - 1, -1, -(2**63), -(2**32)]
    rows = [Params(seed=s, counter=c) for s in values for c in values]
    ids, _ = draw(torch.zeros(len(rows), vocab), rows)
    assert ids.tolist() == [int(uniform(r.seed, r.counter) * vocab) for r in rows]
    assert len(set(ids.tolist())) > 90


def kept_count(x: torch.Tensor, p: Params) -> int:
    """How many tokens are kept: where all weights are 1, a token's probability is 1 / count."""
    _, logprob = draw(x[None].contiguous(), [p])
    count = math.exp(-float(logprob[0]))
    assert abs(count - round(count)) < 1e-5 * count
    return round(count)


LEVEL = 1e30
"""A temperature at which logits up to a million all weigh 1 in fp32."""


@pytest.mark.parametrize("vocab", [2, 17, 1000, 8193, 129280])
def test_top_k_keeps_exactly_k(main_tier: str, vocab: int) -> None:
    spread = torch.randperm(vocab, generator=generator(vocab)).float() * 0.37 - 1e4
    steps = torch.randperm(vocab, generator=generator(vocab)).int() + bits(float32(-1.0))
    neighbours = steps.view(torch.float32)  # adjacent floats: -1 and downwards
    wide = torch.linspace(-80, 19, vocab, dtype=torch.float64).exp().float()
    lonely = torch.full((vocab,), -2.0)
    lonely[vocab // 2] = 1e5
    for k in {1, 2, 16, 17, 64, 65, vocab // 3, vocab - 1} - {0}:
        if k >= vocab:
            continue
        for x in (spread, neighbours, wide):
            assert kept_count(x, Params(temperature=LEVEL, top_k=k)) == k
        assert kept_count(lonely, Params(temperature=LEVEL, top_k=k)) == (1 if k == 1 else vocab)
    for k in (0, -1, vocab, vocab + 1, 2**31 - 1, -(2**31)):
        assert kept_count(spread, Params(temperature=LEVEL, top_k=k)) == vocab


@pytest.mark.parametrize("vocab", [2, 17, 1000, 8193, 129280])
def test_top_p_keeps_the_fewest_that_reach_p(main_tier: str, vocab: int) -> None:
    x = torch.randperm(vocab, generator=generator(vocab)).float() * 0.37 - 1e4
    for p in (0.0, 1e-9, 0.25, 0.5, 0.75, 0.96875, 1.0):  # exact in fp32, but one
        want = max(1, math.ceil(p * vocab))
        assert kept_count(x, Params(temperature=LEVEL, top_p=p)) == want
        if vocab > 4:
            both = Params(temperature=LEVEL, top_p=p, top_k=vocab // 4)
            assert kept_count(x, both) == max(1, math.ceil(p * (vocab // 4)))


def test_top_p_within_what_top_k_leaves(main_tier: str) -> None:
    """The share is one of the top k's weight, not of all."""
    x = float32(*(math.log(v) for v in (8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1)))
    # All weights: 22. Of the top three, 14: 8 and 4 make 0.857 of them, 0.545 of all.
    assert set_of(x, Params(top_p=0.84)) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
    assert set_of(x, Params(top_k=3, top_p=0.84)) == {0, 1}
    assert set_of(x, Params(top_k=3, top_p=0.88)) == {0, 1, 2}
    # min_p comes before: of 8, 4, 2 again, by another way.
    assert set_of(x, Params(min_p=0.2, top_p=0.84)) == {0, 1}
    assert set_of(x, Params(min_p=0.2, top_p=0.88)) == {0, 1, 2}


def set_of(x: torch.Tensor, p: Params, draws: int = 400) -> set[int]:
    """The tokens that turn up."""
    rows = [replace(p, seed=99, counter=i) for i in range(draws)]
    ids, _ = draw(x.expand(draws, x.numel()).contiguous(), rows)
    return set(ids.tolist())


def test_ties_are_kept_together(main_tier: str) -> None:
    x = float32(1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0)
    top, second = {1, 3}, {1, 2, 3, 4, 5}
    assert set_of(x, Params(top_k=1)) == top
    assert set_of(x, Params(top_k=2)) == top
    assert set_of(x, Params(top_k=3)) == second
    assert set_of(x, Params(top_k=5)) == second
    assert set_of(x, Params(top_k=6)) == second | {0}
    assert set_of(x, Params(top_p=0.0)) == top
    assert set_of(x, Params(top_p=0.4)) == top
    share = 2 * math.e**3 / float(x.double().exp().sum())  # of the two best
    assert set_of(x, Params(top_p=share - 1e-4)) == top
    assert set_of(x, Params(top_p=share + 1e-4)) == second
    assert set_of(x, Params(min_p=1.0)) == top
    assert set_of(x, Params(min_p=0.36)) == second  # e^-1 = 0.3679
    assert set_of(x, Params(min_p=0.37)) == top
    assert set_of(x, Params(min_p=0.36, temperature=0.5)) == top
    assert set_of(x, Params(min_p=0.13, temperature=0.5)) == second  # e^-2 = 0.1353


def test_min_p_is_relative_to_the_likeliest(main_tier: str) -> None:
    x = float32(*(math.log(v) for v in (64.0, 32.0, 16.5, 15.5, 4.0, 1.0)))
    for place, share in ((1, 0.9), (2, 0.3), (3, 0.25), (4, 0.1), (5, 0.05), (6, 0.01)):
        assert set_of(x, Params(min_p=share, temperature=1.0), 2000) == set(range(place))


def test_top_k_of_one_is_greedy(main_tier: str) -> None:
    """However close the second is, and however high the temperature."""
    x = flat(5, 8, 129280)
    for i in range(8):
        best = int(x[i].argmax())
        x[i, (best + 4999) % 129280] = torch.nextafter(x[i, best], float32(-9.0))[0]
    for temperature in (1e-30, 0.1, 1.0, 100.0, 1e30):
        rows = [Params(temperature=temperature, top_k=1, seed=i) for i in range(8)]
        ids, logprob = draw(x, rows)
        assert ids.tolist() == greedy(x)
        assert logprob.tolist() == [0.0] * 8


def test_tiny_temperature_is_greedy(main_tier: str) -> None:
    x = flat(6, 17, 1000)
    for temperature in (1e-45, 1e-38, 1e-20, 1e-9):
        ids, logprob = draw(x, [Params(temperature=temperature, seed=i) for i in range(17)])
        assert ids.tolist() == greedy(x)
        assert logprob.tolist() == [0.0] * 17


@pytest.mark.parametrize(("low", "high"), [(-LARGEST, LARGEST), (-1e-38, 1e-38), (-1e-44, 1e-44)])
def test_extreme_ranges(main_tier: str, low: float, high: float) -> None:
    """Narrowing between pivots must end, and be exact, where differences overflow or vanish."""
    x = torch.linspace(low / 2, high / 2, 4097, dtype=torch.float64).float() * 2
    x[5] = -INF
    values = x.sort(descending=True).values
    for k in (1, 3, 100, 2000):
        want = int((x >= values[k - 1]).sum())
        p = Params(temperature=3e38, top_k=k)
        ids, logprob = draw(x[None].contiguous(), [p])
        assert bool(x[ids[0]] >= values[k - 1])
        if high < 1:
            assert round(math.exp(-float(logprob[0]))) == want


@pytest.mark.parametrize(
    "p",
    [
        Params(),
        Params(temperature=0.6),
        Params(temperature=2.0, top_p=0.9),
        Params(top_k=5),
        Params(top_k=30, top_p=0.7),
        Params(min_p=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [17, 1000])
def test_frequencies(main_tier: str, vocab: int, p: Params) -> None:
    draws, rows_at_once = 20000, 500
    x = torch.randn(vocab, generator=generator(vocab)) * 1.5
    counts = torch.zeros(vocab, dtype=torch.int64)
    block = x.expand(rows_at_once, vocab).contiguous()
    for start in range(0, draws, rows_at_once):
        rows = [replace(p, seed=7, counter=start + i) for i in range(rows_at_once)]
        counts += draw(block, rows)[0].long().bincount(minlength=vocab)
    weights = (x.double() / p.temperature).exp() * keeps(x, p, 0.0)
    statistic, limit = chi_square(counts, weights / weights.sum())
    assert statistic < limit
    # The test has teeth: at another temperature the same counts could not be.
    other = (x.double() / (1.25 * p.temperature)).exp() * keeps(x, p, 0.0)
    statistic, limit = chi_square(counts, other / other.sum())
    assert statistic > limit


# ---- the same result however it is run -----------------------------------------------------------


@pytest.mark.parametrize("vocab", [17, 8193, 129280])
def test_a_rows_result_is_its_own(main_tier: str, vocab: int) -> None:
    """Whatever the threads, the other rows and the row's place."""
    n = 17
    x = torch.cat([model_like(1, 6, vocab), flat(2, 6, vocab), tied(3, 5, vocab)])
    x[4, ::3] = -INF
    x[9, 1::5] = NAN
    rows = mixed(n, 3)
    ids, logprob = draw(x, rows)
    tokens = greedy(x)
    wanted = torch.stack([ids, int32(*tokens)], dim=1).contiguous()
    listed = logprobs(x, wanted, 5 if vocab < 20 else 20)
    for threads in (1, 2, 3, 4):
        runtime.set_threads(threads)
        for order in (
            list(range(n)),
            list(range(n - 1, -1, -1)),
            [2, 11, 5],
            *([i] for i in range(n)),
        ):
            part = x[order].contiguous()
            got_ids, got_logprob = draw(part, [rows[i] for i in order])
            assert torch.equal(got_ids, ids[order])
            assert torch.equal(bits(got_logprob), bits(logprob[order]))
            assert greedy(part) == [tokens[i] for i in order]
            if threads > 2 and len(order) == 1:
                continue
            again = logprobs(part, wanted[order].contiguous(), listed.top_ids.shape[1])
            assert torch.equal(bits(again.values), bits(listed.values[order]))
            assert torch.equal(again.ranks, listed.ranks[order])
            assert torch.equal(again.top_ids, listed.top_ids[order])
            assert torch.equal(bits(again.top_values), bits(listed.top_values[order]))


# ---- restrict, add_bias, penalize ----------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 17, 31, 32, 33, 1000, 8192, 8200, 129280])
def test_restrict(main_tier: str, vocab: int) -> None:
    g = generator(vocab)
    for threads in (1, 2):
        runtime.set_threads(threads)
        x = flat(vocab, 5, vocab)
        allowed = torch.rand(4, vocab, generator=g) < 0.5
        allowed[1] = False
        allowed[1, vocab // 2] = True
        allowed[2] = torch.rand(vocab, generator=g) < 0.999
        allowed[3] = True
        width = -(-vocab // 32)
        padded = torch.zeros(4, width * 32, dtype=torch.bool)
        padded[:, :vocab] = allowed
        padded[0, vocab:] = True  # beyond the vocabulary: ignored
        powers = 2 ** torch.arange(32, dtype=torch.int64)
        words = (padded.view(4, width, 32) * powers).sum(dim=2)
        mask = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        want = x.clone()
        order = [3, 0, 4, 2]
        for i, row in enumerate(order):
            want[row, ~allowed[i]] = -INF
        guarded = torch.cat([x, torch.full((1, vocab), 5.0)])
        sampling.restrict(guarded, int32(*order), mask)
        assert torch.equal(guarded[:5], want)
        assert bool((guarded[5] == 5.0).all())


def test_restrict_is_xgrammars_layout() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    vocab = 1003
    mask = xgrammar.allocate_token_bitmask(3, vocab)
    mask.copy_(
        torch.randint(-(2**31), 2**31, mask.shape, generator=generator(0), dtype=torch.int32)
    )
    x = flat(0, 3, vocab)
    want = x.clone()
    xgrammar.apply_token_bitmask_inplace(want, mask)
    sampling.restrict(x, int32(0, 1, 2), mask)
    assert torch.equal(x, want)


@pytest.mark.parametrize("vocab", [17, 1000, 129280])
def test_add_bias(main_tier: str, vocab: int) -> None:
    g = generator(vocab)
    for threads in (1, 2):
        runtime.set_threads(threads)
        x = flat(vocab, 4, vocab)
        want = x.clone()
        sizes = [5, 0, 300, 1]
        ids = torch.randint(0, vocab, (sum(sizes),), generator=g, dtype=torch.int32)
        bias = torch.randn(sum(sizes), generator=g) * 20
        bias[::7] = -INF
        at = 0
        for row, size in enumerate(sizes):
            for _ in range(size):
                want[row, ids[at]] += bias[at]
                at += 1
        sampling.add_bias(x, int32(0, 5, 5, 305, 306), ids, bias)
        assert torch.equal(bits(x), bits(want))


def penalized(
    x: torch.Tensor, prompt: torch.Tensor, output: torch.Tensor, params: Sequence[float]
) -> torch.Tensor:
    """vLLM's definition, in fp32 over the whole vocabulary."""
    repetition, presence, frequency = (float32(v) for v in params)
    vocab = x.numel()
    counts = output.long().bincount(minlength=vocab)
    seen = (counts > 0) | (prompt.long().bincount(minlength=vocab) > 0)
    factor = torch.where(seen, repetition, float32(1.0))
    y = torch.where(x > 0, x / factor, x * factor)
    y = y - frequency * counts
    return y - presence * (counts > 0)


@pytest.mark.parametrize("vocab", [1, 17, 1000, 129280])
def test_penalize(main_tier: str, vocab: int) -> None:
    g = generator(vocab)
    settings = [
        (1.3, 0.5, 0.25, 40, 30),
        (1.0, 0.0, 0.0, 10, 10),
        (0.7, -1.5, 2.0, 0, 300),
        (1.1, 0.0, 0.0, 5000, 0),
        (1.0, 0.7, 0.0, 3, 2000),
        (1.0, 0.0, -0.3, 100, 100),
        (2.0, 1.0, 1.0, 0, 0),
    ]
    for threads in (1, 2, 4):
        runtime.set_threads(threads)
        x = flat(vocab, len(settings), vocab)
        x[:, 0] = -INF
        want, tokens, offsets, outputs = x.clone(), [], [0], []
        for row, (repetition, presence, frequency, prompts, generated) in enumerate(settings):
            prompt = torch.randint(0, vocab, (prompts,), generator=g, dtype=torch.int32)
            output = torch.randint(0, vocab, (generated,), generator=g, dtype=torch.int32)
            want[row] = penalized(x[row], prompt, output, (repetition, presence, frequency))
            tokens += [prompt, output]
            outputs.append(offsets[-1] + prompts)
            offsets.append(outputs[-1] + generated)
        sampling.penalize(
            x,
            int32(*offsets),
            int32(*outputs),
            torch.cat(tokens),
            *(float32(*(s[i] for s in settings)) for i in range(3)),
        )
        assert torch.equal(bits(x), bits(want))


def test_a_banned_token_is_never_drawn(main_tier: str) -> None:
    """Through all steps, in their order, on rows where the banned tokens are the likeliest."""
    vocab, n = 1000, 17
    x = model_like(8, n, vocab)
    best = [greedy(x)]
    for _ in range(3):
        flat_ids = [token for row in range(n) for token in (ids[row] for ids in best)]
        count = len(best)
        sampling.add_bias(
            x,
            torch.arange(0, n * count + 1, count, dtype=torch.int32),
            int32(*flat_ids),
            torch.full((n * count,), -INF),
        )
        best.append(greedy(x))
    for salt in range(20):
        rows = mixed(n, salt)
        ids, logprob = draw(x, rows)
        for row in range(n):
            assert int(ids[row]) not in [b[row] for b in best[:-1]]
        assert bool((logprob > -INF).all())


# ---- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs(main_tier: str, vocab: int, n: int) -> None:
    for name, make in SHAPES.items():
        if vocab * n > 1_000_000 and name != "tied":
            continue
        x = make(vocab + 1, n, vocab)
        want = x.double().log_softmax(dim=1)
        g = generator(n)
        ids = torch.randint(0, vocab, (n, 3), generator=g, dtype=torch.int32)
        k = min(vocab, 21)
        for threads in (1, 2):
            runtime.set_threads(threads)
            got = logprobs(x, ids, k)
            error = (got.values - want.gather(1, ids.long())).abs().max()
            assert float(error) < 2e-6 * max(1.0, float(want.abs().max())), name
            ranks = 1 + (x[:, None, :] > x.gather(1, ids.long())[:, :, None]).sum(dim=2)
            assert torch.equal(got.ranks, ranks.int())
            order = x.argsort(dim=1, descending=True, stable=True)[:, :k]
            assert torch.equal(got.top_ids, order.int())
            assert float((got.top_values - want.gather(1, order)).abs().max()) < 3e-5


def test_logprobs_of_none_and_of_many(main_tier: str) -> None:
    x = flat(1, 3, 5000)
    empty = torch.empty((3, 0), dtype=torch.int32)
    assert logprobs(x, empty, 0).values.shape == (3, 0)
    rising = (
        torch.arange(5000.0).expand(3, 5000).contiguous()
    )  # every value replaces the list's last
    got = logprobs(rising, empty, 1024)
    assert got.top_ids.tolist() == [list(range(4999, 4999 - 1024, -1))] * 3
    got = logprobs(x, torch.full((3, 1), 7, dtype=torch.int32), 0)
    assert torch.equal(got.values, logprobs(x, torch.full((3, 1), 7, dtype=torch.int32), 5).values)


def test_logprobs_of_what_cannot_be(main_tier: str) -> None:
    x = torch.full((4, 40), -INF)
    x[0, 20], x[0, 3] = 1.0, 0.0
    x[0, 10] = NAN
    x[1] = NAN
    x[2, 30] = INF
    x[2, 31] = 5.0
    x[3] = 2.0
    got = logprobs(x, int32(20, 10, 0, 20, 10, 0, 30, 31, 0, 39, 0, 7).view(4, 3), 4)
    total = math.log(math.e + 1)
    assert got.values[0].tolist() == pytest.approx([1 - total, -INF, -INF])
    assert got.ranks[0].tolist() == [1, 3, 3]
    assert got.top_ids[0].tolist() == [20, 3, 0, 1]
    assert got.top_values[0].tolist() == pytest.approx([1 - total, -total, -INF, -INF])
    assert got.values[1].tolist() == [-INF] * 3
    assert got.ranks[1].tolist() == [1] * 3
    assert got.top_ids[1].tolist() == [0, 1, 2, 3]
    assert got.top_values[1].tolist() == [-INF] * 4
    assert float(got.values[2, 0]) == 0.0
    assert got.ranks[2].tolist() == [1, 2, 3]
    assert got.top_ids[2].tolist() == [30, 31, 0, 1]
    assert got.values[3].tolist() == pytest.approx([-math.log(40)] * 3)
    assert got.ranks[3].tolist() == [1, 1, 1]
    assert got.top_ids[3].tolist() == [0, 1, 2, 3]
    assert not bool(got.values.isnan().any() or got.top_values.isnan().any())


# ---- contents ------------------------------------------------------------------------------------


def arguments(name: str, n: int, vocab: int) -> dict[str, Any]:
    """Valid arguments of an op, by the wrapper's names."""
    x = flat(1, n, vocab)
    ids = torch.arange(2 * n, dtype=torch.int32) % vocab
    offsets = torch.arange(0, 2 * n + 1, 2, dtype=torch.int32)
    ones, zeros = torch.ones(n), torch.zeros(n)
    token_ids, values = torch.full((n,), POISON, dtype=torch.int32), torch.full((n,), 99.0)
    each: dict[str, dict[str, Any]] = {
        "restrict": {
            "logits": x,
            "rows": torch.arange(n, dtype=torch.int32),
            "allowed": torch.full((n, -(-vocab // 32)), 0x55555555, dtype=torch.int32),
        },
        "add_bias": {"logits": x, "offsets": offsets, "token_ids": ids, "bias": torch.ones(2 * n)},
        "penalize": {
            "logits": x,
            "offsets": offsets,
            "output_offsets": offsets[:-1] + 1,
            "token_ids": ids,
            "repetition": ones + 0.5,
            "presence": zeros + 0.1,
            "frequency": zeros + 0.2,
        },
        "sample": {
            "logits": x,
            "temperature": ones,
            "top_k": torch.full((n,), 3, dtype=torch.int32),
            "top_p": ones - 0.25,
            "min_p": zeros,
            "seeds": torch.arange(n),
            "counters": torch.arange(n) + 5,
            "token_ids": token_ids,
            "logprobs": values,
        },
        "greedy": {"logits": x, "token_ids": token_ids},
        "logprobs": {
            "logits": x,
            "token_ids": ids.view(n, 2),
            "values": torch.full((n, 2), 99.0),
            "ranks": torch.full((n, 2), POISON, dtype=torch.int32),
            "top_ids": torch.full((n, 4), POISON, dtype=torch.int32),
            "top_values": torch.full((n, 4), 99.0),
        },
    }
    return each[name]


OPS: Mapping[str, Callable[..., None]] = {
    "restrict": sampling.restrict,
    "add_bias": sampling.add_bias,
    "penalize": sampling.penalize,
    "sample": sampling.sample,
    "greedy": sampling.greedy,
    "logprobs": sampling.logprobs,
}


@pytest.mark.parametrize("name", OPS)
def test_no_rows_is_nothing_to_do(name: str) -> None:
    given = arguments(name, 0, 40)
    if "offsets" in given:
        given["offsets"] = int32(0)
    OPS[name](**given)


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("restrict", "rows", int32(0, 2), r"expected 0\.\.1 at row 1, found 2"),
        ("restrict", "rows", int32(-1, 0), r"expected 0\.\.1 at row 0, found -1"),
        ("restrict", "allowed", torch.zeros(2, 1, dtype=torch.int32), r"int32 \[2, 2\], found"),
        ("add_bias", "token_ids", int32(0, 1, 40, 3), r"expected 0\.\.39 at row 2, found 40"),
        ("add_bias", "token_ids", int32(0, 1, 2, -3), r"expected 0\.\.39 at row 3, found -3"),
        ("add_bias", "offsets", int32(1, 2, 4), "expected 0 at row 0, found 1"),
        ("add_bias", "offsets", int32(0, 5, 4), "expected no fewer than before at row 2, found 4"),
        ("add_bias", "offsets", int32(0, -1, 4), "expected no fewer than before at row 1"),
        ("add_bias", "offsets", int32(0, 2, 3), "number of token_ids, 4, at row 2, found 3"),
        ("add_bias", "offsets", int32(0, 2, 5), "number of token_ids, 4, at row 2, found 5"),
        ("add_bias", "bias", float32(0, INF, 0, 0), "a finite number or -inf at row 1, found inf"),
        ("add_bias", "bias", float32(0, 0, 0, NAN), "a finite number or -inf at row 3, found nan"),
        ("penalize", "token_ids", int32(0, 1, 40, 3), r"expected 0\.\.39 at row 2, found 40"),
        ("penalize", "offsets", int32(0, 3, 9), "number of token_ids"),
        ("penalize", "output_offsets", int32(3, 3), r"expected 0\.\.2 at row 0, found 3"),
        ("penalize", "output_offsets", int32(0, 1), r"expected 2\.\.4 at row 1, found 1"),
        ("penalize", "repetition", float32(1, 0), "a finite number above 0 at row 1, found 0"),
        ("penalize", "repetition", float32(-1, 1), "a finite number above 0 at row 0"),
        ("penalize", "repetition", float32(INF, 1), "a finite number above 0 at row 0, found inf"),
        ("penalize", "presence", float32(0, NAN), "a finite number at row 1, found -?nan"),
        ("penalize", "frequency", float32(INF, 0), "a finite number at row 0, found inf"),
        ("sample", "temperature", float32(1, -0.1), "a finite number of at least 0 at row 1"),
        ("sample", "temperature", float32(1, INF), "a finite number of at least 0 at row 1"),
        ("sample", "temperature", float32(NAN, 1), "a finite number of at least 0 at row 0"),
        ("sample", "top_p", float32(1, 1.01), r"a number in 0\.\.1 at row 1"),
        ("sample", "top_p", float32(NAN, 1), r"a number in 0\.\.1 at row 0"),
        ("sample", "min_p", float32(-0.01, 1), r"a number in 0\.\.1 at row 0"),
        ("logprobs", "token_ids", int32(0, 1, 2, 40).view(2, 2), r"expected 0\.\.39 at row 1"),
        ("logprobs", "top_ids", torch.zeros(2, 41, dtype=torch.int32), r"expected 0\.\.40"),
    ],
)
def test_contents_are_checked(name: str, argument: str, value: torch.Tensor, message: str) -> None:
    given = {**arguments(name, 2, 40), argument: value}
    before = {key: v.clone() for key, v in given.items()}
    with pytest.raises(RuntimeError, match=f"latentcore::{name}: argument '{argument}.*{message}"):
        OPS[name](**given)
    assert all(torch.equal(v, before[key]) or v.isnan().any() for key, v in given.items())


def test_greedy_in_a_graph(main_tier: str) -> None:
    x = flat(1, 5, 20000)
    ids = torch.full((5,), POISON, dtype=torch.int32)
    with runtime.Graph.capture() as graph:
        sampling.greedy(x, ids)
    assert ids.tolist() == [POISON] * 5
    for seed, threads in ((2, 1), (3, 2), (4, 3)):
        runtime.set_threads(threads)
        x.copy_(flat(seed, 5, 20000))
        graph.replay()
        assert ids.tolist() == x.argmax(dim=1).tolist()
    graph.free()
