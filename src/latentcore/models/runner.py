"""Runs a loaded model: lays out a step's rows, replays graphs, gives logits."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import TypeAlias

import numpy as np
import torch

from latentcore.config import EngineConfig, ModelConfig
from latentcore.errors import InsufficientMemoryError
from latentcore.layers.ffn import Moe
from latentcore.layers.step import Inputs, Limits, Step, latent_row
from latentcore.layers.weights import ModelWeights
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.chunk import Path, SequenceChunk
from latentcore.models.cost import StepCost, step_cost
from latentcore.models.deepseek import DeepseekDecoder
from latentcore.models.loader import load_weights
from latentcore.models.logits import StepLogits
from latentcore.models.memory import available_memory, format_bytes, require_memory
from latentcore.models.parts import buffers_of_model
from latentcore.models.resolve import ModelPlan, resolve
from latentcore.ops import dense, mla, runtime, storage
from latentcore.quant.packed import Format

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Share of the memory left beside the weights that the latent cache takes at most by itself."""

MAX_GRAPH_ROWS = 256
"""Largest decode batch that has a graph: in larger ones, the time between kernels is nothing."""

_NO_SEGMENTS = torch.empty((0, 4), dtype=torch.int32)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of latent cache a token takes in all layers."""
    return config.num_hidden_layers * latent_row(config) * 2


def choose_path(config: ModelConfig, expansion: float, uncached_tokens: int, context: int) -> Path:
    """The cheaper attention for a prompt of `context` tokens of which `uncached_tokens` are new.

    Un-absorbing a token's keys and values costs (nope + v) x kv_lora_rank multiplications a head,
    once for each token of the context, each `expansion` as dear as a bf16 one; absorbing a query
    costs as many for each new token, in bf16. A pair of tokens then costs nope + rope + v, or
    2 x kv_lora_rank + rope.
    """
    expand = (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    pairs = uncached_tokens * (context - (uncached_tokens - 1) / 2)
    unabsorbed = context * expand * expansion + pairs * (config.qk_head_dim + config.v_head_dim)
    absorbed = uncached_tokens * expand + pairs * (
        2 * config.kv_lora_rank + config.qk_rope_head_dim
    )
    return "prefill" if unabsorbed <= absorbed else "decode"


def expansion_cost(weights: ModelWeights) -> float:
    """What a multiplication by `kv_b_proj` costs beside a bf16 one: half with int8 weights."""
    costs = [0.5 if layer.attention.kv_b.format is Format.INT8 else 1.0 for layer in weights.layers]
    return sum(costs) / len(costs)


def plan_limits(config: ModelConfig, engine: EngineConfig, free: int) -> Limits:
    """Buffer and cache sizes, from the user's choices and the `free` bytes beside the weights.

    Raises InsufficientMemoryError where the cache cannot hold one sequence of the length asked for.
    """
    per_block = cache_bytes_per_token(config) * engine.block_size
    wanted = engine.max_model_len or config.max_position_embeddings
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
        if budget > free:
            raise InsufficientMemoryError(
                f"the latent cache: {format_bytes(budget)} asked for by kv_cache_memory_bytes, "
                f"{format_bytes(free)} free beside the weights; ask for less"
            )
    else:
        budget = int(free * CACHE_SHARE)
    blocks_each = -(-wanted // engine.block_size)
    num_blocks = min(budget // per_block, blocks_each * engine.max_num_seqs)
    if num_blocks < blocks_each:
        if engine.max_model_len is not None or num_blocks < 1:
            raise InsufficientMemoryError(
                f"the latent cache: one sequence of {wanted} tokens needs "
                f"{format_bytes(blocks_each * per_block)}, {format_bytes(budget)} may be used; "
                "lower max_model_len or raise kv_cache_memory_bytes"
            )
        wanted = num_blocks * engine.block_size
        logger.warning(
            "max_model_len lowered from %d to %d tokens: what the latent cache can hold in %s",
            config.max_position_embeddings,
            wanted,
            format_bytes(budget),
        )
        blocks_each = num_blocks
    return Limits(
        max_tokens=max(engine.max_num_batched_tokens, engine.max_num_seqs),
        max_seqs=engine.max_num_seqs,
        table_width=blocks_each,
        num_blocks=num_blocks,
        block_size=engine.block_size,
        max_position=wanted,
    )


class ModelRunner:
    """A model in memory. One thread at a time may call it.

    The logits that `forward` returns are overwritten by the next call. With weights on the meta
    device, `forward` lays out and checks a step as ever and runs every op's checks, but computes
    nothing: `dry_run` drives it so.

    load_seconds  how long each part of `from_plan` took; empty where weights were given
    """

    def __init__(
        self,
        config: ModelConfig,
        engine_config: EngineConfig,
        weights: ModelWeights,
        plan: ModelPlan,
        limits: Limits,
    ) -> None:
        self.config = config
        self.engine_config = engine_config
        self._weight_bytes = plan.packed_nbytes()
        self.weight_bytes_per_token = plan.weight_bytes_per_token
        self.limits = limits
        self._device = weights.embed.device
        self._expansion = expansion_cost(weights)
        self._decoder = DeepseekDecoder(config, weights, self.limits, self._device)
        self._logits, self._gathered = self._new_room(engine_config.max_num_seqs)
        # Meta buffers take no values: what would be loaded into them goes elsewhere.
        real = self._device.type == "cpu"
        self._loaded = self._decoder.buffers if real else Inputs(limits, torch.device("cpu"))
        self._logit_rows = self._loaded.logit_rows.numpy()
        self._inputs = _StepInputs(config.vocab_size, limits)
        self._graphs: dict[int, tuple[runtime.Graph, StepLogits]] = {}
        self._closed = False
        self.load_seconds: dict[str, float] = {}
        if engine_config.use_graph:
            self._capture()

    @classmethod
    def load(
        cls,
        model_dir: str | FilePath,
        engine_config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ModelRunner":
        """Reads the checkpoint in `model_dir`.

        `progress(done, total)` is called with bytes read. Raises a UserError (ConfigError,
        CheckpointError, QuantizationError, InsufficientMemoryError, UnsupportedCpuError) before any
        weight is read. The engine runs the checks of `preflight` instead and then `from_plan`.
        """
        runtime.isa_tier()
        folder = FilePath(model_dir)
        config = ModelConfig.from_dir(folder)
        with Checkpoint.open(folder) as checkpoint:
            plan = resolve(config, checkpoint, engine_config.quantization)
            require_memory(plan.peak_nbytes(), "the model's weights")
            free = available_memory() - plan.packed_nbytes()
            limits = plan_limits(config, engine_config, max(0, free))
            return cls.from_plan(plan, checkpoint, engine_config, limits, progress)

    @classmethod
    def from_plan(
        cls,
        plan: ModelPlan,
        checkpoint: Checkpoint,
        engine_config: EngineConfig,
        limits: Limits,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ModelRunner":
        """Reads the weights of a checkpoint that `plan` was resolved from.

        `progress(done, total)` is called with bytes read. Raises CheckpointError where a weight's
        data is no good.
        """
        topology = runtime.topology()
        threads = engine_config.threads or runtime.default_threads()
        told = topology.oversubscribed(threads)
        if told is not None:
            logger.warning("%s", told)
        runtime.set_threads(threads)
        started = time.perf_counter()
        weights = load_weights(plan, checkpoint, progress)
        loaded = time.perf_counter()
        runner = cls(plan.config, engine_config, weights, plan, limits)
        runner.load_seconds = {
            "weights": loaded - started,
            "buffers and graphs": time.perf_counter() - loaded,
        }
        return runner

    @property
    def num_blocks(self) -> int:
        """Blocks of the latent cache."""
        return self.limits.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.limits.block_size

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return self.limits.max_position

    @property
    def max_num_batched_tokens(self) -> int:
        """Most tokens of one step."""
        return self.limits.max_tokens

    @property
    def format_bytes(self) -> dict[Format, int]:
        """Bytes of packed weights by format."""
        found: dict[Format, int] = {}
        for matrix in self._decoder.weights.matrices():
            found[matrix.format] = found.get(matrix.format, 0) + matrix.nbytes
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights."""
        return self._weight_bytes

    def placement(self) -> storage.Placement:
        """Where the weights lie, beside the threads that own them."""
        found = storage.Placement()
        for buffer in buffers_of_model(self._decoder.weights):
            found += storage.placement(buffer.data, buffer.groups)
        return found

    def choose_path(self, uncached_tokens: int, context: int) -> Path:
        """The cheaper attention for a prompt; see `choose_path` of this module."""
        return choose_path(self.config, self._expansion, uncached_tokens, context)

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first `num_tokens` tokens of cache block `source` to `target`, bit by bit."""
        for cache in self._decoder.cache:
            # By numpy: torch would wake threads of its own for this, beside the model's.
            rows = cache.view(torch.int16).numpy()
            rows[target, :num_tokens] = rows[source, :num_tokens]

    def forward(self, chunks: Sequence[SequenceChunk]) -> StepLogits:
        """Computes the chunks in one pass: logits of the rows wanted, in the chunks' order.

        Raises RuntimeError naming row, bounds and value for a token id, position or block that is
        out of range; nothing is computed then.
        """
        step, wanted = self._load(chunks)
        captured = self._graphs.get(step.rows)
        if captured and step.absorbed == step.rows == len(chunks) == len(wanted):
            graph, logits = captured
            graph.replay()
            return logits
        hidden = self._decoder.forward(step)
        count = len(wanted)
        if count == 0:
            return self._logits.first(0)
        logits, gathered = self._room_for(count)
        self._logit_rows[:count] = wanted
        dense.embedding(hidden, self._decoder.buffers.logit_rows[:count], gathered)
        self._decoder.logits(gathered, logits)
        return logits

    def cost(self, chunks: Sequence[SequenceChunk]) -> StepCost:
        """The least work of these chunks; computes them once, op by op, to count their experts."""
        step, _ = self._load(chunks)
        chosen = self._decoder.buffers.expert_ids[: step.rows]
        experts = [
            len(set(chosen.flatten().tolist()))
            for layer in self._decoder.run_layers(step)
            if isinstance(layer.ffn, Moe)
        ]
        return step_cost(self.config, self._decoder.weights, chunks, experts)

    def close(self) -> None:
        """Gives memory and threads back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for graph, _ in self._graphs.values():
            graph.free()
        self._graphs.clear()
        del self._decoder, self._logits, self._gathered, self._loaded, self._logit_rows
        if self._device.type == "cpu":
            runtime.set_threads(1)
            runtime.release_scratch()

    def _capture(self) -> None:
        """Records a decode step of one token a sequence for every number of sequences.

        Padding a batch to the next of a few sizes would read experts that no sequence has chosen,
        so each size has a graph of its own.
        """
        for rows in range(1, min(self.limits.max_seqs, MAX_GRAPH_ROWS) + 1):
            step = Step(rows, rows, _NO_SEGMENTS)
            logits = self._logits.first(rows)
            with runtime.Graph.capture() as graph:
                self._decoder.logits(self._decoder.forward(step), logits)
            self._graphs[rows] = graph, logits

    def _room_for(self, count: int) -> tuple[StepLogits, torch.Tensor]:
        """Logits and hidden rows for `count` rows: the fixed buffers where they are enough."""
        if count <= len(self._logits):
            return self._logits.first(count), self._gathered[:count]
        return self._new_room(count)

    def _new_room(self, count: int) -> tuple[StepLogits, torch.Tensor]:
        hidden = (count, self.config.hidden_size)
        return (
            StepLogits.empty(count, self.config.vocab_size, self._device),
            torch.empty(hidden, dtype=torch.bfloat16, device=self._device),
        )

    def _load(self, chunks: Sequence[SequenceChunk]) -> tuple[Step, list[int]]:
        """Fills the step's input buffers. Gives the step and the rows whose logits are wanted.

        A step has streamed its weights through the caches, so that the next one finds none of
        Python's code and data there: what each token costs here is several times what a loop over
        this alone would show.
        """
        inputs = self._inputs
        width = inputs.check_room(chunks)
        order = [i for i, chunk in enumerate(chunks) if chunk.path == "decode"]
        if len(order) < len(chunks):
            order += [i for i, chunk in enumerate(chunks) if chunk.path != "decode"]
        ends = [0] * len(chunks)
        segments: list[list[int]] = []
        absorbed = row = 0
        for seq, index in enumerate(order):
            chunk = chunks[index]
            count = len(chunk.token_ids)
            ends[index] = end = row + count
            if chunk.path == "decode":
                absorbed = end
            else:
                segments.append([row, count, seq, chunk.start])
            inputs.put(seq, row, chunk, width)
            row = end
        inputs.check_into(self._loaded, row, len(chunks), width)
        wanted: list[int] = []
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.logits == "last":
                wanted.append(end - 1)
            elif chunk.logits == "all":
                wanted.extend(range(end - len(chunk.token_ids), end))
        if not segments:
            return Step(row, absorbed, _NO_SEGMENTS), wanted
        segment_tensor = torch.tensor(segments, dtype=torch.int32, device=self._device)
        return Step(row, absorbed, segment_tensor), wanted


_Views: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class _StepInputs:
    """Where a step's inputs are laid out before they are checked and copied to the fixed buffers.

    NumPy views of int32 tensors: Python writes them many times faster than tensors.
    """

    def __init__(self, vocab_size: int, limits: Limits) -> None:
        self._vocab_size = vocab_size
        self._limits = limits

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self._token_ids = int32(limits.max_tokens)
        self._positions = int32(limits.max_tokens)
        self._row_seq = int32(limits.max_tokens)
        self._tables = int32(limits.max_seqs * limits.table_width)
        self._ids_view = self._token_ids.numpy()
        self._positions_view = self._positions.numpy()
        self._row_seq_view = self._row_seq.numpy()
        self._tables_view = self._tables.numpy()
        self._steps = np.arange(limits.max_tokens, dtype=np.int32)
        self._views: dict[tuple[int, int], _Views] = {}

    def check_room(self, chunks: Sequence[SequenceChunk]) -> int:
        """The width of the block tables: that of the longest or some more, for few widths in all.

        Raises RuntimeError where the chunks are more than the buffers hold.
        """
        limits = self._limits
        tokens = widest = 0
        for chunk in chunks:
            tokens += len(chunk.token_ids)
            widest = max(widest, len(chunk.block_table))
        if (
            1 <= len(chunks) <= limits.max_seqs
            and 1 <= tokens <= limits.max_tokens
            and 1 <= widest <= limits.table_width
        ):
            return min(limits.table_width, 1 << (widest - 1).bit_length())
        for what, found, most in (
            ("sequences", len(chunks), limits.max_seqs),
            ("tokens", tokens, limits.max_tokens),
            ("blocks of a sequence", widest, limits.table_width),
        ):
            if not 1 <= found <= most:
                raise RuntimeError(f"a step holds 1 to {most} {what}, found {found}")
        raise AssertionError("one of them is too many or too few")

    def put(self, seq: int, row: int, chunk: SequenceChunk, width: int) -> None:
        """Lays out a chunk as sequence number `seq`, from `row` on; tables are `width` wide."""
        count = len(chunk.token_ids)
        if count == 1:
            self._ids_view[row] = chunk.token_ids[0]
            self._positions_view[row] = chunk.start
            self._row_seq_view[row] = seq
        else:
            end = row + count
            self._ids_view[row:end] = chunk.token_ids
            np.add(self._steps[:count], chunk.start, out=self._positions_view[row:end])
            self._row_seq_view[row:end] = seq
        start, held = seq * width, len(chunk.block_table)
        self._tables_view[start : start + held] = chunk.block_table
        self._tables_view[start + held : start + width] = -1

    def check_into(self, buffers: Inputs, rows: int, seqs: int, width: int) -> None:
        """Copies what was laid out into the fixed buffers, every value checked on the way."""
        token_ids, positions, row_seq, block_tables = self._laid_out(rows, seqs, width)
        mla.load_step(
            token_ids,
            positions,
            row_seq,
            block_tables,
            self._vocab_size,
            self._limits.num_blocks,
            self._limits.block_size,
            self._limits.max_position,
            buffers.token_ids,
            buffers.positions,
            buffers.row_seq,
            buffers.block_tables,
        )

    def _laid_out(self, rows: int, seqs: int, width: int) -> "_Views":
        """Token ids, positions, sequences of rows, and block tables; those of decode steps kept."""
        views = self._views.get((rows, width)) if rows == seqs else None
        if views is None:
            views = (
                self._token_ids[:rows],
                self._positions[:rows],
                self._row_seq[:rows],
                self._tables[: seqs * width].view(seqs, width),
            )
            if rows == seqs:
                self._views[rows, width] = views
        return views
