"""Every op against its fp64 reference, in every tier, and the same bits however it is run."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from latentcore.ops import dense, mla, runtime
from latentcore.quant.packed import Format
from tests.ops import reference, samples
from tests.ops.reference import BF16, Matrix
from tests.ops.samples import ALL, EAGER_ONLY, Case, Mla, Sample, bits


def by_id(sample: Sample) -> str:
    return sample.id


def call(case: Case, arguments: dict[str, Any], mode: str) -> dict[str, torch.Tensor]:
    """Calls the op, or captures and replays it; what it wrote, by name."""
    if mode == "eager":
        case.call(**arguments)
    else:
        with runtime.Graph.capture() as graph:
            case.call(**arguments)
        graph.replay()
        graph.free()
    written = {name: arguments[name] for name in case.expected}
    return {name: getattr(value, "data", value) for name, value in written.items()}


def run(case: Case, mode: str = "eager") -> dict[str, torch.Tensor]:
    """The same on fresh poison."""
    return call(case, case.fresh(), mode)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ."""
    return [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]


@pytest.mark.parametrize("sample", ALL, ids=by_id)
def test_matches_reference(sample: Sample, tier: str) -> None:
    case = sample.case()
    for name, got in run(case).items():
        expected = case.expected[name]
        wrong = expected.error(got)
        assert wrong is None, f"{name}: {wrong}"
        if expected.written is not None:
            rest = ~expected.written
            before = bits(case.arguments[name])[rest]
            assert torch.equal(bits(got)[rest], before), f"{name}: more was written"


# Ops whose work is cut by the number of threads, or handed from one to another.
THREADED = (
    "linear",
    "logits",
    "mlp",
    "moe",
    "moe_shared",
    "mla_decode_attention",
    "mla_prefill_attention",
)


def runs() -> list[tuple[Sample, int, str]]:
    """Each sample with two threads and in a graph; every fifth also with more threads than cores,
    and than heads; matrices with numbers of threads that cut their panels."""
    out = []
    for i, sample in enumerate(ALL):
        if sample.op == "memory_placement":  # what it counts is where the threads are
            continue
        ways = [(2, "eager")]
        if sample.op not in EAGER_ONLY:
            ways += [(1, "graph"), (2, "graph")]
        if i % 5 == 0:
            ways += [(3, "eager"), (7, "eager")]
        if sample.op in THREADED:
            ways += [
                (threads, "eager") for threads in (3, 5, 7, 16) if (threads, "eager") not in ways
            ]
        out += [(sample, threads, mode) for threads, mode in ways]
    return out


@pytest.mark.parametrize(
    ("sample", "threads", "mode"), runs(), ids=lambda v: getattr(v, "id", str(v))
)
def test_same_bits_however_run(sample: Sample, main_tier: str, threads: int, mode: str) -> None:
    case = sample.case()
    plain = run(case)
    runtime.set_threads(threads)
    assert differing(plain, run(case, mode)) == []


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("fmt", samples.LINEAR, ids=lambda f: f.name)
def test_panels_cut_between_threads_have_the_same_bits(tier: str, fmt: Format, n: int) -> None:
    """28 panels by 16 threads, 7 by 16, 28 by 5 and 3: panels of two threads, of several, and whole
    ones; K ends within a piece."""
    g = torch.Generator().manual_seed(n)
    x = samples.activations(g, n, 1000)
    for rows in (440, 100):
        w = samples.one(samples.matrix(g, fmt, rows, 1000))
        outs = []
        for threads in (1, 16, 5, 3):
            runtime.set_threads(threads)
            outs.append(samples.poison((n, rows), torch.float32))
            dense.logits(x, w, outs[-1])
        for out in outs[1:]:
            assert torch.equal(bits(out), bits(outs[0]))


ROW_OPS = frozenset(
    (
        *("embedding", "rms_norm", "add_rms_norm", "linear", "logits", "heads", "mlp"),
        *("moe", "moe_shared", "route_softmax", "route_sigmoid"),
        *("mla_input_lora", "mla_input_direct", "mla_decode_attention"),
        *("sample", "greedy", "logprobs"),
    )
)
"""Ops whose rows do not know of each other."""
BATCHED = [s for s in ALL if s.op in ROW_OPS and "n0" not in s.shape and "n1-" not in s.shape]


def some_rows(n: int) -> Sequence[int]:
    """All rows of a small batch; of a large one the first, the last and every 23rd."""
    return range(n) if n <= 20 else sorted({0, 1, n - 1, *range(5, n, 23)})


@pytest.mark.parametrize("sample", BATCHED, ids=by_id)
def test_row_of_a_batch_is_the_row_alone(sample: Sample, tier: str) -> None:
    case = sample.case()
    whole = run(case)
    for i in some_rows(case.arguments[case.rows[0]].shape[0]):
        arguments = case.fresh()
        for name in case.rows:
            arguments[name] = arguments[name][i : i + 1].clone()
        if "absorbed" in arguments:
            arguments["absorbed"] = int(i < arguments["absorbed"])
        alone = call(case, arguments, "eager")
        for name, got in alone.items():
            if name in case.rows:
                assert torch.equal(bits(got)[0], bits(whole[name])[i]), f"{name}, row {i}"
            else:  # the cache: the places that this row writes
                touched = bits(got) != bits(case.arguments[name])
                assert bool(touched.any())
                assert torch.equal(bits(got)[touched], bits(whole[name])[touched]), (
                    f"{name}, row {i}"
                )


# ---- prefill, cut into chunks ------------------------------------------------------------------


def cuts(total: int, seed: int) -> list[int]:
    """Chunk lengths that add up to total."""
    dice, left, out = random.Random(seed), total, []
    while left:
        out.append(min(left, dice.choice((1, 2, 15, 16, 17, 63, 64, 65, 100, 128))))
        left -= out[-1]
    return out


@pytest.mark.parametrize("fmt", samples.LINEAR, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("dims", "start", "count"), [(samples.SMALL, 0, 290), (samples.MIDDLE, 130, 150)]
)
def test_prefill_in_chunks_is_prefill_in_one_go(
    tier: str, fmt: Format, dims: Mla, start: int, count: int
) -> None:
    g = torch.Generator().manual_seed(count)
    pages = samples.paged(g, (7, start + count), 64, dims.latent, dims.rope, filled=True)
    m = samples.matrix(g, fmt, dims.heads * (dims.nope + dims.v), dims.latent)
    kv_b = samples.one(m)
    q = reference.bf16(samples.normal(g, count, dims.heads, dims.nope + dims.rope))
    scale = 1.5 * (dims.nope + dims.rope) ** -0.5

    def prefill(segments: list[tuple[int, int, int, int]], out: torch.Tensor) -> None:
        mla.mla_prefill_attention(
            q,
            kv_b,
            torch.tensor(segments, dtype=torch.int32),
            pages.tables,
            pages.cache,
            dims.latent,
            dims.rope,
            dims.v,
            scale,
            out,
        )

    whole = samples.poison((count, dims.heads * dims.v), BF16)
    prefill([(0, count, 1, start)], whole)
    value = samples.prefill_reference(q, pages.rows(1, start + count), m, dims, scale, start)
    expected = samples.Rows(value.reshape(count, -1), samples.ATTENTION, samples.ATTENTION_WORST)
    assert expected.error(whole) is None
    for seed in range(4):
        segments, row = [], 0
        for length in cuts(count, seed):
            segments.append((row, length, 1, start + row))
            row += length
        one_op, many_ops = torch.full_like(whole, 7.0), torch.full_like(whole, 7.0)
        prefill(segments, one_op)
        for segment in segments:
            prefill([segment], many_ops)
        assert torch.equal(bits(one_op), bits(whole))
        assert torch.equal(bits(many_ops), bits(whole))


# ---- a graph whose inputs change ---------------------------------------------------------------


def test_graph_follows_its_input_buffers(tier: str) -> None:
    """A captured decode step replays with other positions, sequences and blocks."""
    g = torch.Generator().manual_seed(5)
    dims, contexts = samples.SMALL, (700, 65, 130)
    pages = samples.paged(g, contexts, 64, dims.latent, dims.rope, filled=True)
    w_vc = reference.pack([[samples.matrix(g, Format.BF16, dims.v, dims.latent)] for _ in range(3)])
    q = torch.zeros(3, dims.heads, pages.cache.shape[2], dtype=BF16)
    q[..., : dims.latent] = reference.bf16(samples.normal(g, 3, dims.heads, dims.latent))
    buffers = {
        "token_ids_to": torch.zeros(3, dtype=torch.int32),
        "positions_to": torch.zeros(3, dtype=torch.int32),
        "row_seq_to": torch.zeros(3, dtype=torch.int32),
        "block_tables_to": torch.zeros(3, 20, dtype=torch.int32),
    }
    out = samples.poison((3, dims.heads * dims.v), BF16)
    places = (
        buffers["positions_to"],
        buffers["row_seq_to"],
        buffers["block_tables_to"],
        pages.cache,
    )
    with runtime.Graph.capture() as graph:
        mla.mla_decode_attention(q, w_vc, *places, 0.3, out)
    assert graph.size == 1
    assert bool(out.isnan().all())
    for rows in (
        [(0, 699), (1, 64), (2, 129)],
        [(2, 0), (2, 63), (0, 512)],
        [(1, 1), (0, 511), (0, 3)],
    ):
        mla.load_step(
            torch.zeros(3, dtype=torch.int32),
            torch.tensor([p for _, p in rows], dtype=torch.int32),
            torch.tensor([s for s, _ in rows], dtype=torch.int32),
            pages.tables,
            vocab_size=10,
            num_blocks=pages.cache.shape[0],
            block_size=64,
            max_position=1000,
            **buffers,
        )
        graph.replay()
        eager = samples.poison(out.shape, BF16)
        mla.mla_decode_attention(q, w_vc, *places, 0.3, eager)
        assert not bool(out.isnan().any())
        assert torch.equal(bits(out), bits(eager))
    graph.free()


def test_graph_of_several_ops_replays_in_order(tier: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, first = samples.activations(g, 5, 70), torch.zeros(5, 33, dtype=BF16)
    second = torch.zeros(5, 70, dtype=BF16)
    w = [samples.one(samples.matrix(g, Format.INT8, *shape)) for shape in ((33, 70), (70, 33))]
    with runtime.Graph.capture() as graph:
        dense.linear(x, w[0], first)
        dense.linear(first, w[1], second)
    assert graph.size == 2
    assert not bool(second.any())
    for threads in (1, 2):
        runtime.set_threads(threads)
        x.copy_(samples.activations(g, 5, 70))
        graph.replay()
        by_hand = [torch.zeros_like(first), torch.zeros_like(second)]
        dense.linear(x, w[0], by_hand[0])
        dense.linear(by_hand[0], w[1], by_hand[1])
        assert torch.equal(bits(second), bits(by_hand[1]))
    graph.free()


@pytest.mark.parametrize(("op", "argument"), EAGER_ONLY.items())
def test_capture_is_refused_by_name(op: str, argument: str) -> None:
    case = samples.SAMPLES[op][0].case()
    arguments = case.fresh()
    message = f"latentcore::{op}: argument '{argument}': expected eager execution.*found a capture"
    with pytest.raises(RuntimeError, match=message), runtime.Graph.capture():
        case.call(**arguments)
    case.call(**arguments)  # and the capture is over


def test_silu_from_end_to_end(tier: str) -> None:
    """silu(x) * x through identity weights, far beyond the ends of the exponential."""
    g = torch.Generator().manual_seed(random.randrange(1 << 30))
    spread = torch.logspace(-3, 3, 64, dtype=torch.float64)
    x = (spread * (torch.rand(40, 64, generator=g, dtype=torch.float64) - 0.5)).to(BF16)
    one = Matrix(Format.BF16, torch.eye(64).to(BF16))
    gate_up, out = reference.pack([[one, one]]), samples.poison((40, 64), BF16)
    dense.mlp(x, gate_up, samples.one(one), out)
    exact = x.double() * torch.sigmoid(x.double()) * x.double()
    assert bool(((out.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-28).all())


# ---- every code of the byte formats ------------------------------------------------------------


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    """[256, 64]: row r holds code (r + 37 k) % 256 at column k, so every code stands everywhere."""
    code = (torch.arange(256)[:, None] + 37 * torch.arange(64)[None, :]) % 256
    return code.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("n", [1, 3, 64])
def test_all_fp8_codes(tier: str, n: int) -> None:
    codes = all_codes(torch.float8_e4m3fn)
    nan = codes.to(torch.float32).isnan()
    raw = codes.view(torch.uint8).clone()
    raw[nan] = 0
    grid = torch.tensor([[0.5], [3.0]])
    m = Matrix(Format.FP8, raw.view(torch.float8_e4m3fn), grid)
    x = torch.eye(64).to(BF16)
    out = samples.poison((64, 256), torch.float32)
    for i in range(0, 64, n):
        dense.logits(x[i : i + n].clone(), samples.one(m), out[i : i + n])
    assert torch.equal(out.t().double(), m.exact())
    assert (
        len(set(m.exact()[:128].flatten().tolist())) == 253
    )  # 256 less two NaNs and one of two zeros

    whole = Matrix(Format.FP8, codes, grid)
    dense.logits(x[:n].clone(), samples.one(whole), out[:n])
    assert torch.equal(out[:n].isnan(), nan.any(dim=1)[None, :].expand(n, 256))


@pytest.mark.parametrize("n", [1, 3, 64])
def test_all_int8_codes(tier: str, n: int) -> None:
    """Widened to bf16 (heads) and as integers (logits): exact."""
    codes = all_codes(torch.int8)
    x = torch.eye(64).to(BF16)
    wide = Matrix(Format.INT8_WIDE, codes, torch.ones(256), torch.ones(64))
    w, out = samples.one(wide), samples.poison((64, 256), BF16)
    for i in range(0, 64, n):
        dense.heads(x[i : i + n, None].clone(), w, out[i : i + n, None])
    assert torch.equal(out.t().double(), codes.double())
    w, sums = (
        samples.one(Matrix(Format.INT8, codes, torch.ones(256))),
        samples.poison((64, 256), torch.float32),
    )
    for i in range(0, 64, n):
        dense.logits((x[i : i + n] * 127).clone(), w, sums[i : i + n])
    assert torch.equal(sums.t().double(), codes.double() * 127)
