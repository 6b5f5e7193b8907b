"""Roofline share of every op of a decoder step, by scheme, tier and number of rows.

Ops run on random weights of a model's shapes. Each is given so many copies of its weights that
together they are twice the last-level caches, and is timed over all copies in turn, in one replayed
graph where it can be captured. Experts are drawn at random and counted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from latentcore.ops import dense, mla, moe, runtime
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.schemes import SCHEMES

DECODE_ROWS = (1, 8, 32)
"""Batch sizes; every row is a sequence of its own."""

PREFILL_ROWS = (512, 2048)
"""Prompts, of one sequence."""

CONTEXT = 2048
"""Tokens that each sequence holds when decode attention is measured."""

CASES = len(DECODE_ROWS) * 7 + len(PREFILL_ROWS) * 6
"""Ops measured for a scheme in a tier, each at every number of rows."""

T = TypeVar("T")

_BLOCK = 64
_EXPERT_SETS = 8
_MOST_COPIES = 1024
_WARM_UP = 1
_LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class KernelResult:
    """One op: seconds a call, and its roofline share."""

    op: str
    scheme: str
    tier: str
    rows: int
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

    op: str
    rows: int
    calls: Sequence[Callable[[], None]]
    cost: Cost
    captured: bool = True


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
    with watched() as disturbance:
        for tier in tiers:
            with runtime.forced_tier(tier):
                note(f"read bandwidth and arithmetic peaks, {tier}", 0, 1)
                ceilings[tier] = measure_ceilings(Format)
        for name in schemes:
            note(f"{name}: packing weights", 0, 1)
            ops = _Ops(config, SCHEMES[name])
            for tier in tiers:
                with runtime.forced_tier(tier):
                    for done, case in enumerate(ops.cases()):
                        note(f"{name}, {tier}", done, CASES)
                        results.append(_measure(case, name, tier, ceilings[tier], repeats))
    return KernelsResult(describe_machine(), ceilings, disturbance, repeats, tuple(results))


def _measure(case: _Case, scheme: str, tier: str, ceilings: Ceilings, repeats: int) -> KernelResult:
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
        op=case.op,
        scheme=scheme,
        tier=tier,
        rows=case.rows,
        seconds=seconds,
        bytes_per_second=case.cost.nbytes / seconds.median,
        operations_per_second=sum(case.cost.operations.values()) / seconds.median,
        share=least / seconds.median,
        limit="memory" if least == case.cost.nbytes / ceilings.read_bandwidth else "arithmetic",
    )


class _Ops:
    """The ops of one scheme, with their weights and buffers."""

    def __init__(self, config: ModelConfig, scheme: QuantScheme) -> None:
        self.config = c = config
        self.scheme = scheme
        self.spill = 2 * runtime.last_level_cache()
        h, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
        assert c.q_lora_rank is not None
        self.q_a = self.linear(c.q_lora_rank, h)
        self.q_b = self.linear(heads * c.qk_head_dim, c.q_lora_rank)
        self.kv_a = self.linear(c.latent_dim, h)
        self.kv_b = self.linear(heads * (c.qk_nope_head_dim + c.v_head_dim), rank)
        self.heads = self.head_halves()
        self.o = self.linear(h, heads * c.v_head_dim)
        self.dense = self.mlp(1, c.intermediate_size)
        self.experts = self.mlp(c.n_routed_experts, c.moe_intermediate_size)[0]
        shared = max(1, c.n_shared_experts) * c.moe_intermediate_size
        self.shared = self.mlp(1, shared)
        self.router = self.plain(c.n_routed_experts, h)
        self.lm_head = self.plain(c.vocab_size, h)

    # Weights: lists of copies that exceed the caches together

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes it takes."""
        return min(max(1, -(-self.spill // nbytes)), _MOST_COPIES)

    def linear(self, rows: int, cols: int) -> list[PackedWeight]:
        return self.packed(self.scheme, 1, 1, rows, cols)

    def plain(self, rows: int, cols: int) -> list[PackedWeight]:
        return self.packed(SCHEMES["bf16"], 1, 1, rows, cols)

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

    def mlp(self, batch: int, width: int) -> list[tuple[PackedWeight, PackedWeight]]:
        h = self.config.hidden_size
        gate_up = self.packed(self.scheme, batch, 2, width, h)
        down = self.packed(self.scheme, batch, 1, h, width)
        return list(zip(gate_up, down, strict=False))

    def head_halves(self) -> list[tuple[PackedWeight, PackedWeight]]:
        c = self.config
        heads, nope, v, rank = (
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.v_head_dim,
            c.kv_lora_rank,
        )
        stored = self.scheme.quantize(_random(heads * (nope + v), rank))
        fmt = self.scheme.kv_b_format
        halves: list[tuple[PackedWeight, PackedWeight]] = []
        while not halves or len(halves) < self.copies(halves[0][0].nbytes + halves[0][1].nbytes):
            w_kc = PackedWeight.allocate(fmt, heads, 1, rank, nope)
            w_vc = PackedWeight.allocate(fmt, heads, 1, v, rank)
            self.scheme.pack_kv_b(w_kc, w_vc, stored, nope, v)
            halves.append((w_kc, w_vc))
        return halves

    def in_turn(self, weights: Sequence[T], n: int) -> Sequence[T]:
        """The copies to use for `n` rows: one where reading it is little beside the arithmetic."""
        return weights if n < PREFILL_ROWS[0] else weights[:1]

    # Cases

    def cases(self) -> Iterator[_Case]:
        """Every op at every number of rows."""
        for rows in DECODE_ROWS:
            yield self.mla_input(rows, absorbed=True)
            yield self.mla_decode(rows)
            yield from self.matrices(rows)
            yield self.logits(rows)
        for rows in PREFILL_ROWS:
            yield self.mla_input(rows, absorbed=False)
            yield self.mla_prefill(rows)
            yield from self.matrices(rows)

    def matrices(self, n: int) -> Iterator[_Case]:
        """The ops that decode and prefill share."""
        c, h = self.config, self.config.hidden_size
        x, out = _random(n, h), torch.empty((n, h), dtype=torch.bfloat16)
        attended = _random(n, c.num_attention_heads * c.v_head_dim)
        cost = Cost()
        cost.multiply(self.o[0], n)
        yield _Case(
            "linear",
            n,
            [_call(dense.linear, attended, w, out) for w in self.in_turn(self.o, n)],
            cost,
        )
        cost = Cost()
        for w in self.dense[0]:
            cost.multiply(w, n)
        yield _Case(
            "mlp", n, [_call(dense.mlp, x, *w, out) for w in self.in_turn(self.dense, n)], cost
        )
        yield self.route(n, x)
        yield self.moe(n, x, out)

    def route(self, n: int, x: torch.Tensor) -> _Case:
        r = self.config.router
        ids = torch.empty((n, r.top_k), dtype=torch.int32)
        weights = torch.empty((n, r.top_k), dtype=torch.float32)
        bias = torch.zeros(self.config.n_routed_experts)
        choice = (r.n_group, r.topk_group, r.top_k, r.norm_topk_prob, r.routed_scaling_factor)
        cost = Cost()
        cost.multiply(self.router[0], n)
        calls = [
            _call(moe.route_sigmoid, x, w, bias, *choice, ids, weights)
            for w in self.in_turn(self.router, n)
        ]
        return _Case("route", n, calls, cost)

    def moe(self, n: int, x: torch.Tensor, out: torch.Tensor) -> _Case:
        c = self.config
        count, k = c.n_routed_experts, c.num_experts_per_tok
        sets = [
            torch.stack([torch.randperm(count)[:k] for _ in range(n)]).int()
            for _ in range(_EXPERT_SETS if n < count else 1)
        ]
        weights = torch.rand(n, k)
        gate_up, down = self.experts
        touched = sum(len(set(ids.flatten().tolist())) for ids in sets) / len(sets)
        cost = Cost(touched * (gate_up.item_nbytes + down.item_nbytes))
        per_row = 2 * gate_up.rows * gate_up.cols + down.rows * down.cols
        cost.operations[gate_up.format] += 2.0 * n * k * per_row
        for w in self.shared[0]:
            cost.multiply(w, n)
        calls = [
            _call(
                moe.moe_shared,
                x,
                ids,
                weights,
                gate_up,
                down,
                *self.shared[i % len(self.shared)],
                out,
            )
            for i, ids in enumerate(sets)
        ]
        return _Case("moe_shared", n, calls, cost)

    def logits(self, n: int) -> _Case:
        x = _random(n, self.config.hidden_size)
        out = torch.empty((n, self.config.vocab_size))
        cost = Cost()
        cost.multiply(self.lm_head[0], n)
        return _Case("logits", n, [_call(dense.logits, x, w, out) for w in self.lm_head], cost)

    def cache(self, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of so many sequences, bf16, and the block tables that lead to them."""
        each = -(-tokens // _BLOCK)
        cache = _random(sequences * each * _BLOCK, latent_row(self.config))
        tables = torch.arange(sequences * each, dtype=torch.int32).view(sequences, each)
        return cache.view(-1, _BLOCK, cache.shape[1]), tables

    def mla_input(self, n: int, *, absorbed: bool) -> _Case:
        c = self.config
        sequences, tokens = (n, CONTEXT + 1) if absorbed else (1, n)
        cache, tables = self.cache(sequences, tokens)
        assert c.q_lora_rank is not None
        table = rope_table(c.rope, tokens)
        row_seq = torch.arange(n).int() if absorbed else torch.zeros(n).int()
        positions = torch.full((n,), CONTEXT).int() if absorbed else torch.arange(n).int()
        q = torch.empty((n, c.num_attention_heads, c.qk_head_dim), dtype=torch.bfloat16)
        q_latent = torch.empty((n, c.num_attention_heads, latent_row(c)), dtype=torch.bfloat16)
        x, cost = _random(n, c.hidden_size), Cost()
        for w in (self.q_a[0], self.q_b[0], self.kv_a[0]):
            cost.multiply(w, n)
        if absorbed:
            cost.multiply(self.heads[0][0], n)
        rounds = max(len(self.in_turn(w, n)) for w in (self.q_a, self.q_b, self.kv_a))
        calls = [
            _call(
                mla.mla_input_lora,
                x,
                self.q_a[i % len(self.q_a)],
                torch.ones(c.q_lora_rank),
                self.q_b[i % len(self.q_b)],
                self.kv_a[i % len(self.kv_a)],
                torch.ones(c.kv_lora_rank),
                self.heads[i % len(self.heads)][0],
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
        return _Case("mla_input_lora", n, calls, cost)

    def mla_decode(self, n: int) -> _Case:
        c = self.config
        row_bytes = 2 * latent_row(c)
        # Each call reads other sequences, so that their latents come from memory.
        calls_each = self.copies(n * CONTEXT * row_bytes)
        cache, tables = self.cache(n * calls_each, CONTEXT)
        q = _random(n * c.num_attention_heads, latent_row(c)).view(n, -1, latent_row(c))
        out = torch.empty((n, c.num_attention_heads * c.v_head_dim), dtype=torch.bfloat16)
        positions = torch.full((n,), CONTEXT - 1).int()
        rows = torch.arange(n).int()
        cost = Cost(float(n * CONTEXT * row_bytes))
        pair = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        cost.operations[Format.BF16] += 2.0 * n * CONTEXT * c.num_attention_heads * pair
        cost.multiply(self.heads[0][1], n)
        calls = [
            _call(
                mla.mla_decode_attention,
                q,
                self.heads[i % len(self.heads)][1],
                positions,
                rows,
                tables[i * n : (i + 1) * n],
                cache,
                c.softmax_scale,
                out,
            )
            for i in range(calls_each)
        ]
        return _Case("mla_decode_attention", n, calls, cost)

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
        return _Case("mla_prefill_attention", n, calls, cost, captured=False)


def _random(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols).to(torch.bfloat16)


def _call(op: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: op(*arguments)
