"""Is this checkpoint ready to run here? Answered in a second, from headers alone.

`preflight` opens config, tokenizer and safetensors headers, never the weights, and runs CHECKS one
after the other. Each check notes what is wrong and leaves figures for the report; none stops at its
first finding, and a check whose ground is missing (no plan, say) passes over. `ready_to_load` runs
the same checks for whoever goes on to read the weights.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from latentcore.config import EngineConfig, GenerationDefaults, ModelConfig
from latentcore.engine.bandwidth import machine_read_bandwidth
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.native_sampler import NativeSampler
from latentcore.engine.sampler import SampleRow
from latentcore.engine.sampling_params import SamplingParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import (
    CheckpointError,
    ConfigError,
    InsufficientMemoryError,
    LatentcoreError,
    NotReadyError,
    QuantizationError,
    UnsupportedCpuError,
    UnsupportedModelError,
    UserError,
)
from latentcore.layers.step import Buffers, Limits
from latentcore.models import memory
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.dryrun import ContractError, dry_run
from latentcore.models.logits import StepLogits
from latentcore.models.packed_cache import PackState, pack_state
from latentcore.models.resolve import ModelPlan, resolve
from latentcore.models.runner import cache_bytes_per_token, plan_limits
from latentcore.ops import runtime

BATCHES = (1, 8, 32)
"""Batch sizes that bytes a token are reported for."""

_PLENTY = 1 << 60

_VOCAB_SLACK = 0.9
"""Share of the vocabulary that a fitting tokenizer knows at least; the rest is padding."""


@dataclass(frozen=True)
class MemoryFigures:
    """Memory needed, in bytes, beside what there is.

    weights            all packed weights
    loading_peak       most at any time while they are packed
    cache_per_1000     latent cache of 1,000 tokens
    cache              the latent cache as it will be allocated; None where nothing is left for it
    cache_tokens       tokens that it holds
    buffers            working memory of a step; None where there is no cache
    max_model_len      longest sequence that will be accepted
    available          what this process may take now
    """

    weights: int
    loading_peak: int
    cache_per_1000: int
    cache: int | None
    cache_tokens: int | None
    buffers: int | None
    max_model_len: int | None
    available: int


@dataclass(frozen=True)
class MachineFigures:
    """What runs the model: instruction set tier, threads, and bytes a second that they read."""

    tier: str
    threads: int
    read_bandwidth: float


@dataclass
class Report:
    """What `preflight` found. Figures are None where a problem kept them from being known.

    `schemes` lists runs of equal layers: "0-2" to each weight's scheme, or `stored -> run`.
    `weight_bytes_per_token` is by batch size, for a decode step's weights divided by the batch.
    `steps` names the kinds of step that the model's code was driven through. `tier` is None where
    this processor cannot run the native code.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    model_type: str | None = None
    summary: str | None = None
    tensors: int | None = None
    shards: int | None = None
    schemes: dict[str, dict[str, str]] = field(default_factory=dict)
    parameters: int | None = None
    active_parameters: int | None = None
    memory: MemoryFigures | None = None
    packed: PackState | None = None
    weight_bytes_per_token: dict[int, float] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    tier: str | None = None
    machine: MachineFigures | None = None
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether the model can be run here as asked."""
        return not self.problems

    def tokens_per_second(self) -> dict[int, float]:
        """By batch size: decoded tokens a second, all sequences together, if reading weights were
        all there is to do. Empty where bandwidth or weights are not known."""
        if self.machine is None:
            return {}
        bandwidth = self.machine.read_bandwidth
        return {batch: bandwidth / each for batch, each in self.weight_bytes_per_token.items()}


@dataclass
class Inspection:
    """What the checks pass on to each other. `report` is what comes out; `errors` are the problems
    as whoever wants to load the model raises them."""

    folder: Path
    engine: EngineConfig
    report: Report
    config: ModelConfig | None = None
    defaults: GenerationDefaults | None = None
    checkpoint: Checkpoint | None = None
    plan: ModelPlan | None = None
    limits: Limits | None = None
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    errors: list[LatentcoreError] = field(default_factory=list)

    def problem(self, error: LatentcoreError) -> None:
        """Notes why the model is not ready: everything that the error lists."""
        self.errors.append(error)
        if isinstance(error, ConfigError | CheckpointError):
            self.report.problems += error.problems
        else:
            self.report.problems.append(str(error))


@dataclass(frozen=True)
class Ready:
    """What the checks leave of a model that can be loaded. `checkpoint` is open; `seconds` is how
    long the checks took."""

    config: ModelConfig
    defaults: GenerationDefaults
    checkpoint: Checkpoint
    plan: ModelPlan
    limits: Limits
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    seconds: float


def preflight(folder: Path, engine: EngineConfig) -> Report:
    """Checks whether the checkpoint in `folder` can be run with `engine`, reading no weight.

    Raises UnsupportedModelError where there is nothing to check: no folder, no config, or another
    architecture. Everything else is in the report.
    """
    with _inspected(folder, engine) as inspection:
        if inspection.plan is not None and inspection.checkpoint is not None:
            inspection.report.packed = pack_state(inspection.plan, inspection.checkpoint)
        return inspection.report


@contextmanager
def ready_to_load(folder: Path, engine: EngineConfig) -> Iterator[Ready]:
    """Runs the checks of `preflight`; the checkpoint is closed at the end of the block.

    Raises what the one check that failed found (a UserError, or ContractError where latentcore
    itself is at fault), or NotReadyError with every problem where several failed.
    """
    with _inspected(folder, engine) as found:
        if len(found.errors) == 1:
            raise found.errors[0]
        if found.errors:
            raise NotReadyError(found.report.problems, where=str(folder))
        assert found.config and found.defaults and found.checkpoint and found.plan and found.limits
        yield Ready(
            found.config,
            found.defaults,
            found.checkpoint,
            found.plan,
            found.limits,
            found.tokenizer,
            found.chat_template,
            found.report.seconds,
        )


@contextmanager
def _inspected(folder: Path, engine: EngineConfig) -> Iterator[Inspection]:
    start = time.perf_counter()
    inspection = Inspection(folder, engine, Report(folder))
    try:
        for check in CHECKS:
            check(inspection)
        inspection.report.seconds = time.perf_counter() - start
        yield inspection
    finally:
        if inspection.checkpoint is not None:
            inspection.checkpoint.close()


def measure_machine(engine: EngineConfig) -> MachineFigures:
    """The tier, the threads to be used, and their read bandwidth.

    The bandwidth is measured the first time, then remembered.
    """
    tier = runtime.isa_tier()
    before = runtime.num_threads()
    runtime.set_threads(engine.threads or runtime.default_threads())
    try:
        return MachineFigures(tier, runtime.num_threads(), machine_read_bandwidth())
    finally:
        runtime.set_threads(before)


# ---------------------------------------------------------------------------------------------
# The checks, in order


def check_cpu(inspection: Inspection) -> None:
    """This processor, LATENTCORE_FORCE_ISA, and more threads than cores."""
    try:
        inspection.report.tier = runtime.isa_tier()
    except UnsupportedCpuError as error:
        inspection.problem(error)
    told = runtime.topology().oversubscribed(inspection.engine.threads or 1)
    if told is not None:
        inspection.report.warnings.append(told)


def check_config(inspection: Inspection) -> None:
    """config.json and generation_config.json."""
    report = inspection.report
    try:
        config = ModelConfig.from_dir(inspection.folder)
    except UnsupportedModelError:
        raise
    except ConfigError as error:
        inspection.problem(error)
        return
    try:
        inspection.defaults = GenerationDefaults.from_dir(inspection.folder, config.vocab_size)
    except ConfigError as error:
        inspection.problem(error)
    inspection.config = config
    report.model_type = config.model_type
    report.summary = _summary(config)


def check_headers(inspection: Inspection) -> None:
    """The index and every safetensors header."""
    try:
        inspection.checkpoint = Checkpoint.open(inspection.folder)
    except CheckpointError as error:
        inspection.problem(error)
        return
    inspection.report.tensors = len(inspection.checkpoint.tensors)
    inspection.report.shards = len(inspection.checkpoint.shards)


def check_tensors(inspection: Inspection) -> None:
    """Every tensor has its place, and every place its tensor, in a scheme that can be run."""
    config, checkpoint, report = inspection.config, inspection.checkpoint, inspection.report
    if config is None or checkpoint is None:
        return
    try:
        plan = resolve(config, checkpoint, inspection.engine.quantization)
    except (CheckpointError, QuantizationError) as error:
        inspection.problem(error)
        return
    inspection.plan = plan
    report.warnings += plan.warnings
    report.schemes = dict(_scheme_runs(plan))
    report.parameters = plan.parameters()
    report.active_parameters = plan.active_parameters()
    report.weight_bytes_per_token = {b: plan.weight_bytes_per_token(b) for b in BATCHES}


def check_tokenizer(inspection: Inspection) -> None:
    """The tokenizer and its chat template can be read, and its vocabulary is the model's. No
    tokenizer at all is a warning."""
    try:
        tokenizer = Tokenizer.load(inspection.folder)
        inspection.chat_template = ChatTemplate.of(tokenizer) if tokenizer is not None else None
    except UserError as error:
        inspection.problem(error)
        return
    inspection.tokenizer = tokenizer
    if tokenizer is None:
        inspection.report.warnings.append("no tokenizer: the model takes and gives token ids alone")
        return
    if inspection.config is None:
        return
    known, vocab = tokenizer.vocab_size, inspection.config.vocab_size
    if known > vocab:
        text = f"vocab_size: expected at least the tokenizer's {known} tokens, found {vocab}"
        inspection.problem(ConfigError(text))
    elif known < _VOCAB_SLACK * vocab:
        inspection.report.warnings.append(
            f"the tokenizer knows {known} tokens of the model's {vocab}; is it this model's own?"
        )


def check_memory(inspection: Inspection) -> None:
    """Weights, cache and buffers fit into what is free."""
    config, plan, engine = inspection.config, inspection.plan, inspection.engine
    if config is None or plan is None:
        return
    available = memory.available_memory()
    weights, peak = plan.packed_nbytes(), plan.peak_nbytes()
    per_token = cache_bytes_per_token(config)
    limits: Limits | None = None
    try:
        memory.require_memory(peak, "the model's weights")
        limits = plan_limits(config, engine, available - weights)
    except InsufficientMemoryError as error:
        inspection.problem(error)
    inspection.limits = limits
    cache_tokens = limits.num_blocks * limits.block_size if limits else None
    inspection.report.memory = MemoryFigures(
        weights=weights,
        loading_peak=peak,
        cache_per_1000=1000 * per_token,
        cache=cache_tokens * per_token if cache_tokens is not None else None,
        cache_tokens=cache_tokens,
        buffers=Buffers(config, limits, torch.device("meta")).nbytes if limits else None,
        max_model_len=limits.max_position if limits else None,
        available=available,
    )


def check_model_code(inspection: Inspection) -> None:
    """The model's own code, on tensors without memory, meets every op's checks.

    Without a tier there are no ops to meet, as `check_cpu` has said.
    """
    config, plan, engine = inspection.config, inspection.plan, inspection.engine
    if config is None or plan is None or inspection.report.tier is None:
        return
    # Where this machine has too little memory the shapes are checked all the same.
    plenty = replace(engine, kv_cache_memory_bytes=None)
    limits = inspection.limits or plan_limits(config, plenty, _PLENTY)
    try:
        inspection.report.steps = dry_run(plan, engine, limits)
    except ContractError as error:
        inspection.problem(error)


def check_sampler(inspection: Inspection) -> None:
    """Every op of the sampler takes what it is handed: a token is drawn from made-up logits, with
    every parameter in use."""
    config = inspection.config
    if config is None or inspection.report.tier is None:
        return
    vocab = config.vocab_size
    values = torch.linspace(-4.0, 4.0, vocab).repeat(2, 1)
    logits = StepLogits(values, torch.full((2,), vocab - 1, dtype=torch.int32))
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=1,
    )
    everything = torch.full((1, -(-vocab // 32)), -1, dtype=torch.int32)
    rows = [
        SampleRow(
            params, seed=1, token_ids=[0, vocab - 1], num_prompt_tokens=1, allowed=everything
        ),
        SampleRow(SamplingParams(temperature=0.0), seed=2, token_ids=[0], num_prompt_tokens=1),
    ]
    try:
        NativeSampler(vocab).sample(logits, rows)
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        inspection.problem(ContractError(f"the sampler and an op disagree: {message}"))


Check = Callable[[Inspection], None]

CHECKS: tuple[Check, ...] = (
    check_cpu,
    check_config,
    check_headers,
    check_tensors,
    check_tokenizer,
    check_memory,
    check_model_code,
    check_sampler,
)
"""What `preflight` runs. Later checks may use what earlier ones left in the Inspection."""


# ---------------------------------------------------------------------------------------------
# Texts


def _summary(config: ModelConfig) -> str:
    """The architecture in a line."""
    layers = config.num_hidden_layers
    dense = sum(not config.is_moe_layer(i) for i in range(layers))
    parts = [f"{layers} layers" + (f" ({dense} dense)" if dense < layers else "")]
    parts.append(f"hidden {config.hidden_size}, {config.num_attention_heads} heads")
    if config.n_routed_experts:
        experts = f"{config.n_routed_experts} experts"
        if config.n_shared_experts:
            experts += f" + {config.n_shared_experts} shared"
        parts.append(f"{experts}, {config.num_experts_per_tok} a token")
    parts.append(f"vocabulary {config.vocab_size}")
    return ", ".join(parts)


def _scheme_runs(plan: ModelPlan) -> Iterator[tuple[str, dict[str, str]]]:
    """Consecutive layers with the same schemes: ("0-2", {role: scheme})."""
    first = 0
    current = plan.schemes(0)
    for index in range(1, len(plan.layers) + 1):
        following = plan.schemes(index) if index < len(plan.layers) else None
        if following != current:
            name = str(first) if first == index - 1 else f"{first}-{index - 1}"
            yield name, current
            first = index
            if following is not None:
                current = following
