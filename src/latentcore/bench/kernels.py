"""Roofline share of every op of a decoder step, by scheme, tier and number of rows.

Ops run on random weights of a model's shapes. Each is given so many copies of its weights that
together they are eight times the last-level caches, and is timed over all copies in turn, in one
replayed graph where it can be captured. Experts are drawn at random and counted. Ops without
weights are measured once a tier, and count the activations that they read and write; the others
leave them out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch

from latentcore.bench.machine import (
    Ceilings,
    Disturbance,
    Machine,
    describe_machine,
    measure_ceilings,
    watched,
)
from latentcore.bench.model import Note
from latentcore.bench.timing import Spread, seconds_of
from latentcore.config import ModelConfig, rope_table
from latentcore.errors import ConfigError
from latentcore.layers.step import latent_row
from latentcore.models.cost import Cost
from latentcore.ops import dense, mla, moe, runtime, sampling
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.schemes import SCHEMES

DECODE_ROWS = (1, 8, 32)
"""Batch sizes; every row is a sequence of its own."""

PREFILL_ROWS = (512, 2048)
"""Prompts, of one sequence."""

CONTEXT = 2048
"""Tokens that each sequence holds when decode attention is measured."""

LONG_CONTEXT, LONG_HEADS = 32768, 128
"""Decode attention of one row over a long context, with V3's heads."""

ANY_SCHEME = "any"
"""In place of a scheme's name: the op has no weights, or always bf16 ones."""

T = TypeVar("T")

_BLOCK = 64
_EXPERT_SETS = 8
_MOST_COPIES = 1024
_WARM_UP = 1
_LEAST_SECONDS = 0.02
_LINE = 64


@dataclass(frozen=True)
class KernelResult:
    """One op: seconds a call, and its roofline share.

    scheme  ANY_SCHEME where it makes no difference
    shape   what else tells cases of one op apart, such as the tokens of a context; may be empty
    """

    op: str
    scheme: str
    tier: str
    rows: int
    shape: str
    seconds: Spread
    bytes_per_second: float
    operations_per_second: float
    share: float
    limit: str


@dataclass(frozen=True)
class KernelsResult:
    """Everything that one run found; ceilings by tier."""

    machine: Machine
    ceilings: dict[str, Ceilings]
    disturbance: Disturbance
    repeats: int
    results: tuple[KernelResult, ...]


@dataclass(frozen=True)
class _Case:
    """An op at a number of rows. `calls` compute the same on different weights or inputs."""

    rows: int
    calls: Sequence[Callable[[], None]]
    cost: Cost
    captured: bool = True
    shape: str = ""


@dataclass(frozen=True)
class _Plan(Generic[T]):
    """How to make an op's case for a number of rows, and for which numbers."""

    make: Callable[[T, int], _Case]
    rows: Literal["decode", "prefill", "all", "one"]

    def numbers(self) -> Sequence[int]:
        return {
            "decode": DECODE_ROWS,
            "prefill": PREFILL_ROWS,
            "all": DECODE_ROWS + PREFILL_ROWS,
            "one": (1,),
        }[self.rows]


def bench_kernels(
    config: ModelConfig,
    schemes: Sequence[str],
    tiers: Sequence[str],
    repeats: int,
    note: Note,
) -> KernelsResult:
    """Measures the ops of `config`'s shapes with the team of threads as it is set now.

    Raises UserError, before anything is measured, for a tier that this CPU lacks.
    """
    if config.num_experts_per_tok < 1 or config.q_lora_rank is None:
        raise ConfigError(
            "kernels are measured with the shapes of a model with experts and q_lora_rank"
        )
    for tier in tiers:
        with runtime.forced_tier(tier):
            pass
    results: list[KernelResult] = []
    ceilings: dict[str, Ceilings] = {}

    def measure(name: str, ops: T, plans: Sequence[tuple[str, _Plan[T]]]) -> None:
        wanted = [(op, plan, rows) for op, plan in plans for rows in plan.numbers()]
        for tier in tiers:
            with runtime.forced_tier(tier):
                for done, (op, plan, rows) in enumerate(wanted):
                    note(f"{name}, {tier}", done, len(wanted))
                    case = plan.make(ops, rows)
                    results.append(_measure(op, case, name, tier, ceilings[tier], repeats))

    with watched() as disturbance:
        for tier in tiers:
            with runtime.forced_tier(tier):
                note(f"read bandwidth and arithmetic peaks, {tier}", 0, 1)
                ceilings[tier] = measure_ceilings(Format)
        measure(ANY_SCHEME, _CommonOps(config), COMMON_OPS)
        for name in schemes:
            note(f"{name}: packing weights", 0, 1)
            measure(name, _SchemeOps(config, SCHEMES[name]), SCHEME_OPS)
    return KernelsResult(describe_machine(), ceilings, disturbance, repeats, tuple(results))


def _measure(
    op: str, case: _Case, scheme: str, tier: str, ceilings: Ceilings, repeats: int
) -> KernelResult:
    def all_calls() -> None:
        for call in case.calls:
            call()

    run, graph = all_calls, None
    if case.captured:
        with runtime.Graph.capture() as graph:
            all_calls()
        run = graph.replay
    once = seconds_of(run)
    rounds = max(1, math.ceil(_LEAST_SECONDS / once))

    def many() -> None:
        for _ in range(rounds):
            run()

    times = [seconds_of(many) for _ in range(_WARM_UP + repeats)][_WARM_UP:]
    if graph is not None:
        graph.free()
    count = rounds * len(case.calls)
    seconds = Spread.of([t / count for t in times])
    least = ceilings.least_seconds(case.cost)
    return KernelResult(
        op=op,
        scheme=scheme,
        tier=tier,
        rows=case.rows,
        shape=case.shape,
        seconds=seconds,
        bytes_per_second=case.cost.nbytes / seconds.median,
        operations_per_second=sum(case.cost.operations.values()) / seconds.median,
        share=least / seconds.median,
        limit="memory" if least == case.cost.nbytes / ceilings.read_bandwidth else "arithmetic",
    )


class _Ops:
    """A model's shapes, and what exceeds the caches."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.spill = 8 * runtime.last_level_cache()

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes exceed the caches together."""
        return min(max(1, -(-self.spill // nbytes)), _MOST_COPIES)

    def packed(
        self, scheme: QuantScheme, batch: int, parts: int, rows: int, cols: int
    ) -> list[PackedWeight]:
        """All hold the same values; each is packed by the threads that will read it."""
        stored = scheme.quantize(_random(rows, cols))
        first = PackedWeight.allocate(scheme.format, batch, parts, rows, cols)
        weights = [first]
        weights += [
            PackedWeight.allocate(scheme.format, batch, parts, rows, cols)
            for _ in range(self.copies(first.nbytes) - 1)
        ]
        for weight in weights:
            for item in range(batch):
                for part in range(parts):
                    scheme.pack(weight, item, part, stored)
        return weights

    def in_turn(self, weights: Sequence[T], n: int) -> Sequence[T]:
        """The copies to use for `n` rows: one where reading it is little beside the arithmetic."""
        return weights if n < PREFILL_ROWS[0] else weights[:1]


class _CommonOps(_Ops):
    """The ops that are the same in every scheme, with their weights and buffers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        bf16, h = SCHEMES["bf16"], config.hidden_size
        self.table = _random(config.vocab_size, h)
        self.router = self.packed(bf16, 1, 1, config.n_routed_experts, h)
        self.lm_head = self.packed(bf16, 1, 1, config.vocab_size, h)

    # Before and between the layers

    def load_step(self, n: int) -> _Case:
        c, width = self.config, -(-(CONTEXT + 1) // _BLOCK)
        blocks = n * width
        given = (
            torch.randint(0, c.vocab_size, (n,)).int(),
            torch.full((n,), CONTEXT).int(),
            torch.arange(n).int(),
            torch.arange(blocks, dtype=torch.int32).view(n, width),
        )
        limits = (c.vocab_size, blocks, _BLOCK, CONTEXT + 1)
        to = [torch.empty_like(tensor) for tensor in given]
        cost = Cost(2.0 * sum(tensor.nbytes for tensor in given))
        calls = [_call(mla.load_step, *given, *limits, *to)]
        return _Case(n, calls, cost, captured=False, shape=f"context {CONTEXT}")

    def embedding(self, n: int) -> _Case:
        vocab, h = self.table.shape
        out = torch.empty((n, h), dtype=torch.bfloat16)
        sets = [
            torch.randint(0, vocab, (n,), dtype=torch.int32) for _ in range(self.copies(out.nbytes))
        ]
        calls = [_call(dense.embedding, self.table, ids, out) for ids in sets]
        return _Case(n, calls, Cost(2.0 * out.nbytes))

    def rms_norm(self, n: int) -> _Case:
        h, weight = self.config.hidden_size, torch.rand(self.config.hidden_size)
        sets = [_random(n, h) for _ in range(self.copies(4 * n * h))]
        outs = [torch.empty_like(x) for x in sets]
        calls = [
            _call(dense.rms_norm, x, weight, 1e-6, out) for x, out in zip(sets, outs, strict=True)
        ]
        return _Case(n, calls, Cost(2.0 * outs[0].nbytes))

    def add_rms_norm(self, n: int) -> _Case:
        h, weight = self.config.hidden_size, torch.rand(self.config.hidden_size)
        sets = [_random(n, h) for _ in range(self.copies(6 * n * h))]
        # What is added tends to nothing, so that any number of calls leaves numbers finite.
        deltas = [x * 2.0**-20 for x in sets]
        outs = [torch.empty_like(x) for x in sets]
        calls = [
            _call(dense.add_rms_norm, x, delta, weight, 1e-6, out)
            for x, delta, out in zip(sets, deltas, outs, strict=True)
        ]
        return _Case(n, calls, Cost(3.0 * outs[0].nbytes))

    # Router and output head

    def route_sigmoid(self, n: int) -> _Case:
        return self.route(n, moe.route_sigmoid, torch.zeros(self.config.n_routed_experts))

    def route_softmax(self, n: int) -> _Case:
        return self.route(n, moe.route_softmax)

    def route(self, n: int, op: Callable[..., None], *bias: torch.Tensor) -> _Case:
        r, x = self.config.router, _random(n, self.config.hidden_size)
        ids = torch.empty((n, r.top_k), dtype=torch.int32)
        weights = torch.empty((n, r.top_k), dtype=torch.float32)
        choice = (r.n_group, r.topk_group, r.top_k, r.norm_topk_prob, r.routed_scaling_factor)
        cost = Cost()
        cost.multiply(self.router[0], n)
        routers = self.in_turn(self.router, n)
        return _Case(n, [_call(op, x, w, *bias, *choice, ids, weights) for w in routers], cost)

    def logits(self, n: int) -> _Case:
        x = _random(n, self.config.hidden_size)
        out = torch.empty((n, self.config.vocab_size))
        cost = Cost()
        cost.multiply(self.lm_head[0], n)
        return _Case(n, [_call(dense.logits, x, w, out) for w in self.lm_head], cost)

    # Sampling: of logits that come from memory

    def rows_of_logits(self, n: int) -> list[torch.Tensor]:
        """Copies of float logits [n, vocab] that exceed the caches together."""
        vocab = self.config.vocab_size
        return [torch.randn(n, vocab) for _ in range(self.copies(4 * n * vocab))]

    def sampled(self, n: int, op: Callable[..., None], *arguments: object) -> _Case:
        """An op that passes over all logits."""
        sets = self.rows_of_logits(n)
        cost = Cost(float(sets[0].nbytes))
        return _Case(n, [_call(op, logits, *arguments) for logits in sets], cost, captured=False)

    def greedy(self, n: int) -> _Case:
        case = self.sampled(n, sampling.greedy, torch.empty(n, dtype=torch.int32))
        return _Case(n, case.calls, case.cost)

    def sample(self, n: int) -> _Case:
        return self.sampled(
            n,
            sampling.sample,
            torch.full((n,), 0.8),
            torch.full((n,), 50).int(),
            torch.full((n,), 0.95),
            torch.full((n,), 0.02),
            torch.arange(n),
            torch.arange(n),
            torch.empty(n, dtype=torch.int32),
            torch.empty(n),
        )

    def logprobs(self, n: int) -> _Case:
        top = min(5, self.config.vocab_size)
        return self.sampled(
            n,
            sampling.logprobs,
            torch.randint(0, self.config.vocab_size, (n, 1)).int(),
            torch.empty(n, 1),
            torch.empty(n, 1, dtype=torch.int32),
            torch.empty(n, top, dtype=torch.int32),
            torch.empty(n, top),
        )

    def restrict(self, n: int) -> _Case:
        masks = torch.randint(-(2**31), 2**31, (n, -(-self.config.vocab_size // 32))).int()
        return self.sampled(n, sampling.restrict, torch.arange(n).int(), masks)

    def add_bias(self, n: int) -> _Case:
        ids, offsets = self.some_ids(n, 64)
        return self.touched(n, len(ids), sampling.add_bias, offsets, ids, torch.zeros(len(ids)))

    def penalize(self, n: int) -> _Case:
        ids, offsets = self.some_ids(n, CONTEXT)
        # No repetition penalty: over and over it would lead to infinities.
        penalties = (torch.ones(n), torch.full((n,), 0.01), torch.full((n,), 0.01))
        return self.touched(n, len(ids), sampling.penalize, offsets, offsets[:-1], ids, *penalties)

    def some_ids(self, n: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random token ids, so many a row, and where each row's begin."""
        ids = torch.randint(0, self.config.vocab_size, (n * each,)).int()
        return ids, torch.arange(0, n * each + 1, each).int()

    def touched(self, n: int, count: int, op: Callable[..., None], *arguments: object) -> _Case:
        """An op that changes `count` logits: each costs its id and the line that it stands in."""
        calls = [_call(op, logits, *arguments) for logits in self.rows_of_logits(n)]
        lines = min(count * _LINE, 4 * n * self.config.vocab_size)
        return _Case(n, calls, Cost(float(lines + 4 * count)), captured=False)


class _SchemeOps(_Ops):
    """The ops that multiply by one scheme's weights, with these and their buffers."""

    def __init__(self, config: ModelConfig, scheme: QuantScheme) -> None:
        super().__init__(config)
        self.scheme = scheme
        c, h, heads, rank = (
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.kv_lora_rank,
        )
        assert c.q_lora_rank is not None
        self.q_a = self.linear_weights(c.q_lora_rank, h)
        self.q_b = self.linear_weights(heads * c.qk_head_dim, c.q_lora_rank)
        self.q_proj = self.linear_weights(heads * c.qk_head_dim, h)
        self.kv_a = self.linear_weights(c.latent_dim, h)
        self.kv_b = self.linear_weights(heads * (c.qk_nope_head_dim + c.v_head_dim), rank)
        self.halves = self.head_halves(heads)
        self.long_w_vc = self.head_halves(LONG_HEADS, copies=1)[0][1]
        self.o = self.linear_weights(h, heads * c.v_head_dim)
        self.dense = self.mlp_weights(1, c.intermediate_size)
        self.experts = self.mlp_weights(c.n_routed_experts, c.moe_intermediate_size)[0]
        shared = max(1, c.n_shared_experts) * c.moe_intermediate_size
        self.shared = self.mlp_weights(1, shared)

    def linear_weights(self, rows: int, cols: int) -> list[PackedWeight]:
        return self.packed(self.scheme, 1, 1, rows, cols)

    def mlp_weights(self, batch: int, width: int) -> list[tuple[PackedWeight, PackedWeight]]:
        h = self.config.hidden_size
        gate_up = self.packed(self.scheme, batch, 2, width, h)
        down = self.packed(self.scheme, batch, 1, h, width)
        return list(zip(gate_up, down, strict=False))

    def head_halves(
        self, heads: int, copies: int | None = None
    ) -> list[tuple[PackedWeight, PackedWeight]]:
        """w_kc and w_vc: so many copies, or as many as exceed the caches."""
        c = self.config
        nope, v, rank = c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
        stored = self.scheme.quantize(_random(heads * (nope + v), rank))
        fmt = self.scheme.kv_b_format
        halves: list[tuple[PackedWeight, PackedWeight]] = []
        while len(halves) < (copies or 1):
            w_kc = PackedWeight.allocate(fmt, heads, 1, rank, nope)
            w_vc = PackedWeight.allocate(fmt, heads, 1, v, rank)
            self.scheme.pack_kv_b(w_kc, w_vc, stored, nope, v)
            halves.append((w_kc, w_vc))
            copies = copies or self.copies(w_kc.nbytes + w_vc.nbytes)
        return halves

    # Matrices

    def linear(self, n: int) -> _Case:
        x = _random(n, self.config.num_attention_heads * self.config.v_head_dim)
        out = self.result(n)
        cost = Cost()
        cost.multiply(self.o[0], n)
        calls = [_call(dense.linear, x, w, out) for w in self.in_turn(self.o, n)]
        return _Case(n, calls, cost)

    def mlp(self, n: int) -> _Case:
        x, out, cost = self.stream(n), self.result(n), Cost()
        for w in self.dense[0]:
            cost.multiply(w, n)
        calls = [_call(dense.mlp, x, *w, out) for w in self.in_turn(self.dense, n)]
        return _Case(n, calls, cost)

    def heads(self, n: int) -> _Case:
        """A product a head, by w_vc."""
        first = self.halves[0][1]
        x = _random(n * first.batch, first.cols).view(n, first.batch, first.cols)
        out = torch.empty((n, first.batch, first.rows), dtype=torch.bfloat16)
        cost = Cost()
        cost.multiply(first, n)
        calls = [_call(dense.heads, x, w_vc, out) for _, w_vc in self.in_turn(self.halves, n)]
        return _Case(n, calls, cost)

    def moe(self, n: int) -> _Case:
        return self.experts_of(n, shared=False)

    def moe_shared(self, n: int) -> _Case:
        return self.experts_of(n, shared=True)

    def experts_of(self, n: int, *, shared: bool) -> _Case:
        c = self.config
        count, k = c.n_routed_experts, c.num_experts_per_tok
        sets = [
            torch.stack([torch.randperm(count)[:k] for _ in range(n)]).int()
            for _ in range(_EXPERT_SETS if n < count else 1)
        ]
        x, weights, out = self.stream(n), torch.rand(n, k), self.result(n)
        gate_up, down = self.experts
        touched = sum(len(set(ids.flatten().tolist())) for ids in sets) / len(sets)
        cost = Cost(touched * (gate_up.item_nbytes + down.item_nbytes))
        per_row = 2 * gate_up.rows * gate_up.cols + down.rows * down.cols
        cost.operations[gate_up.format] += 2.0 * n * k * per_row
        always: Sequence[tuple[PackedWeight, ...]] = self.shared if shared else ((),)
        for w in always[0]:
            cost.multiply(w, n)
        op: Callable[..., None] = moe.moe_shared if shared else moe.moe
        calls = [
            _call(op, x, ids, weights, gate_up, down, *always[i % len(always)], out)
            for i, ids in enumerate(sets)
        ]
        return _Case(n, calls, cost)

    def stream(self, n: int) -> torch.Tensor:
        """Rows of the residual stream."""
        return _random(n, self.config.hidden_size)

    def result(self, n: int) -> torch.Tensor:
        """What is added to the stream."""
        return torch.empty((n, self.config.hidden_size), dtype=torch.bfloat16)

    # Attention

    def cache(self, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of so many sequences, bf16, and the block tables that lead to them."""
        each = -(-tokens // _BLOCK)
        cache = _random(sequences * each * _BLOCK, latent_row(self.config))
        tables = torch.arange(sequences * each, dtype=torch.int32).view(sequences, each)
        return cache.view(-1, _BLOCK, cache.shape[1]), tables

    def mla_input_lora(self, n: int) -> _Case:
        c = self.config
        assert c.q_lora_rank is not None
        norm = torch.ones(c.q_lora_rank)
        queries = [
            (self.q_a[i % len(self.q_a)], norm, self.q_b[i % len(self.q_b)])
            for i in range(max(len(self.q_a), len(self.q_b)))
        ]
        return self.mla_input(n, mla.mla_input_lora, queries)

    def mla_input_direct(self, n: int) -> _Case:
        return self.mla_input(n, mla.mla_input_direct, [(w,) for w in self.q_proj])

    def mla_input(
        self,
        n: int,
        op: Callable[..., None],
        queries: Sequence[tuple[PackedWeight | torch.Tensor, ...]],
    ) -> _Case:
        """Decode rows behind CONTEXT tokens, absorbed; or a prompt."""
        c, absorbed = self.config, n in DECODE_ROWS
        sequences, tokens = (n, CONTEXT + 1) if absorbed else (1, n)
        cache, tables = self.cache(sequences, tokens)
        table = rope_table(c.rope, tokens)
        row_seq = torch.arange(n).int() if absorbed else torch.zeros(n).int()
        positions = torch.full((n,), CONTEXT).int() if absorbed else torch.arange(n).int()
        q = torch.empty((n, c.num_attention_heads, c.qk_head_dim), dtype=torch.bfloat16)
        q_latent = torch.empty((n, c.num_attention_heads, latent_row(c)), dtype=torch.bfloat16)
        x, cost = self.stream(n), Cost()
        for w in (*queries[0], self.kv_a[0]):
            if isinstance(w, PackedWeight):
                cost.multiply(w, n)
        if absorbed:
            cost.multiply(self.halves[0][0], n)
        rounds = max(len(self.in_turn(w, n)) for w in (queries, self.kv_a))
        calls = [
            _call(
                op,
                x,
                *queries[i % len(queries)],
                self.kv_a[i % len(self.kv_a)],
                torch.ones(c.kv_lora_rank),
                self.halves[i % len(self.halves)][0],
                c.inner_norm_eps,
                table,
                positions,
                row_seq,
                tables,
                cache,
                n if absorbed else 0,
                q,
                q_latent,
            )
            for i in range(rounds)
        ]
        return _Case(n, calls, cost)

    def mla_decode(self, n: int) -> _Case:
        return self.decode_attention(n, CONTEXT, [w_vc for _, w_vc in self.halves])

    def mla_decode_long(self, n: int) -> _Case:
        return self.decode_attention(n, LONG_CONTEXT, [self.long_w_vc])

    def decode_attention(self, n: int, context: int, w_vc: Sequence[PackedWeight]) -> _Case:
        c, heads = self.config, w_vc[0].batch
        row_bytes = 2 * latent_row(c)
        # Each call reads other sequences, so that their latents come from memory.
        calls_each = self.copies(n * context * row_bytes)
        cache, tables = self.cache(n * calls_each, context)
        q = _random(n * heads, latent_row(c)).view(n, heads, -1)
        out = torch.empty((n, heads * c.v_head_dim), dtype=torch.bfloat16)
        positions = torch.full((n,), context - 1).int()
        rows = torch.arange(n).int()
        cost = Cost(float(n * context * row_bytes))
        pair = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        cost.operations[Format.BF16] += 2.0 * n * context * heads * pair
        cost.multiply(w_vc[0], n)
        calls = [
            _call(
                mla.mla_decode_attention,
                q,
                w_vc[i % len(w_vc)],
                positions,
                rows,
                tables[i * n : (i + 1) * n],
                cache,
                c.softmax_scale,
                out,
            )
            for i in range(calls_each)
        ]
        return _Case(n, calls, cost, shape=f"context {context}, {heads} heads")

    def mla_prefill(self, n: int) -> _Case:
        c = self.config
        cache, tables = self.cache(1, n)
        heads = c.num_attention_heads
        q = _random(n * heads, c.qk_head_dim).view(n, heads, c.qk_head_dim)
        out = torch.empty((n, heads * c.v_head_dim), dtype=torch.bfloat16)
        segments = torch.tensor([[0, n, 0, 0]], dtype=torch.int32)
        cost = Cost(float(2 * n * latent_row(c)))
        pair = c.qk_head_dim + c.v_head_dim
        cost.operations[Format.BF16] += 2.0 * heads * pair * n * (n + 1) / 2
        cost.multiply(self.kv_b[0], n)
        calls = [
            _call(
                mla.mla_prefill_attention,
                q,
                w,
                segments,
                tables,
                cache,
                c.kv_lora_rank,
                c.qk_rope_head_dim,
                c.v_head_dim,
                c.softmax_scale,
                out,
            )
            for w in self.in_turn(self.kv_b, n)
        ]
        return _Case(n, calls, cost, captured=False)


COMMON_OPS: Sequence[tuple[str, _Plan[_CommonOps]]] = (
    ("load_step", _Plan(_CommonOps.load_step, "decode")),
    ("embedding", _Plan(_CommonOps.embedding, "all")),
    ("rms_norm", _Plan(_CommonOps.rms_norm, "all")),
    ("add_rms_norm", _Plan(_CommonOps.add_rms_norm, "all")),
    ("route_sigmoid", _Plan(_CommonOps.route_sigmoid, "all")),
    ("route_softmax", _Plan(_CommonOps.route_softmax, "all")),
    ("logits", _Plan(_CommonOps.logits, "decode")),
    ("greedy", _Plan(_CommonOps.greedy, "decode")),
    ("restrict", _Plan(_CommonOps.restrict, "decode")),
    ("add_bias", _Plan(_CommonOps.add_bias, "decode")),
    ("penalize", _Plan(_CommonOps.penalize, "decode")),
    ("sample", _Plan(_CommonOps.sample, "decode")),
    ("logprobs", _Plan(_CommonOps.logprobs, "decode")),
)
"""Ops measured once a tier."""

SCHEME_OPS: Sequence[tuple[str, _Plan[_SchemeOps]]] = (
    ("mla_input_lora", _Plan(_SchemeOps.mla_input_lora, "all")),
    ("mla_input_direct", _Plan(_SchemeOps.mla_input_direct, "all")),
    ("mla_decode_attention", _Plan(_SchemeOps.mla_decode, "decode")),
    ("mla_decode_attention", _Plan(_SchemeOps.mla_decode_long, "one")),
    ("mla_prefill_attention", _Plan(_SchemeOps.mla_prefill, "prefill")),
    ("linear", _Plan(_SchemeOps.linear, "all")),
    ("heads", _Plan(_SchemeOps.heads, "all")),
    ("mlp", _Plan(_SchemeOps.mlp, "all")),
    ("moe", _Plan(_SchemeOps.moe, "all")),
    ("moe_shared", _Plan(_SchemeOps.moe_shared, "all")),
)
"""Ops measured in each scheme and tier."""

_LOADING = "part of loading, which reads files: benchmarks/loading.py and start.py measure it"

NOT_MEASURED: Mapping[str, str] = dict.fromkeys(
    (
        "init_packed",
        "pack_f32",
        "pack_bf16",
        "pack_int8",
        "pack_int8_wide",
        "pack_fp8",
        "quantize_int8",
        "quantize_fp8",
        "dequantize_int8",
        "dequantize_fp8",
        "read_memory",
        "write_memory",
        "touch_memory",
        "memory_placement",
    ),
    _LOADING,
)
"""Ops on tensors that are not part of a step, and why they are left out here."""


def _random(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols).to(torch.bfloat16)


def _call(op: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: op(*arguments)
