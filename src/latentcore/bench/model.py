"""Decode and prefill of a whole model: times, and shares of what the machine allows.

The *roofline share* of a step is (least possible time) / (measured time). The least time is the
larger of bytes / read bandwidth and arithmetic / peak, both measured by the same threads right
before and after the case, and the bandwidth before and after each repeat of decoding, the higher
counting: what a host allows changes within seconds where others use it. Bytes are those of the
packed weights that the step touches, the experts that its rows chose counted, and of the latents
that it reads. Each repeat computes other tokens, so that a cache larger than a step does not serve
the same experts again.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentcore.bench.machine import (
    Ceilings,
    Disturbance,
    Machine,
    describe_machine,
    measure_bandwidth,
    measure_ceilings,
    watched,
)
from latentcore.bench.timing import Spread
from latentcore.config import EngineConfig
from latentcore.errors import ConfigError
from latentcore.models.chunk import SequenceChunk
from latentcore.models.cost import Cost, StepCost
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime, storage

WARM_UP = 2
"""Steps before those that count."""

Note = Callable[[str, int, int], None]
"""Called with what is being measured now, how many measurements of it are done, and of how many."""


@dataclass(frozen=True)
class DecodeCase:
    """One token for each of `batch` sequences that hold `context` tokens already."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        """What to call it."""
        return f"decode {self.batch} x {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens that a step computes."""
        return self.batch


@dataclass(frozen=True)
class PrefillCase:
    """A prompt of `tokens` tokens, in as many steps as the engine's largest batch calls for."""

    tokens: int

    @property
    def name(self) -> str:
        """What to call it."""
        return f"prefill {self.tokens}"


Case = DecodeCase | PrefillCase


@dataclass(frozen=True)
class KernelShare:
    """One kernel's part of a step: seconds, medians over the repeats.

    runs      how often it runs in a step
    seconds   from start to end, the barrier behind it included
    own       time that a thread worked, the mean over threads
    slowest   time of the slowest thread, added over the stretches between barriers
    share     roofline share; None where nothing is counted for this kernel
    """

    kernel: str
    runs: int
    seconds: float
    own: float
    slowest: float
    share: float | None

    @property
    def imbalance(self) -> float:
        """Slowest thread over mean."""
        return self.slowest / self.own


@dataclass(frozen=True)
class Fabric:
    """What a step loses between and beside kernels.

    overhead   share of the step's time that is not the kernels' own (mean over threads, waiting
               excluded)
    imbalance  slowest thread over mean, added over the step
    kernels    by kernel, the longest first
    """

    overhead: float
    imbalance: float
    kernels: tuple[KernelShare, ...]


@dataclass(frozen=True)
class CaseResult:
    """One case: seconds a step (a prompt), tokens a second, roofline share.

    limit     what the least time is: `memory` or `arithmetic`
    experts   distinct experts that a MoE layer touched, the mean over layers and repeats
    nbytes    least bytes of a step, the median
    ceilings  what the machine allowed around this case; where it decodes, the median of the
              bandwidths beside its repeats, of which each counts with its own
    """

    case: str
    tokens: int
    seconds: Spread
    tokens_per_second: float
    share: float
    limit: str
    experts: float | None
    nbytes: float
    ceilings: Ceilings
    fabric: Fabric


@dataclass(frozen=True)
class ModelResult:
    """Everything that one run found.

    load_seconds   how long each part of loading took, measured once
    placement      where the weights lie, beside the threads that own them
    ceilings       the highest that were measured, between all cases
    """

    model: str
    format: str
    load_seconds: dict[str, float]
    placement: storage.Placement
    machine: Machine
    ceilings: Ceilings
    disturbance: Disturbance
    repeats: int
    results: tuple[CaseResult, ...]


@dataclass
class _Sample:
    """A measured repeat of a case, before the ceilings are known.

    bandwidth  what was read right before or after it, the higher; None where it is the case's
    """

    seconds: float
    regions: list[runtime.Region]
    cost: StepCost
    bandwidth: float | None

    def ceilings(self, case: Ceilings) -> Ceilings:
        """What the machine allowed around this repeat."""
        return case if self.bandwidth is None else Ceilings(self.bandwidth, case.peaks)


def engine_config(
    cases: Sequence[Case], quantization: str, threads: int | None, *, use_graph: bool
) -> EngineConfig:
    """How to load a model that these cases fit."""
    decode = [case for case in cases if isinstance(case, DecodeCase)]
    lengths = [case.context + 1 for case in decode]
    lengths += [case.tokens for case in cases if isinstance(case, PrefillCase)]
    seqs = max((case.batch for case in decode), default=1)
    return EngineConfig(
        quantization=quantization,
        threads=threads,
        max_model_len=max(lengths),
        max_num_seqs=seqs,
        max_num_batched_tokens=max(EngineConfig.max_num_batched_tokens, seqs),
        use_graph=use_graph,
    )


def bench_model(
    runner: ModelRunner, name: str, cases: Sequence[Case], repeats: int, note: Note
) -> ModelResult:
    """Measures the cases one after the other, and ceilings before and after each.

    Raises ConfigError, before anything is measured, for a case that the runner cannot hold.
    """
    check_cases(runner, cases)
    machine, formats, placement = describe_machine(), runner.format_bytes, runner.placement()
    results: list[CaseResult] = []
    with watched() as disturbance:
        note("read bandwidth and arithmetic peaks", 0, 1)
        before = best = measure_ceilings(formats)
        for case in cases:
            samples = _measure(runner, case, repeats, note)
            note(f"read bandwidth and arithmetic peaks, after {case.name}", 0, 1)
            after = measure_ceilings(formats)
            around = before.best(after)
            results.append(_result(case, samples, around))
            best = best.best(after)
            for sample in samples:
                best = best.best(sample.ceilings(around))
            before = after
    main = max(formats, key=lambda fmt: formats[fmt])
    return ModelResult(
        model=name,
        format=main.name,
        load_seconds=runner.load_seconds,
        placement=placement,
        machine=machine,
        ceilings=best,
        disturbance=disturbance,
        repeats=repeats,
        results=tuple(results),
    )


def check_cases(runner: ModelRunner, cases: Sequence[Case]) -> None:
    """Raises ConfigError where the runner cannot hold a case."""
    limits = runner.limits
    for case in cases:
        batch, length = (
            (case.batch, case.context + 1) if isinstance(case, DecodeCase) else (1, case.tokens)
        )
        blocks = batch * -(-length // limits.block_size)
        for what, found, most in (
            ("sequences at once", batch, limits.max_seqs),
            ("tokens in a sequence", length, limits.max_position),
            ("cache blocks", blocks, limits.num_blocks),
        ):
            if found > most:
                raise ConfigError(f"{case.name}: {found} {what}, this model's limit here is {most}")


Steps = list[list[SequenceChunk]]
"""The chunks of each step."""


def _measure(runner: ModelRunner, case: Case, repeats: int, note: Note) -> list[_Sample]:
    """Times the case `repeats` times. Costs are counted before, so as not to come between."""
    note(case.name, 0, repeats)
    if isinstance(case, DecodeCase):
        _fill(runner, case)
    counted = [_prepare(runner, case) for _ in range(repeats)]
    costs = [_cost(runner, steps) for steps in counted]
    for _ in range(WARM_UP - 1):
        _run(runner, _prepare(runner, case))
    decoding = isinstance(case, DecodeCase)
    samples = []
    before = measure_bandwidth() if decoding else None
    for done, (steps, cost) in enumerate(zip(counted, costs, strict=True)):
        note(case.name, done, repeats)
        if decoding or done == 0:  # a step follows a step, as it does where it counts
            _run(runner, _prepare(runner, case))
        with runtime.profiled() as regions:
            start = time.perf_counter()
            _run(runner, steps)
            seconds = time.perf_counter() - start
        bandwidth = None
        if before is not None:
            after = measure_bandwidth()
            before, bandwidth = after, max(before, after)
        samples.append(_Sample(seconds, regions, cost, bandwidth))
    return samples


def _random_ids(runner: ModelRunner, count: int) -> list[int]:
    ids: list[int] = torch.randint(0, runner.config.vocab_size, (count,)).tolist()
    return ids


def _tables(runner: ModelRunner, case: DecodeCase) -> list[list[int]]:
    each = -(-(case.context + 1) // runner.block_size)
    return [list(range(i * each, (i + 1) * each)) for i in range(case.batch)]


def _prepare(runner: ModelRunner, case: Case) -> Steps:
    """The steps of one repeat, with tokens of its own."""
    if isinstance(case, DecodeCase):
        ids = _random_ids(runner, case.batch)
        tables = _tables(runner, case)
        return [
            [
                SequenceChunk([token], case.context, table, "decode", "last")
                for token, table in zip(ids, tables, strict=True)
            ]
        ]
    table = list(range(-(-case.tokens // runner.block_size)))
    return _prompt(runner, case.tokens, table)


def _prompt(runner: ModelRunner, tokens: int, table: list[int]) -> Steps:
    """A prompt in chunks of the largest batch; logits for the last token alone."""
    path = runner.choose_path(tokens, tokens)
    steps: Steps = []
    for start in range(0, tokens, runner.max_num_batched_tokens):
        count = min(runner.max_num_batched_tokens, tokens - start)
        last = start + count == tokens
        ids = _random_ids(runner, count)
        steps.append([SequenceChunk(ids, start, table, path, "last" if last else "none")])
    return steps


def _fill(runner: ModelRunner, case: DecodeCase) -> None:
    """Computes every sequence's context, so that the cache holds what a model would put there."""
    for table in _tables(runner, case):
        _run(runner, _prompt(runner, case.context, table))


def _run(runner: ModelRunner, steps: Steps) -> None:
    for chunks in steps:
        runner.forward(chunks)


def _cost(runner: ModelRunner, steps: Steps) -> StepCost:
    """The costs of all steps as of one: weights that each of them reads count each time."""
    kernels: defaultdict[str, Cost] = defaultdict(Cost)
    experts: list[int] = []
    for chunks in steps:
        cost = runner.cost(chunks)
        experts += cost.experts
        for kernel, part in cost.kernels.items():
            kernels[kernel] += part
    return StepCost(kernels, tuple(experts))


def _result(
    case: Case,
    samples: Sequence[_Sample],
    around: Ceilings,
) -> CaseResult:
    costs = [sample.cost for sample in samples]
    totals = [cost.total for cost in costs]
    ceilings = [sample.ceilings(around) for sample in samples]
    least = [c.least_seconds(total) for c, total in zip(ceilings, totals, strict=True)]
    shares = [bound / s.seconds for bound, s in zip(least, samples, strict=True)]
    reading = [t.nbytes / c.read_bandwidth for c, t in zip(ceilings, totals, strict=True)]
    bandwidth = Spread.of([c.read_bandwidth for c in ceilings]).median
    experts = [count for cost in costs for count in cost.experts]
    seconds = Spread.of([sample.seconds for sample in samples])
    return CaseResult(
        case=case.name,
        tokens=case.tokens,
        seconds=seconds,
        tokens_per_second=case.tokens / seconds.median,
        share=Spread.of(shares).median,
        limit="memory" if reading == least else "arithmetic",
        experts=sum(experts) / len(experts) if experts else None,
        nbytes=Spread.of([total.nbytes for total in totals]).median,
        ceilings=Ceilings(bandwidth, around.peaks),
        fabric=_fabric(samples, ceilings),
    )


def _fabric(samples: Sequence[_Sample], ceilings: Sequence[Ceilings]) -> Fabric:
    """Medians over the repeats, each figure for itself."""
    overheads: list[float] = []
    imbalances: list[float] = []
    kernels: defaultdict[str, list[list[runtime.KernelRun]]] = defaultdict(list)
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for sample, allowed in zip(samples, ceilings, strict=True):
        runs = [run for region in sample.regions for run in region.kernels]
        own = sum(run.own for run in runs)
        overheads.append(1 - own / sample.seconds)
        imbalances.append(sum(run.slowest for run in runs) / own)
        for name in dict.fromkeys(run.kernel for run in runs):
            mine = [run for run in runs if run.kernel == name]
            kernels[name].append(mine)
            if name in sample.cost.kernels:
                least = allowed.least_seconds(sample.cost.kernels[name])
                shares[name].append(least / sum(run.seconds for run in mine))

    def median(
        of: Callable[[runtime.KernelRun], float], repeats: list[list[runtime.KernelRun]]
    ) -> float:
        return Spread.of([sum(map(of, runs)) for runs in repeats]).median

    found = [
        KernelShare(
            kernel=name,
            runs=len(repeats[0]),
            seconds=median(lambda run: run.seconds, repeats),
            own=median(lambda run: run.own, repeats),
            slowest=median(lambda run: run.slowest, repeats),
            share=Spread.of(shares[name]).median if name in shares else None,
        )
        for name, repeats in kernels.items()
    ]
    found.sort(key=lambda kernel: -kernel.seconds)
    return Fabric(Spread.of(overheads).median, Spread.of(imbalances).median, tuple(found))
