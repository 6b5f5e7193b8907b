"""Multi-head latent attention over a paged latent cache.

The cache of a layer is bf16 [blocks, block_size, dim]; a token's row holds its normed latent
(kv_lora_rank), its roped key (qk_rope_head_dim) and zeros up to `dim`, a multiple of 32.
block_tables int32 [sequences, width] names the block of each `block_size` positions; row i of a
batch stands at positions[i] of sequence row_seq[i]. rope_table is f32 [positions, rope]: the
cosines of rope / 2 pairs, then their sines.
"""

import torch

from latentcore.ops.native import op, unpack
from latentcore.quant.packed import PackedWeight

_mla_input_lora = op("mla_input_lora")
_mla_input_direct = op("mla_input_direct")
_mla_decode_attention = op("mla_decode_attention")
_mla_prefill_attention = op("mla_prefill_attention")
_load_step = op("load_step")


def mla_input_lora(
    x: torch.Tensor,
    q_a: PackedWeight,
    q_a_norm: torch.Tensor,
    q_b: PackedWeight,
    kv_a: PackedWeight,
    kv_a_norm: torch.Tensor,
    w_kc: PackedWeight,
    eps: float,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    block_tables: torch.Tensor,
    cache: torch.Tensor,
    absorbed: int,
    q: torch.Tensor,
    q_latent: torch.Tensor,
) -> None:
    """Queries, and the cache rows, of x, bf16 [n, hidden].

    Rows below `absorbed` get q_latent bf16 [n, heads, dim]: the query absorbed by w_kc, then its
    roped part. The others get q bf16 [n, heads, nope + rope]. The rest of both is left as it was.
    """
    name = "mla_input_lora"
    _mla_input_lora(
        x,
        *unpack(name, "q_a", q_a),
        q_a_norm,
        *unpack(name, "q_b", q_b),
        *unpack(name, "kv_a", kv_a),
        kv_a_norm,
        *unpack(name, "w_kc", w_kc),
        eps,
        rope_table,
        positions,
        row_seq,
        block_tables,
        cache,
        absorbed,
        q,
        q_latent,
    )


def mla_input_direct(
    x: torch.Tensor,
    q_proj: PackedWeight,
    kv_a: PackedWeight,
    kv_a_norm: torch.Tensor,
    w_kc: PackedWeight,
    eps: float,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    block_tables: torch.Tensor,
    cache: torch.Tensor,
    absorbed: int,
    q: torch.Tensor,
    q_latent: torch.Tensor,
) -> None:
    """The same for models whose queries have no low-rank projection (`q_lora_rank` null)."""
    name = "mla_input_direct"
    _mla_input_direct(
        x,
        *unpack(name, "q_proj", q_proj),
        *unpack(name, "kv_a", kv_a),
        kv_a_norm,
        *unpack(name, "w_kc", w_kc),
        eps,
        rope_table,
        positions,
        row_seq,
        block_tables,
        cache,
        absorbed,
        q,
        q_latent,
    )


def mla_decode_attention(
    q_latent: torch.Tensor,
    w_vc: PackedWeight,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    block_tables: torch.Tensor,
    cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention in latent space, then w_vc: out bf16 [n, heads * v].

    Row i attends to positions 0..positions[i] of its sequence.
    """
    _mla_decode_attention(
        q_latent,
        *unpack("mla_decode_attention", "w_vc", w_vc),
        positions,
        row_seq,
        block_tables,
        cache,
        scale,
        out,
    )


def mla_prefill_attention(
    q: torch.Tensor,
    kv_b: PackedWeight,
    segments: torch.Tensor,
    block_tables: torch.Tensor,
    cache: torch.Tensor,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention with keys and values un-absorbed by kv_b, tile by tile.

    q bf16 [n, heads, nope + rope]; segments int32 [count, 4] of (first row, rows, sequence,
    position of the first row); writes those rows of out, bf16 [n, heads * v].
    """
    _mla_prefill_attention(
        q,
        *unpack("mla_prefill_attention", "kv_b", kv_b),
        segments,
        block_tables,
        cache,
        kv_lora_rank,
        qk_rope_head_dim,
        v_head_dim,
        scale,
        out,
    )


def load_step(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    row_seq: torch.Tensor,
    block_tables: torch.Tensor,
    vocab_size: int,
    num_blocks: int,
    block_size: int,
    max_position: int,
    token_ids_to: torch.Tensor,
    positions_to: torch.Tensor,
    row_seq_to: torch.Tensor,
    block_tables_to: torch.Tensor,
) -> None:
    """Copies a step's inputs (int32) into its fixed buffers, every value checked on the way.

    Raises RuntimeError naming the argument, its bounds, the row and what was found.
    """
    _load_step(
        token_ids,
        positions,
        row_seq,
        block_tables,
        vocab_size,
        num_blocks,
        block_size,
        max_position,
        token_ids_to,
        positions_to,
        row_seq_to,
        block_tables_to,
    )
