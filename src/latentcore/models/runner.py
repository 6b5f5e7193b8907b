"""Runs a loaded model: lays out a step's rows, replays graphs, gives logits."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch

from latentcore.config import EngineConfig, ModelConfig
from latentcore.errors import InsufficientMemoryError
from latentcore.layers.step import Limits, Step, latent_row
from latentcore.layers.weights import ModelWeights
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.chunk import Path, SequenceChunk
from latentcore.models.deepseek import DeepseekDecoder
from latentcore.models.dryrun import dry_run
from latentcore.models.loader import load_weights
from latentcore.models.memory import available_memory, format_bytes, require_memory
from latentcore.models.resolve import ModelPlan, resolve
from latentcore.ops import dense, mla, runtime

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Share of the memory left beside the weights that the latent cache takes at most by itself."""

_NO_SEGMENTS = torch.empty((0, 4), dtype=torch.int32)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of latent cache a token takes in all layers."""
    return config.num_hidden_layers * latent_row(config) * 2


def choose_path(config: ModelConfig, uncached_tokens: int, context: int) -> Path:
    """The cheaper attention for a prompt of `context` tokens of which `uncached_tokens` are new.

    Un-absorbing a token's keys and values costs (nope + v) x kv_lora_rank multiplications a head,
    once for each token of the context; absorbing a query costs as much for each new token. A pair
    of tokens then costs nope + rope + v, or 2 x kv_lora_rank + rope.
    """
    expand = (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    pairs = uncached_tokens * (context - (uncached_tokens - 1) / 2)
    unabsorbed = context * expand + pairs * (config.qk_head_dim + config.v_head_dim)
    absorbed = uncached_tokens * expand + pairs * (
        2 * config.kv_lora_rank + config.qk_rope_head_dim
    )
    return "prefill" if unabsorbed <= absorbed else "decode"


def plan_limits(config: ModelConfig, engine: EngineConfig, free: int) -> Limits:
    """Buffer and cache sizes, from the user's choices and the `free` bytes beside the weights.

    Raises InsufficientMemoryError where the cache cannot hold one sequence of the length asked for.
    """
    per_block = cache_bytes_per_token(config) * engine.block_size
    wanted = engine.max_model_len or config.max_position_embeddings
    if engine.kv_cache_memory is not None:
        budget = engine.kv_cache_memory
        if budget > free:
            raise InsufficientMemoryError(
                f"the latent cache: {format_bytes(budget)} asked for by kv_cache_memory, "
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
                "lower max_model_len or raise kv_cache_memory"
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

    The logits that `forward` returns are overwritten by the next call.
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
        self.weight_bytes = plan.packed_nbytes()
        self.weight_bytes_per_token = plan.weight_bytes_per_token
        self.limits = limits
        self._decoder = DeepseekDecoder(config, weights, self.limits, torch.device("cpu"))
        rows = engine_config.max_num_seqs
        self._logits = torch.empty((rows, config.vocab_size), dtype=torch.float32)
        self._gathered = torch.empty((rows, config.hidden_size), dtype=torch.bfloat16)
        self._graphs: dict[int, runtime.Graph] = {}
        self._closed = False

    @classmethod
    def load(
        cls,
        model_dir: str | FilePath,
        engine_config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ModelRunner":
        """Checks, then reads the checkpoint in `model_dir`.

        `progress(done, total)` is called with bytes read. Raises a UserError (ConfigError,
        CheckpointError, QuantizationError, InsufficientMemoryError, UnsupportedCpuError), or
        ContractError where the model's code and an op disagree, before any weight is read.
        """
        runtime.isa_tier()
        folder = FilePath(model_dir)
        config = ModelConfig.from_dir(folder)
        with Checkpoint.open(folder) as checkpoint:
            plan = resolve(config, checkpoint, engine_config.quantization)
            require_memory(plan.peak_nbytes(), "the model's weights")
            free = available_memory() - plan.packed_nbytes()
            limits = plan_limits(config, engine_config, max(0, free))
            dry_run(plan, engine_config, limits)
            runtime.set_threads(engine_config.threads or runtime.default_threads())
            weights = load_weights(plan, checkpoint, progress)
        return cls(config, engine_config, weights, plan, limits)

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

    def choose_path(self, uncached_tokens: int, context: int) -> Path:
        """The cheaper attention for a prompt; see `choose_path` of this module."""
        return choose_path(self.config, uncached_tokens, context)

    def forward(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        """Computes the chunks in one pass: float32 [rows wanted, vocab], in the chunks' order.

        Raises RuntimeError naming row, bounds and value for a token id, position or block that is
        out of range; nothing is computed then.
        """
        step, wanted = self._load(chunks)
        if self.engine_config.use_graph and step.absorbed == step.rows == len(chunks) == len(
            wanted
        ):
            return self._replay(step)
        hidden = self._decoder.forward(step)
        count = len(wanted)
        if count == 0:
            return self._logits[:0]
        logits, gathered = self._room_for(count)
        rows = self._decoder.buffers.logit_rows[:count]
        rows.copy_(torch.tensor(wanted, dtype=torch.int32))
        dense.embedding(hidden, rows, gathered)
        self._decoder.logits(gathered, logits)
        return logits

    def close(self) -> None:
        """Gives memory and threads back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        del self._decoder, self._logits, self._gathered
        runtime.set_threads(1)
        runtime.release_scratch()

    def _room_for(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and hidden rows for `count` rows: the fixed buffers where they are enough."""
        if count <= self._logits.shape[0]:
            return self._logits[:count], self._gathered[:count]
        return (
            torch.empty((count, self.config.vocab_size), dtype=torch.float32),
            torch.empty((count, self.config.hidden_size), dtype=torch.bfloat16),
        )

    def _load(self, chunks: Sequence[SequenceChunk]) -> tuple[Step, list[int]]:
        """Fills the step's input buffers. Gives the step and the rows whose logits are wanted."""
        order = sorted(range(len(chunks)), key=lambda i: chunks[i].path != "decode")
        first_row = [0] * len(chunks)
        token_ids: list[int] = []
        positions: list[int] = []
        row_seq: list[int] = []
        segments: list[list[int]] = []
        absorbed = 0
        for seq, index in enumerate(order):
            chunk = chunks[index]
            count = len(chunk.token_ids)
            first_row[index] = len(token_ids)
            if chunk.path == "decode":
                absorbed += count
            else:
                segments.append([len(token_ids), count, seq, chunk.start])
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + count))
            row_seq.extend([seq] * count)
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = torch.full((len(chunks), width), -1, dtype=torch.int32)
        for seq, index in enumerate(order):
            table = chunks[index].block_table
            tables[seq, : len(table)] = torch.tensor(table, dtype=torch.int32)
        limits, b = self.limits, self._decoder.buffers

        def int32(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        mla.load_step(
            int32(token_ids),
            int32(positions),
            int32(row_seq),
            tables,
            self.config.vocab_size,
            limits.num_blocks,
            limits.block_size,
            limits.max_position,
            b.token_ids,
            b.positions,
            b.row_seq,
            b.block_tables,
        )
        wanted: list[int] = []
        for index, chunk in enumerate(chunks):
            first, count = first_row[index], len(chunk.token_ids)
            if chunk.logits == "last":
                wanted.append(first + count - 1)
            elif chunk.logits == "all":
                wanted.extend(range(first, first + count))
        segment_tensor = int32(segments) if segments else _NO_SEGMENTS
        return Step(len(token_ids), absorbed, segment_tensor), wanted

    def _replay(self, step: Step) -> torch.Tensor:
        """One decode step of one token a sequence, through the graph of its size."""
        logits = self._logits[: step.rows]
        graph = self._graphs.get(step.rows)
        if graph is None:
            with runtime.Graph.capture() as graph:
                self._decoder.logits(self._decoder.forward(step), logits)
            self._graphs[step.rows] = graph
        graph.replay()
        return logits
