"""Sample inputs of every op: one table, op x scheme x shape, each with its results in fp64.

A `Case` is one call: the wrapper's arguments by name, those that it writes filled with poison, and
what must stand in them afterwards. `SAMPLES` maps an op's name to its samples; an op that has none
fails the contract test.
"""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from oracle import quantizers

from latentcore.ops import dense, mla, moe, packing, sampling, storage
from latentcore.quant.packed import Format, PackedWeight, huge_buffer, packed_nbytes
from tests.ops import reference
from tests.ops.reference import BF16, F64, Matrix, bf16

EPS = 2.0**-24  # half a unit in the last place of fp32, relative
HALF_BF16 = 2.0**-8  # the same of bf16


# ---- what an op must have written ------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """These bits, where `written` holds; elsewhere the argument keeps its own."""

    value: torch.Tensor
    written: torch.Tensor | None = None

    def error(self, got: torch.Tensor) -> str | None:
        here = slice(None) if self.written is None else self.written
        same = bits(got)[here] == bits(self.value.to(got.dtype))[here]
        return None if bool(same.all()) else f"{int((~same).sum())} of {same.numel()} bits differ"


@dataclass(frozen=True)
class Within:
    """Values (fp64) within `bound` of these, element by element."""

    value: torch.Tensor
    bound: torch.Tensor
    written: torch.Tensor | None = None

    def error(self, got: torch.Tensor) -> str | None:
        far = (got.to(F64) - self.value).abs() / self.bound
        worst = float(far.nan_to_num(nan=float("inf")).max()) if far.numel() else 0.0
        return None if worst <= 1.0 else f"an error of {worst:.3f} times its bound"


@dataclass(frozen=True)
class Rows:
    """Rows (the last dimension) whose relative error |got - value| / |value| has a bounded median
    and maximum.

    Where a rounding between two steps tips over, a row may be off by more than its last rounding;
    few are, so the median is held to that rounding, and the maximum to a tipped one.
    """

    value: torch.Tensor
    median: float
    worst: float
    written: torch.Tensor | None = None

    def error(self, got: torch.Tensor) -> str | None:
        here = slice(None) if self.written is None else self.written
        want, have = self.value[here], got.to(F64)[here]
        if want.numel() == 0:
            return None
        off = (have - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
        off = off.nan_to_num(nan=float("inf")).flatten()
        median, worst = float(off.median()), float(off.max())
        if median <= self.median and worst <= self.worst:
            return None
        return (
            f"relative errors of rows: median {median:.2e} (at most {self.median:.2e}), "
            f"worst {worst:.2e} (at most {self.worst:.2e})"
        )


Expected: TypeAlias = "Exact | Within | Rows | Pages"


def bits(t: torch.Tensor) -> torch.Tensor:
    """The same tensor as integers, so that NaNs compare."""
    size = t.element_size()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


@dataclass
class Case:
    """One call of an op.

    arguments   by the wrapper's names, in its order; written ones hold poison
    expected    what the written ones must hold afterwards, by name
    rows        arguments whose first dimension is the rows of the batch: each row's results are
                those of the row computed alone
    """

    call: Callable[..., None]
    arguments: dict[str, Any]
    expected: dict[str, Expected]
    rows: tuple[str, ...] = ()

    def fresh(self) -> dict[str, Any]:
        """The arguments with copies of the written ones."""
        return {
            name: copied(value) if name in self.expected else value
            for name, value in self.arguments.items()
        }


def copied(value: Any) -> Any:
    """A copy of a tensor or packed weight."""
    if isinstance(value, PackedWeight):
        data = huge_buffer(value.nbytes)
        data.copy_(value.data)
        return PackedWeight(data, value.format, value.batch, value.parts, value.rows, value.cols)
    return value.clone()


@dataclass(frozen=True)
class Sample:
    """A case that is made when it is asked for, from a seed of its own name."""

    op: str
    scheme: str
    shape: str
    make: Callable[[torch.Generator], Case] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.scheme}-{self.shape}"

    def case(self) -> Case:
        """The case; the same object each time."""
        return _case(self)


@cache
def _case(sample: Sample) -> Case:
    g = torch.Generator().manual_seed(zlib.crc32(sample.id.encode()))
    return sample.make(g)


# ---- random values ---------------------------------------------------------------------------


def poison(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """NaN for floats, a large number for integers."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)
    number = 0x5A if dtype == torch.int8 else 0x5A5A5A5A
    return torch.full(tuple(shape), number, dtype=dtype)


def normal(g: torch.Generator, *shape: int, gain: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float32) * gain


def activations(g: torch.Generator, n: int, k: int) -> torch.Tensor:
    """bf16 [n, k]: rows of very different size, with an outlier here and there; row 2 is zero."""
    x = normal(g, n, k) * torch.exp2(torch.randint(-6, 7, (n, 1), generator=g).float())
    x[:, :: max(2, k // 3)] *= 8.0
    if n > 2:
        x[2] = 0.0
    return bf16(x)


def matrix(g: torch.Generator, fmt: Format, rows: int, cols: int) -> Matrix:
    """A random matrix with scales that differ by row, column or block; keeps the size of x."""
    gain = cols**-0.5
    if fmt == Format.F32:
        return Matrix(fmt, normal(g, rows, cols, gain=gain))
    if fmt == Format.BF16:
        return Matrix(fmt, bf16(normal(g, rows, cols, gain=gain)))
    if fmt == Format.FP8:
        codes = fp8_codes(g, rows, cols)
        spread = float(codes.to(torch.float32).square().mean().sqrt())
        grid = torch.exp2(normal(g, -(-rows // 128), -(-cols // 128))) * gain / spread
        return Matrix(fmt, codes, grid)
    codes = torch.randint(-128, 128, (rows, cols), generator=g, dtype=torch.int8)
    scale = torch.exp2(normal(g, rows)) * gain / 74.0
    if fmt == Format.INT8:
        return Matrix(fmt, codes, scale)
    return Matrix(fmt, codes, scale, torch.exp2(normal(g, cols)))


def fp8_codes(g: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """e4m3fn codes: of every size, subnormals too, without NaN."""
    raw = torch.randint(0, 256, (rows, cols), generator=g, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0x3C
    return raw.view(torch.float8_e4m3fn)


def one(m: Matrix) -> PackedWeight:
    return reference.pack([[m]])


# ---- dense -----------------------------------------------------------------------------------

LINEAR = (Format.BF16, Format.INT8, Format.FP8)


def _embedding(vocab: int, hidden: int, n: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        table = bf16(normal(g, vocab, hidden))
        ids = torch.randint(0, vocab, (n,), generator=g, dtype=torch.int32)
        arguments = {"table": table, "token_ids": ids, "out": poison((n, hidden), BF16)}
        expected: dict[str, Expected] = {"out": Exact(table[ids.long()])}
        return Case(dense.embedding, arguments, expected, ("token_ids", "out"))

    return make


def _rms_norm(n: int, hidden: int, eps: float) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        x, weight = activations(g, n, hidden), normal(g, hidden)
        arguments = {"x": x, "weight": weight, "eps": eps, "out": poison((n, hidden), BF16)}
        out = _norm_within(x.to(F64), weight, eps)
        return Case(dense.rms_norm, arguments, {"out": out}, ("x", "out"))

    return make


def _norm_within(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Within:
    # The mean of squares sums positive terms: its error is at most hidden units in the last place,
    # and the root halves it.
    value = reference.rms_norm(x, weight, eps)
    return Within(value, value.abs() * (HALF_BF16 * 1.01 + x.shape[1] * EPS) + 1e-38)


def _add_rms_norm(n: int, hidden: int, eps: float) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        residual, delta = activations(g, n, hidden), activations(g, n, hidden)
        weight = normal(g, hidden)
        total = bf16(residual.float() + delta.float())
        arguments = {
            "residual": residual,
            "delta": delta,
            "weight": weight,
            "eps": eps,
            "out": poison((n, hidden), BF16),
        }
        expected: dict[str, Expected] = {
            "residual": Exact(total),
            "out": _norm_within(total.to(F64), weight, eps),
        }
        return Case(dense.add_rms_norm, arguments, expected, ("residual", "delta", "out"))

    return make


def _product_expected(x: torch.Tensor, m: Matrix, out: torch.dtype) -> Expected:
    value = m.product(x)
    if m.format == Format.INT8:
        return Exact(value.to(torch.float32).to(out))
    # A sum of K products in fp32, in whatever order, is off by at most K units of |x| |w|; an FP8
    # block's scale adds two roundings a block.
    steps = m.cols + 2 * (m.cols // 128 + 1)
    sums = m.magnitude(x) * steps * EPS
    last = HALF_BF16 * 1.01 if out == BF16 else EPS
    return Within(value, sums + (value.abs() + sums) * last + 1e-38)


def _linear(
    call: Callable[..., None], out: torch.dtype, fmt: Format, n: int, rows: int, cols: int
) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        x, m = activations(g, n, cols), matrix(g, fmt, rows, cols)
        arguments = {"x": x, "w": one(m), "out": poison((n, rows), out)}
        return Case(call, arguments, {"out": _product_expected(x, m, out)}, ("x", "out"))

    return make


def _int8_extremes(n: int, rows: int, cols: int) -> Callable[[torch.Generator], Case]:
    """Codes of -128 and activations of +-127 alone: products as large as they get, of one sign."""

    def make(g: torch.Generator) -> Case:
        x = torch.full((n, cols), 127.0)
        x[1::2] = -127.0
        codes = torch.full((rows, cols), -128, dtype=torch.int8)
        codes[1::3] = 127
        m = Matrix(Format.INT8, codes, torch.ones(rows))
        x = x.to(BF16)
        arguments = {"x": x, "w": one(m), "out": poison((n, rows), torch.float32)}
        expected = _product_expected(x, m, torch.float32)
        sums = x.to(F64) @ codes.to(F64).t()
        assert isinstance(expected, Exact)
        assert torch.equal(expected.value.to(F64), sums)
        return Case(dense.logits, arguments, {"out": expected}, ("x", "out"))

    return make


def _heads(
    fmt: Format, n: int, heads: int, rows: int, cols: int
) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        x = activations(g, n * heads, cols).view(n, heads, cols)
        stack = [matrix(g, fmt, rows, cols) for _ in range(heads)]
        arguments = {
            "x": x,
            "w": reference.pack([[m] for m in stack]),
            "out": poison((n, heads, rows), BF16),
        }
        value = torch.stack([m.head_product(x[:, h]) for h, m in enumerate(stack)], dim=1)
        sums = torch.stack(
            [x[:, h].to(F64).abs() @ m.exact().abs().t() for h, m in enumerate(stack)], 1
        )
        bound = sums * (cols + 2) * EPS + value.abs() * HALF_BF16 * 1.01 + 1e-38
        if fmt == Format.INT8_WIDE:
            # x times its column's scale is rounded to fp32 before it is rounded to bf16: where the
            # first tips over, the second may too.
            bound = bound + _tipped(x, stack)
        return Case(dense.heads, arguments, {"out": Within(value, bound)}, ("x", "out"))

    return make


def _tipped(x: torch.Tensor, stack: Sequence[Matrix]) -> torch.Tensor:
    """What the values of x * column_scale that lie within fp32's error of a bf16 tie can change."""
    out = []
    for h, m in enumerate(stack):
        assert m.column_scale is not None
        assert m.scale is not None
        scaled = x[:, h].to(F64) * m.column_scale.to(F64)
        low, high = bf16(scaled * (1 - 2 * EPS)), bf16(scaled * (1 + 2 * EPS))
        step = (high.to(F64) - low.to(F64)).abs()
        out.append((step @ m.codes.to(F64).abs().t()) * m.scale.to(F64))
    return torch.stack(out, dim=1)


# A row's relative error by its last rounding to bf16: at most 2^-8, half of that when its values
# spread over their binades; some room for the few values before that tipped over.
LAST_ROUNDING = 0.8 * HALF_BF16
# The largest value of a row sets its int8 scale. Where that value tips over in bf16, every code of
# the row is rounded anew: an error of about 0.3 steps, a step being max / 127.
REQUANTIZED = 0.025


def _rows(
    value: torch.Tensor, formats: Sequence[Format], written: torch.Tensor | None = None
) -> Rows:
    worst = REQUANTIZED if Format.INT8 in formats else 1.2 * HALF_BF16
    return Rows(value, LAST_ROUNDING, worst, written)


def _mlp(
    gate_up: Format, down: Format, n: int, hidden: int, inter: int
) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        x = activations(g, n, hidden)
        gate, up, last = _expert(g, gate_up, down, hidden, inter)
        arguments = {
            "x": x,
            "gate_up": reference.pack([[gate, up]]),
            "down": one(last),
            "out": poison((n, hidden), BF16),
        }
        value = reference.mlp(x, gate, up, last)
        return Case(dense.mlp, arguments, {"out": _rows(value, (gate_up, down))}, ("x", "out"))

    return make


def _expert(
    g: torch.Generator, gate_up: Format, down: Format, hidden: int, inter: int
) -> tuple[Matrix, Matrix, Matrix]:
    return (
        matrix(g, gate_up, inter, hidden),
        matrix(g, gate_up, inter, hidden),
        matrix(g, down, hidden, inter),
    )


# ---- experts ---------------------------------------------------------------------------------


def _moe(
    gate_up: Format,
    down: Format,
    n: int,
    hidden: int,
    inter: int,
    experts: int,
    top_k: int,
    used: Sequence[int],
    shared: tuple[Format, Format, int] | None = None,
) -> Callable[[torch.Generator], Case]:
    """Tokens choose among the experts in `used`; the others stay empty."""

    def make(g: torch.Generator) -> Case:
        x = activations(g, n, hidden)
        stack = [_expert(g, gate_up, down, hidden, inter) for _ in range(experts)]
        pick = [torch.randperm(len(used), generator=g)[:top_k] for _ in range(n)]
        choices = torch.tensor(used, dtype=torch.int32)
        ids = (
            torch.stack([choices[p] for p in pick])
            if n
            else torch.empty(0, top_k, dtype=torch.int32)
        )
        weights = torch.rand(n, top_k, generator=g) + 0.1
        value = torch.zeros(n, hidden, dtype=F64)
        outs = [reference.mlp(x, *expert) for expert in stack]
        for i in range(n):
            for j in range(top_k):
                value[i] += weights[i, j].double() * outs[int(ids[i, j])][i]
        arguments: dict[str, Any] = {
            "x": x,
            "ids": ids,
            "weights": weights,
            "gate_up": reference.pack([[gate, up] for gate, up, _ in stack]),
            "down": reference.pack([[last] for _, _, last in stack]),
        }
        formats = [gate_up, down]
        call: Callable[..., None] = moe.moe
        if shared is not None:
            call = moe.moe_shared
            formats += shared[:2]
            gate, up, last = _expert(g, shared[0], shared[1], hidden, shared[2])
            value += reference.mlp(x, gate, up, last)
            arguments["shared_gate_up"] = reference.pack([[gate, up]])
            arguments["shared_down"] = one(last)
        arguments["out"] = poison((n, hidden), BF16)
        rows = ("x", "ids", "weights", "out")
        return Case(call, arguments, {"out": _rows(value, formats)}, rows)

    return make


def _route(
    scoring: str,
    fmt: Format,
    n: int,
    hidden: int,
    experts: int,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool = True,
    factor: float = 1.0,
    bias_at: float = 0.0,
    twins: bool = False,
) -> Callable[[torch.Generator], Case]:
    """`bias_at` -3 makes every biased score negative; `twins` gives every second expert the weights
    (and bias) of the one before it, so that all choices are ties."""

    def make(g: torch.Generator) -> Case:
        x = bf16(normal(g, n, hidden))
        m = matrix(g, fmt, experts, hidden)
        bias = normal(g, experts, gain=0.1) + bias_at
        if twins:
            m.codes[1::2] = m.codes[: experts - 1 : 2]
            bias[1::2] = bias[: experts - 1 : 2]
        # Twins must tie in the reference too, whatever order its sums have.
        logits = ((x.to(F64) @ m.exact().t()) * 2.0**40).round() * 2.0**-40
        sigmoid = scoring == "sigmoid"
        args = (n_group, topk_group, top_k, normalize, factor)
        ids, weights = reference.route(logits, bias if sigmoid else None, *args)
        arguments: dict[str, Any] = {"x": x, "w": one(m)}
        if sigmoid:
            arguments["bias"] = bias
        arguments |= {
            "n_group": n_group,
            "topk_group": topk_group,
            "top_k": top_k,
            "normalize": normalize,
            "factor": factor,
            "ids": poison((n, top_k), torch.int32),
            "weights": poison((n, top_k), torch.float32),
        }
        # A logit of K products is off by at most K units of |x| |w|, here a few 1e-5; a score's
        # relative error is at most that of e^logit.
        slack = float((x.to(F64).abs() @ m.exact().abs().t()).max()) * hidden * EPS if n else 0.0
        expected: dict[str, Expected] = {
            "ids": Exact(ids.to(torch.int32)),
            "weights": Within(weights, weights.abs() * (3 * slack + 2e-6)),
        }
        call = moe.route_sigmoid if sigmoid else moe.route_softmax
        return Case(call, arguments, expected, ("x", "ids", "weights"))

    return make


# ---- attention -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paged:
    """Sequences over a shuffled block table. Rows that no context covers hold NaN."""

    cache: torch.Tensor  # bf16 [blocks, block_size, dim]
    tables: torch.Tensor  # int32 [sequences, width]; entries past a context are -1

    def rows(self, seq: int, context: int) -> torch.Tensor:
        """bf16 [context, dim]: a sequence's rows in order."""
        flat = self.cache.view(-1, self.cache.shape[2])
        return flat[self.places(seq, torch.arange(context))]

    def places(self, seq: int, positions: torch.Tensor) -> torch.Tensor:
        size = self.cache.shape[1]
        return self.tables[seq].long()[positions // size] * size + positions % size


def paged(
    g: torch.Generator,
    contexts: Sequence[int],
    block_size: int,
    latent: int,
    rope: int,
    filled: bool,
) -> Paged:
    dim = -(-(latent + rope) // 32) * 32
    counts = [-(-c // block_size) for c in contexts]
    spare = 3
    order = torch.randperm(sum(counts) + spare, generator=g).to(torch.int32)
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    at = 0
    for i, count in enumerate(counts):
        tables[i, :count] = order[at : at + count]
        at += count
    cache = poison((sum(counts) + spare, block_size, dim), BF16)
    out = Paged(cache, tables)
    if filled:
        flat = cache.view(-1, dim)
        for seq, context in enumerate(contexts):
            rows = bf16(normal(g, context, dim))
            rows[:, latent + rope :] = 0.0
            flat[out.places(seq, torch.arange(context))] = rows
    return out


def _angles(g: torch.Generator, positions: int, rope: int) -> torch.Tensor:
    angle = torch.rand(positions, rope // 2, generator=g) * 6.28
    return torch.cat((angle.cos(), angle.sin()), dim=1).contiguous()


@dataclass(frozen=True)
class Mla:
    """Dimensions of an attention layer."""

    hidden: int
    heads: int
    q_lora: int
    nope: int
    rope: int
    v: int
    latent: int


SMALL = Mla(hidden=70, heads=3, q_lora=40, nope=24, rope=8, v=20, latent=44)
MIDDLE = Mla(hidden=130, heads=16, q_lora=72, nope=33, rope=16, v=32, latent=96)
WIDE = Mla(hidden=257, heads=5, q_lora=136, nope=128, rope=64, v=128, latent=160)


def _mla_input(
    lora: bool,
    dims: Mla,
    q_first: Format,
    q_second: Format,
    kv: Format,
    head: Format,
    positions: Sequence[tuple[int, int]],
    absorbed: int,
    block_size: int = 64,
) -> Callable[[torch.Generator], Case]:
    """positions: (sequence, position) of each row. Without lora q_second is unused."""

    def make(g: torch.Generator) -> Case:
        n, d = len(positions), dims
        sequences = 1 + max((s for s, _ in positions), default=0)
        contexts = [
            1 + max((p for s, p in positions if s == i), default=0) for i in range(sequences)
        ]
        pages = paged(g, contexts, block_size, d.latent, d.rope, filled=False)
        q_dim = d.heads * (d.nope + d.rope)
        x = activations(g, n, d.hidden)
        if n > 2:
            x[2] = 1.0  # a row of zeros has a norm of zeros: nothing would be seen
        q_norm, kv_norm = normal(g, d.q_lora), normal(g, d.latent)
        q_a = matrix(g, q_first, d.q_lora if lora else q_dim, d.hidden)
        q_b = matrix(g, q_second, q_dim, d.q_lora)
        kv_a = matrix(g, kv, d.latent + d.rope, d.hidden)
        w_kc = [matrix(g, head, d.latent, d.nope) for _ in range(d.heads)]
        eps = 1e-6
        table = _angles(g, max(contexts), d.rope)
        pos = torch.tensor([p for _, p in positions], dtype=torch.int32)
        seq = torch.tensor([s for s, _ in positions], dtype=torch.int32)
        dim = pages.cache.shape[2]

        arguments: dict[str, Any] = {"x": x}
        if lora:
            arguments |= {"q_a": one(q_a), "q_a_norm": q_norm, "q_b": one(q_b)}
        else:
            arguments["q_proj"] = one(q_a)
        arguments |= {
            "kv_a": one(kv_a),
            "kv_a_norm": kv_norm,
            "w_kc": reference.pack([[m] for m in w_kc]),
            "eps": eps,
            "rope_table": table,
            "positions": pos,
            "row_seq": seq,
            "block_tables": pages.tables,
            "cache": pages.cache,
            "absorbed": absorbed,
            "q": poison((n, d.heads, d.nope + d.rope), BF16),
            "q_latent": poison((n, d.heads, dim), BF16),
        }

        first = q_a.product(x)
        q = q_b.product(bf16(reference.rms_norm(first, q_norm, eps))) if lora else first
        q = q.view(n, d.heads, d.nope + d.rope)
        angles = table[pos.long()]
        turned = reference.rope(q[..., d.nope :], angles[:, None])
        q_latent = torch.zeros(n, d.heads, dim, dtype=F64)
        for h, m in enumerate(w_kc):
            q_latent[:, h, : d.latent] = m.head_product(q[:, h, : d.nope])
        q_latent[..., d.latent : d.latent + d.rope] = turned

        latent = kv_a.product(x)
        cache = torch.full(pages.cache.shape, float("nan"), dtype=F64)
        rows = torch.zeros(n, dim, dtype=F64)
        rows[:, : d.latent] = reference.rms_norm(latent[:, : d.latent], kv_norm, eps)
        rows[:, d.latent : d.latent + d.rope] = reference.rope(latent[:, d.latent :], angles)
        written = torch.zeros(pages.cache.shape[:2], dtype=torch.bool)
        for i, (s, p) in enumerate(positions):
            place = int(pages.places(s, torch.tensor([p]))[0])
            cache.view(-1, dim)[place] = rows[i]
            written.view(-1)[place] = True

        is_absorbed = (torch.arange(n) < absorbed)[:, None].expand(n, d.heads)
        plain = torch.cat((q[..., : d.nope], turned), dim=-1)
        between = (q_second,) if lora else ()
        expected: dict[str, Expected] = {
            "cache": _rows(cache, (), written),
            "q": _rows(plain, between, ~is_absorbed),
            "q_latent": _rows(q_latent, between, is_absorbed),
        }
        call = mla.mla_input_lora if lora else mla.mla_input_direct
        return Case(call, arguments, expected, ("x", "positions", "row_seq", "q", "q_latent"))

    return make


# Probabilities are rounded to bf16 before they weigh the values, and so is the latent sum before
# w_vc, and the result: three roundings, of which the first averages out over the context.
ATTENTION = 1.0 * HALF_BF16
ATTENTION_WORST = 1.5 * HALF_BF16


def _mla_decode(
    dims: Mla, head: Format, contexts: Sequence[int], block_size: int = 64, twice: bool = False
) -> Callable[[torch.Generator], Case]:
    """One row a context. `twice`: a second row in each sequence, half way back."""

    def make(g: torch.Generator) -> Case:
        d = dims
        pages = paged(g, contexts, block_size, d.latent, d.rope, filled=True)
        where = [(s, c - 1) for s, c in enumerate(contexts)]
        if twice:
            where += [(s, (c - 1) // 2) for s, c in enumerate(contexts)]
        n, dim = len(where), pages.cache.shape[2]
        q = normal(g, n, d.heads, dim)
        q[..., d.latent + d.rope :] = 0.0
        q = bf16(q)
        w_vc = [matrix(g, head, d.v, d.latent) for _ in range(d.heads)]
        scale = 1.5 * (d.latent + d.rope) ** -0.5
        out = torch.zeros(n, d.heads, d.v, dtype=F64)
        for i, (s, p) in enumerate(where):
            rows = pages.rows(s, p + 1).to(F64)
            probs = torch.softmax(q[i].to(F64) @ rows.t() * scale, dim=-1)
            summed = probs @ rows[:, : d.latent]
            for h, m in enumerate(w_vc):
                out[i, h] = m.head_product(summed[h : h + 1])[0]
        arguments = {
            "q_latent": q,
            "w_vc": reference.pack([[m] for m in w_vc]),
            "positions": torch.tensor([p for _, p in where], dtype=torch.int32),
            "row_seq": torch.tensor([s for s, _ in where], dtype=torch.int32),
            "block_tables": pages.tables,
            "cache": pages.cache,
            "scale": scale,
            "out": poison((n, d.heads * d.v), BF16),
        }
        expected: dict[str, Expected] = {
            "out": Rows(out.view(n, d.heads * d.v), ATTENTION, ATTENTION_WORST)
        }
        rows_of = ("q_latent", "positions", "row_seq", "out")
        return Case(mla.mla_decode_attention, arguments, expected, rows_of)

    return make


def prefill_reference(
    q: torch.Tensor, rows: torch.Tensor, kv_b: Matrix, dims: Mla, scale: float, start: int
) -> torch.Tensor:
    """fp64 [n, heads, v] of q bf16 [n, heads, nope + rope] at positions start..., over rows bf16
    [start + n, dim] of the cache."""
    d, n, context = dims, q.shape[0], rows.shape[0]
    both = kv_b.product(rows[:, : d.latent].contiguous()).view(context, d.heads, d.nope + d.v)
    keys = torch.cat(
        (
            bf16(both[..., : d.nope]).to(F64),
            rows[:, None, d.latent : d.latent + d.rope].to(F64).expand(context, d.heads, d.rope),
        ),
        dim=-1,
    )
    values = bf16(both[..., d.nope :]).to(F64)
    scores = torch.einsum("nhd,chd->hnc", q.to(F64), keys) * scale
    visible = torch.arange(context)[None, :] <= (start + torch.arange(n))[:, None]
    probs = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("hnc,chv->nhv", probs, values)


def _mla_prefill(
    dims: Mla, fmt: Format, segments: Sequence[tuple[int, int]], block_size: int = 64
) -> Callable[[torch.Generator], Case]:
    """segments: (rows, position of the first) of one sequence each; rows that no segment covers
    lie before, between and behind them."""

    def make(g: torch.Generator) -> Case:
        d = dims
        contexts = [count + start for count, start in segments]
        pages = paged(g, contexts, block_size, d.latent, d.rope, filled=True)
        kv_b = matrix(g, fmt, d.heads * (d.nope + d.v), d.latent)
        n = 1 + sum(count + 1 for count, _ in segments)
        q = bf16(normal(g, n, d.heads, d.nope + d.rope))
        scale = 1.5 * (d.nope + d.rope) ** -0.5
        out = torch.zeros(n, d.heads, d.v, dtype=F64)
        covered = torch.zeros(n, dtype=torch.bool)
        table, row = [], 1
        for s, (count, start) in enumerate(segments):
            here = slice(row, row + count)
            out[here] = prefill_reference(
                q[here], pages.rows(s, start + count), kv_b, d, scale, start
            )
            covered[here] = True
            table.append((row, count, s, start))
            row += count + 1
        arguments = {
            "q": q,
            "kv_b": one(kv_b),
            "segments": torch.tensor(table, dtype=torch.int32),
            "block_tables": pages.tables,
            "cache": pages.cache,
            "kv_lora_rank": d.latent,
            "qk_rope_head_dim": d.rope,
            "v_head_dim": d.v,
            "scale": scale,
            "out": poison((n, d.heads * d.v), BF16),
        }
        value = out.view(n, d.heads * d.v)
        # A key or value near a bf16 tie may tip over: a change of one in a context that weighs it.
        expected: dict[str, Expected] = {"out": Rows(value, ATTENTION, ATTENTION_WORST, covered)}
        return Case(mla.mla_prefill_attention, arguments, expected)

    return make


def _load_step(
    n: int, room: int, tables: tuple[int, int], to: tuple[int, int]
) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        vocab, blocks, block_size = 300, 50, 16

        def ints(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(0, high, shape, generator=g, dtype=torch.int32)

        ids, seq, table = ints(vocab, n), ints(tables[0], n), ints(blocks, *tables)
        positions = ints(tables[1] * block_size, n)
        arguments: dict[str, Any] = {
            "token_ids": ids,
            "positions": positions,
            "row_seq": seq,
            "block_tables": table,
            "vocab_size": vocab,
            "num_blocks": blocks,
            "block_size": block_size,
            "max_position": tables[1] * block_size,
            "token_ids_to": poison((room,), torch.int32),
            "positions_to": poison((room,), torch.int32),
            "row_seq_to": poison((room,), torch.int32),
            "block_tables_to": poison(to, torch.int32),
        }
        expected: dict[str, Expected] = {}
        for name, source in zip(
            ("token_ids", "positions", "row_seq"), (ids, positions, seq), strict=False
        ):
            value = arguments[name + "_to"].clone()
            value[:n] = source
            expected[name + "_to"] = Exact(value)
        whole = arguments["block_tables_to"].clone()
        whole[: tables[0], : tables[1]] = table
        expected["block_tables_to"] = Exact(whole)
        return Case(mla.load_step, arguments, expected)

    return make


# ---- sampling --------------------------------------------------------------------------------


def _logits(g: torch.Generator, n: int, vocab: int) -> torch.Tensor:
    """f32 [n, vocab], some of them -inf."""
    logits = normal(g, n, vocab, gain=3.0)
    logits[torch.rand(n, vocab, generator=g) < 0.05] = float("-inf")
    return logits


def _restrict(n: int, vocab: int, rows: Sequence[int]) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        logits, words = normal(g, n, vocab), -(-vocab // 32)
        allowed = torch.randint(-(2**31), 2**31, (len(rows), words), generator=g).to(torch.int32)
        if words > 1:
            allowed[:, 0] = 0
        after = logits.clone()
        for i, row in enumerate(rows):
            for t in range(vocab):
                if not int(allowed[i, t // 32]) >> (t % 32) & 1:
                    after[row, t] = float("-inf")
        at = torch.tensor(rows, dtype=torch.int32)
        arguments = {"logits": logits, "rows": at, "allowed": allowed}
        return Case(sampling.restrict, arguments, {"logits": Exact(after)})

    return make


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def _add_bias(vocab: int, lengths: Sequence[int]) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        n, m = len(lengths), sum(lengths)
        logits, bias = normal(g, n, vocab), normal(g, m)
        bias[::5] = float("-inf")
        ids = torch.randint(0, vocab, (m,), generator=g, dtype=torch.int32)
        offsets, after = _offsets(lengths), logits.clone()
        for i in range(n):
            for j in range(int(offsets[i]), int(offsets[i + 1])):
                after[i, int(ids[j])] += bias[j]
        arguments = {"logits": logits, "offsets": offsets, "token_ids": ids, "bias": bias}
        return Case(sampling.add_bias, arguments, {"logits": Exact(after)})

    return make


def _penalize(vocab: int, lengths: Sequence[int]) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        n, m = len(lengths), sum(lengths)
        logits, offsets = normal(g, n, vocab), _offsets(lengths)
        ids = torch.randint(0, vocab, (m,), generator=g, dtype=torch.int32)
        starts = torch.tensor(
            [int(offsets[i]) + lengths[i] // 3 for i in range(n)], dtype=torch.int32
        )
        repetition = torch.rand(n, generator=g) + 0.7
        presence, frequency = normal(g, n), normal(g, n)
        repetition[0], presence[0], frequency[0] = 1.0, 0.0, 0.0
        after = logits.clone()
        for i in range(n):
            sequence = ids[int(offsets[i]) : int(offsets[i + 1])].tolist()
            output = ids[int(starts[i]) : int(offsets[i + 1])].tolist()
            for t in set(sequence):
                x = after[i, t] / repetition[i] if after[i, t] > 0 else after[i, t] * repetition[i]
                x = x - frequency[i] * output.count(t)
                after[i, t] = x - presence[i] if t in output else x
        arguments = {
            "logits": logits,
            "offsets": offsets,
            "output_offsets": starts,
            "token_ids": ids,
            "repetition": repetition,
            "presence": presence,
            "frequency": frequency,
        }
        return Case(sampling.penalize, arguments, {"logits": Exact(after)})

    return make


def _sample(vocab: int, n: int) -> Callable[[torch.Generator], Case]:
    """Rows that are greedy, that keep all, and that are cut by min_p, top_k, top_p and all 3."""

    def make(g: torch.Generator) -> Case:
        logits = _logits(g, n, vocab)
        row = torch.arange(n)
        temperature = torch.where(row % 6 == 0, 0.0, torch.rand(n, generator=g) + 0.5)
        top_k = torch.where((row % 6 == 2) | (row % 6 == 5), 5, 0).to(torch.int32)
        top_p = torch.where((row % 6 == 3) | (row % 6 == 5), 0.7, 1.0)
        min_p = torch.where((row % 6 == 4) | (row % 6 == 5), 0.05, 0.0)
        seeds = torch.randint(0, 2**62, (n,), generator=g)
        counters = torch.arange(n) * 7
        ids, logprobs = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=F64)
        for i in range(n):
            temp, keep, share, least = (float(t[i]) for t in (temperature, top_k, top_p, min_p))
            at = reference.uniform(int(seeds[i]), int(counters[i]))
            ids[i], logprobs[i] = reference.sample(logits[i].to(F64), temp, keep, share, least, at)
        arguments = {
            "logits": logits,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seeds": seeds,
            "counters": counters,
            "token_ids": poison((n,), torch.int32),
            "logprobs": poison((n,), torch.float32),
        }
        # z = (x - max) / temperature is rounded a few times in fp32, at up to 80; e^z to 2e-7.
        close = Within(logprobs, logprobs.abs() * 1e-5 + 1e-5)
        expected: dict[str, Expected] = {"token_ids": Exact(ids), "logprobs": close}
        return Case(sampling.sample, arguments, expected, tuple(arguments))

    return make


def _greedy(vocab: int, n: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        logits = (_logits(g, n, vocab) * 2).round()  # with ties
        top = [int((row == row.max()).nonzero()[0]) for row in logits]
        arguments = {"logits": logits, "token_ids": poison((n,), torch.int32)}
        expected: dict[str, Expected] = {"token_ids": Exact(torch.tensor(top, dtype=torch.int32))}
        return Case(sampling.greedy, arguments, expected, ("logits", "token_ids"))

    return make


def _logprobs(vocab: int, n: int, m: int, k: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        logits = normal(g, n, vocab, gain=3.0)
        ids = torch.randint(0, vocab, (n, m), generator=g, dtype=torch.int32)
        exact = torch.log_softmax(logits.to(F64), dim=1)
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        own = logits.gather(1, ids.long())
        ranks = 1 + (logits[:, None, :] > own[..., None]).sum(dim=-1)
        arguments = {
            "logits": logits,
            "token_ids": ids,
            "values": poison((n, m), torch.float32),
            "ranks": poison((n, m), torch.int32),
            "top_ids": poison((n, k), torch.int32),
            "top_values": poison((n, k), torch.float32),
        }
        values, best = exact.gather(1, ids.long()), exact.gather(1, order)
        expected: dict[str, Expected] = {
            "values": Within(values, values.abs() * 1e-6 + 2e-6),
            "ranks": Exact(ranks.to(torch.int32)),
            "top_ids": Exact(order.to(torch.int32)),
            "top_values": Within(best, best.abs() * 1e-6 + 2e-6),
        }
        return Case(sampling.logprobs, arguments, expected, tuple(arguments))

    return make


# ---- packing ---------------------------------------------------------------------------------


def _packing(
    fmt: Format, batch: int, parts: int, rows: int, cols: int, item: int, part: int
) -> Callable[[torch.Generator], Case]:
    """One part of one matrix, into memory full of 0xff: its bytes change, and no others."""

    def make(g: torch.Generator) -> Case:
        m = matrix(g, fmt, rows, cols)
        dst = PackedWeight.allocate(fmt, batch, parts, rows, cols)
        dst.data[256:] = 0xFF
        after = dst.data.clone()
        begin = 256 + item * dst.item_nbytes
        whole = reference.item_bytes([m] * parts)
        assert len(whole) == dst.item_nbytes
        panels = -(-rows // 16) * parts
        tail = 4 * (-(-cols // 32) * 32) if fmt == Format.INT8_WIDE else 0
        stride = (len(whole) - tail) // panels
        ours = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        for panel in range(part, panels, parts):
            span = slice(panel * stride, (panel + 1) * stride)
            after[begin + span.start : begin + span.stop] = ours[span]
        if tail:
            after[begin + len(whole) - tail : begin + len(whole)] = ours[len(whole) - tail :]
        arguments: dict[str, Any] = {"dst": dst, "item": item, "part": part, "w": m.codes}
        call: Callable[..., None]
        if fmt == Format.F32:
            call = packing.pack_f32
        elif fmt == Format.BF16:
            call = packing.pack_bf16
        elif fmt == Format.INT8:
            call = packing.pack_int8
            arguments["scale"] = m.scale
        elif fmt == Format.FP8:
            call = packing.pack_fp8
            arguments["scale_inv"] = m.scale
        else:
            call = packing.pack_int8_wide
            del arguments["part"]
            arguments["row_scale"] = m.scale
            arguments["column_scale"] = m.column_scale
        return Case(call, arguments, {"dst": Exact(after)})

    return make


def weights_of_every_size(g: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    """bf16 [rows, cols]: rows of very different size down to subnormals, values at ties, and where
    there is room a row and a 128x128 block of zeros, a NaN and an infinity."""
    w = normal(g, rows, cols) * torch.exp2(torch.randint(-20, 20, (rows, 1), generator=g).float())
    w[:, 1::7] = (w[:, 1::7] / w.abs().amax(dim=1, keepdim=True) * 254).round() / 2
    if rows > 8:
        w[2] = 0.0
        w[3] *= 1e-38
        w[5] = w[5].sign() * 2.0**-133
        w[6, :] = 2.0**-4
        w[6, ::3] *= 127.5
    if rows > 256:
        w[128:256, :128] = 0.0
        w[256] = 0.0
        w[256, 0], w[256, -1] = float("nan"), float("-inf")
        w[0, -1] = float("inf")
    return bf16(w)


def _quantizing(fmt: Format, rows: int, cols: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        w = weights_of_every_size(g, rows, cols)
        stored = quantizers.quantize_int8(w) if fmt == Format.INT8 else quantizers.quantize_fp8(w)
        codes, scale = stored.values()
        call, name = packing.quantize_fp8, "scale_inv"
        if fmt == Format.INT8:
            scale = scale.view(-1)
            call, name = packing.quantize_int8, "scale"
        arguments = {
            "w": w,
            "codes": poison(codes.shape, codes.dtype),
            name: poison(scale.shape, torch.float32),
        }
        return Case(call, arguments, {"codes": Exact(codes), name: Exact(scale)})

    return make


def _dequantizing(fmt: Format, rows: int, cols: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        m = matrix(g, fmt, rows, cols)
        assert m.scale is not None
        call, name, suffix = packing.dequantize_fp8, "scale_inv", "weight_scale_inv"
        scale = m.scale
        if fmt == Format.INT8:
            call, name, suffix = packing.dequantize_int8, "scale", "weight_scale"
            scale = scale.view(-1, 1)
        arguments = {"codes": m.codes, name: m.scale, "out": poison((rows, cols), BF16)}
        # Two roundings: fp64 to fp32 is the product's own.
        exact = quantizers.dequantize({"weight": m.codes, suffix: scale})
        return Case(call, arguments, {"out": Exact(bf16(exact))})

    return make


def _init_packed(fmt: Format, *shape: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        batch, parts, rows, cols = shape
        data = huge_buffer(packed_nbytes(fmt, batch, parts, rows, cols))
        data.fill_(0xFF)
        after = data.clone()
        header = reference.header_bytes(fmt, batch, parts, rows, cols)
        after[:256] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        dst = PackedWeight(data, fmt, batch, parts, rows, cols)
        return Case(packing.init_packed, {"dst": dst}, {"dst": Exact(after)})

    return make


# ---- memory and files --------------------------------------------------------------------------


def _file(content: torch.Tensor, offset: int) -> int:
    """An open file in memory, left open: it is gone with the process."""
    file = os.memfd_create("sample")
    os.pwrite(file, content.numpy().tobytes(), offset)
    return file


def _noise(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8)


def _read_memory(n: int, groups: int, offset: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        content = _noise(g, n)
        arguments = {
            "dst": ~content,
            "groups": groups,
            "file": _file(content, offset),
            "offset": offset,
            "direct": False,
            "result": poison((2,), torch.int64),
        }
        moved = torch.tensor([reference.checksum(content), 0])
        return Case(storage.read_memory, arguments, {"dst": Exact(content), "result": Exact(moved)})

    return make


def _write_memory(n: int, groups: int, offset: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        content = _noise(g, n)
        arguments = {
            "src": content,
            "groups": groups,
            "file": _file(~content, offset),
            "offset": offset,
            "direct": False,
            "result": poison((2,), torch.int64),
        }
        moved = torch.tensor([reference.checksum(content), 0])
        return Case(storage.write_memory, arguments, {"result": Exact(moved)})

    return make


def _touch_memory(n: int, groups: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        content = _noise(g, n)
        return Case(
            storage.touch_memory,
            {"dst": content, "groups": groups},
            {"dst": Exact(content.clone())},
        )

    return make


@dataclass(frozen=True)
class Pages:
    """Counts of pages: looked at and unknown make one of every 256 KiB, and no more are our own."""

    blocks: int
    written: torch.Tensor | None = None

    def error(self, got: torch.Tensor) -> str | None:
        pages, unknown, own = got.tolist()
        right = pages + unknown == self.blocks and 0 <= own <= pages and unknown >= 0
        return None if right else f"{got.tolist()} of {self.blocks} blocks"


def _memory_placement(n: int, groups: int) -> Callable[[torch.Generator], Case]:
    def make(g: torch.Generator) -> Case:
        arguments = {
            "memory": _noise(g, n),
            "groups": groups,
            "counts": poison((3,), torch.int64),
        }
        return Case(storage.memory_placement, arguments, {"counts": Pages(-(-n // (256 << 10)))})

    return make


# ---- the table -------------------------------------------------------------------------------

BF, I8, F8, I8W, F32 = Format.BF16, Format.INT8, Format.FP8, Format.INT8_WIDE, Format.F32
NAMES = {BF: "bf16", I8: "int8", F8: "fp8", I8W: "int8_wide", F32: "f32"}


def _mix(*formats: Format) -> str:
    return "+".join(NAMES[f] for f in dict.fromkeys(formats))


def _table() -> list[Sample]:
    table: list[Sample] = []

    def add(op: str, scheme: str, shape: str, make: Callable[[torch.Generator], Case]) -> None:
        table.append(Sample(op, scheme, shape, make))

    for vocab, hidden, n in ((11, 70, 1), (40, 33, 3), (300, 257, 200), (7, 64, 0)):
        add("embedding", "bf16", f"{vocab}x{hidden}-n{n}", _embedding(vocab, hidden, n))
    for n, hidden, eps in (
        (1, 70, 1e-6),
        (3, 64, 1e-5),
        (17, 257, 1e-6),
        (200, 33, 1e-6),
        (0, 64, 1e-6),
    ):
        add("rms_norm", "bf16", f"n{n}-{hidden}", _rms_norm(n, hidden, eps))
        add("add_rms_norm", "bf16", f"n{n}-{hidden}", _add_rms_norm(n, hidden, eps))

    linear = (
        (1, 40, 70),
        (2, 7, 64),
        (3, 33, 257),
        (12, 65, 129),
        (13, 128, 128),
        (17, 100, 130),
        (40, 7, 33),
        (200, 130, 300),
        (290, 70, 1100),  # several blocks of rows, several chunks of K, an odd panel
        (0, 40, 70),
    )
    for fmt in LINEAR:
        for n, rows, cols in linear:
            make = _linear(dense.linear, BF16, fmt, n, rows, cols)
            add("linear", NAMES[fmt], f"n{n}-{rows}x{cols}", make)
        for n, rows, cols in ((1, 40, 70), (3, 300, 96), (17, 33, 257)):
            make = _linear(dense.logits, torch.float32, fmt, n, rows, cols)
            add("logits", NAMES[fmt], f"n{n}-{rows}x{cols}", make)
    for n, rows, cols in ((1, 17, 70), (5, 40, 1000), (40, 33, 257)):
        add("logits", "int8", f"extremes-n{n}-{rows}x{cols}", _int8_extremes(n, rows, cols))

    for fmt in (BF, I8W):
        for n, heads, rows, cols in (
            (1, 3, 44, 24),
            (3, 16, 20, 70),
            (17, 5, 160, 128),
            (200, 3, 17, 33),
        ):
            add(
                "heads",
                NAMES[fmt],
                f"n{n}-{heads}x{rows}x{cols}",
                _heads(fmt, n, heads, rows, cols),
            )

    for gate_up, down in ((BF, BF), (I8, I8), (F8, F8), (I8, BF), (F8, I8)):
        for n, hidden, inter in (
            (1, 70, 40),
            (3, 130, 72),
            (17, 64, 200),
            (40, 257, 24),
            (200, 96, 136),
        ):
            make = _mlp(gate_up, down, n, hidden, inter)
            add("mlp", _mix(gate_up, down), f"n{n}-{hidden}-{inter}", make)

    for gate_up, down in ((BF, BF), (I8, I8), (F8, F8), (F8, BF)):
        scheme = _mix(gate_up, down)
        for n, hidden, inter, experts, k, used in (
            (1, 70, 40, 5, 2, (0, 2, 4)),
            (3, 130, 24, 16, 8, range(16)),
            (17, 64, 72, 5, 1, (3,)),
            (40, 100, 33, 16, 6, (0, 1, 3, 5, 8, 9, 15)),
            (200, 72, 40, 16, 4, range(1, 15)),
            (600, 72, 40, 4, 2, (0, 2, 3)),  # rows of an expert in two blocks
        ):
            make = _moe(gate_up, down, n, hidden, inter, experts, k, tuple(used))
            add("moe", scheme, f"n{n}-{hidden}-{inter}-e{experts}k{k}", make)
    for gate_up, down, shared in (
        (BF, BF, (BF, BF, 40)),
        (I8, I8, (I8, I8, 80)),
        (F8, F8, (F8, F8, 33)),
        (I8, I8, (BF, F8, 72)),
    ):
        scheme = _mix(gate_up, down, *shared[:2])
        for n, hidden, inter, experts, k, used in (
            (1, 70, 40, 5, 2, (0, 2, 4)),
            (3, 130, 24, 16, 8, range(16)),
            (40, 100, 33, 5, 3, (0, 1, 4)),
            (200, 72, 24, 16, 1, (7,)),
        ):
            make = _moe(gate_up, down, n, hidden, inter, experts, k, tuple(used), shared)
            add("moe_shared", scheme, f"n{n}-{hidden}-{inter}-e{experts}k{k}-s{shared[2]}", make)

    for fmt in (BF, F32):
        for n, hidden, experts, groups, kept, k in (
            (1, 70, 5, 1, 1, 2),
            (3, 130, 16, 1, 1, 8),
            (17, 64, 16, 4, 2, 3),
            (40, 257, 64, 8, 3, 6),
            (200, 33, 40, 8, 4, 1),
        ):
            shape = f"n{n}-{hidden}-e{experts}-g{groups}.{kept}-k{k}"
            for scoring in ("softmax", "sigmoid"):
                make = _route(scoring, fmt, n, hidden, experts, groups, kept, k, k > 2, 2.5)
                add(f"route_{scoring}", NAMES[fmt], shape, make)
        ties = _route("softmax", fmt, 17, 70, 16, 4, 2, 3, twins=True)
        add("route_softmax", NAMES[fmt], "ties", ties)
        for label, bias_at, twins in (("ties", 0.0, True), ("negative", -3.0, False)):
            make = _route("sigmoid", fmt, 17, 70, 16, 4, 2, 5, bias_at=bias_at, twins=twins)
            add("route_sigmoid", NAMES[fmt], label, make)

    one_row = ((0, 0),)
    decode_rows = ((0, 5), (1, 63), (2, 64))
    mixed_rows = (
        *((s, 40 * s + 3) for s in range(7)),
        *((7, p) for p in range(60, 93)),
    )
    long_rows = tuple((0, p) for p in range(13, 213))
    inputs = (
        ("n1", SMALL, one_row, 1),
        ("n3", MIDDLE, decode_rows, 3),
        ("n40", SMALL, mixed_rows, 7),
        ("n17-prefill", WIDE, long_rows[:17], 0),
        ("n200", SMALL, long_rows, 0),
    )
    for q_first, q_second, kv, head in (
        (BF, BF, BF, BF),
        (I8, I8, I8, I8W),
        (F8, F8, F8, BF),
        (F8, I8, BF, I8W),
    ):
        scheme = _mix(q_first, q_second, kv, head)
        for label, dims, where, absorbed in inputs:
            size = 16 if label == "n40" else 64
            make = _mla_input(True, dims, q_first, q_second, kv, head, where, absorbed, size)
            add("mla_input_lora", scheme, label, make)
    for q_first, kv, head in ((BF, BF, BF), (I8, I8, I8W), (F8, F8, BF), (I8, BF, I8W)):
        scheme = _mix(q_first, kv, head)
        for label, dims, where, absorbed in inputs:
            make = _mla_input(False, dims, q_first, BF, kv, head, where, absorbed)
            add("mla_input_direct", scheme, label, make)

    edges = (1, 63, 64, 65, 127, 128, 129, 200, 513, 1100)
    many = Mla(hidden=0, heads=70, q_lora=0, nope=0, rope=8, v=16, latent=24)
    for head in (BF, I8W):
        for label, dims, contexts, size in (
            ("1", SMALL, (1,), 64),
            ("1100", MIDDLE, (1100,), 64),
            ("513-h3", SMALL, (513,), 16),
            ("edges-h3", SMALL, edges, 64),
            ("edges-h16", MIDDLE, edges, 64),
            ("blocks-of-7-h16", MIDDLE, (129, 50), 7),
            ("wide", WIDE, (65, 200, 3), 64),
            ("h70", many, (129, 600), 32),
            ("h70-short", many, (20, 129), 32),
            ("n40", SMALL, tuple(range(1, 161, 4)), 16),
        ):
            add("mla_decode_attention", NAMES[head], label, _mla_decode(dims, head, contexts, size))
        make = _mla_decode(SMALL, head, (1100, 65), twice=True)
        add("mla_decode_attention", NAMES[head], "two-rows-a-sequence", make)

    for fmt in LINEAR:
        for label, dims, segments, size in (
            ("1", SMALL, ((1, 0),), 64),
            ("17", MIDDLE, ((17, 0),), 64),
            ("63+64+65", SMALL, ((63, 0), (64, 1), (65, 130)), 64),
            ("200", SMALL, ((200, 0),), 16),
            ("wide", WIDE, ((40, 100), (1, 127)), 64),
            ("behind-1000", MIDDLE, ((100, 1000),), 64),
            ("700-behind-333", SMALL, ((700, 333), (30, 0)), 64),
        ):
            make = _mla_prefill(dims, fmt, segments, size)
            add("mla_prefill_attention", NAMES[fmt], label, make)

    for n, room, tables, to in (
        (1, 1, (1, 1), (1, 1)),
        (5, 8, (3, 7), (4, 9)),
        (200, 200, (17, 5), (17, 40)),
    ):
        add("load_step", "none", f"n{n}", _load_step(n, room, tables, to))

    add("restrict", "none", "vocab70", _restrict(3, 70, (2, 0)))
    add("restrict", "none", "vocab300-all", _restrict(2, 300, (0, 1)))
    add("add_bias", "none", "vocab70", _add_bias(70, (3, 0, 40)))
    add("penalize", "none", "vocab70", _penalize(70, (5, 0, 90, 7)))
    add("penalize", "none", "vocab300", _penalize(300, (600,)))
    for vocab, n in ((70, 1), (300, 17), (20001, 7)):
        add("sample", "none", f"vocab{vocab}-n{n}", _sample(vocab, n))
        add("greedy", "none", f"vocab{vocab}-n{n}", _greedy(vocab, n))
        for m, k in ((1, 0), (3, 20), (0, 5)):
            add("logprobs", "none", f"vocab{vocab}-n{n}-{m}+{k}", _logprobs(vocab, n, m, k))

    for fmt in (F32, BF, I8, F8):
        for batch, parts, rows, cols, item, part in (
            (1, 1, 7, 5, 0, 0),
            (3, 2, 40, 70, 1, 1),
            (2, 1, 257, 129, 1, 0),
            (1, 2, 16, 384, 0, 0),
        ):
            shape = f"{batch}x{parts}x{rows}x{cols}-{item}.{part}"
            make = _packing(fmt, batch, parts, rows, cols, item, part)
            add(f"pack_{NAMES[fmt]}", NAMES[fmt], shape, make)
    for batch, rows, cols, item in ((1, 7, 5, 0), (3, 40, 70, 1), (2, 257, 129, 1)):
        add(
            "pack_int8_wide",
            "int8_wide",
            f"{batch}x{rows}x{cols}-{item}",
            _packing(I8W, batch, 1, rows, cols, item, 0),
        )
    for rows, cols in ((1, 1), (9, 15), (40, 70), (130, 257), (300, 129), (257, 384)):
        for fmt in (I8, F8):
            shape = f"{rows}x{cols}"
            add(f"quantize_{NAMES[fmt]}", NAMES[fmt], shape, _quantizing(fmt, rows, cols))
            add(f"dequantize_{NAMES[fmt]}", NAMES[fmt], shape, _dequantizing(fmt, rows, cols))
    for fmt in Format:
        add("init_packed", NAMES[fmt], "3x1x40x70", _init_packed(fmt, 3, 1, 40, 70))
    for n, groups, offset in ((1, 1, 0), (100_003, 7, 5), (600_001, 3, 4096)):
        add("read_memory", "none", f"{n}-{groups}-{offset}", _read_memory(n, groups, offset))
        add("write_memory", "none", f"{n}-{groups}-{offset}", _write_memory(n, groups, offset))
        add("touch_memory", "none", f"{n}-{groups}", _touch_memory(n, groups))
        add("memory_placement", "none", f"{n}-{groups}", _memory_placement(n, groups))
    return table


ALL: Sequence[Sample] = _table()
SAMPLES: Mapping[str, Sequence[Sample]] = {
    op: tuple(s for s in ALL if s.op == op) for op in dict.fromkeys(s.op for s in ALL)
}

EAGER_ONLY: Mapping[str, str] = {
    "mla_prefill_attention": "segments",
    "load_step": "token_ids_to",
    "init_packed": "dst",
    "restrict": "logits",
    "add_bias": "logits",
    "penalize": "logits",
    "sample": "logits",
    "logprobs": "logits",
    "read_memory": "dst",
    "write_memory": "src",
    "touch_memory": "dst",
    "memory_placement": "memory",
}
"""Ops that refuse a capture, and the argument that they name."""

_NOTHING: Sequence[Mapping[str, Any]] = ({},)

PLAIN_SAMPLES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "set_threads": ({"n": 1}, {"n": 3}),
    "num_threads": _NOTHING,
    "topology": _NOTHING,
    "topology_below": ({"root": "", "allowed": [0]}, {"root": "/nowhere", "allowed": [3, 5]}),
    "help_below": ({"root": "/nowhere", "allowed": [3, 5], "threads": 2},),
    "owned_ranges": ({"n": 10, "threads": 3, "turn": 7},),
    "owned_pieces": ({"panels": 10, "pieces": 3, "threads": 7},),
    "owned_lists": (
        {"what": "gate_up", "n": 10, "at": 1, "lists": 2, "threads": 7},
        {"what": "down", "n": 10, "at": 0, "lists": 1, "threads": 3},
    ),
    "isa_tier": _NOTHING,
    "force_isa_tier": ({"name": ""}, {"name": "avx2"}),
    "cpu_features": _NOTHING,
    "packed_bytes": ({"desc": [int(Format.FP8), 2, 2, 40, 70]},),
    "pack_version": _NOTHING,
    "release_scratch": _NOTHING,
    "graph_begin": _NOTHING,
    "graph_end": _NOTHING,
    "graph_replay": ({"handle": 1},),
    "graph_free": ({"handle": 1},),
    "profile_begin": _NOTHING,
    "profile_end": _NOTHING,
    "peak_ops": ({"fmt": int(Format.BF16), "seconds": 0.001},),
    "last_level_cache": _NOTHING,
    "meeting_seconds": ({"seconds": 0.001},),
    "read_bandwidth": ({"seconds": 0.001, "most_bytes": 1 << 24},),
}
"""Arguments of the ops without tensors."""
