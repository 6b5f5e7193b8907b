"""What the layers of one step share: its rows, their places, and buffers at fixed addresses."""

from dataclasses import dataclass

import torch

from latentcore.config import ModelConfig


@dataclass(frozen=True)
class Limits:
    """Sizes that buffers are made for.

    max_tokens      rows of a step
    max_seqs        sequences of a step
    table_width     cache blocks of a sequence
    num_blocks      cache blocks in all
    block_size      tokens of a block
    max_position    positions of the rope table
    """

    max_tokens: int
    max_seqs: int
    table_width: int
    num_blocks: int
    block_size: int
    max_position: int


def latent_row(config: ModelConfig) -> int:
    """Elements of a token's row in the latent cache: latent and roped key, padded to 32."""
    return -(-config.latent_dim // 32) * 32


class Inputs:
    """What a step is told, in buffers at fixed addresses: which tokens, where they stand, which
    rows' logits are wanted."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        n = limits.max_tokens
        self.token_ids = int32(n)
        self.positions = int32(n)
        self.row_seq = int32(n)
        self.block_tables = int32(limits.max_seqs, limits.table_width)
        self.logit_rows = int32(n)


class Buffers(Inputs):
    """Every tensor that a step writes, allocated once, so that captured graphs stay valid.

    Made on the meta device, they serve the checks of `preflight`.
    """

    def __init__(self, config: ModelConfig, limits: Limits, device: torch.device) -> None:
        super().__init__(limits, device)
        n = limits.max_tokens
        heads = config.num_attention_heads

        def bf16(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device)

        self.residual = bf16(n, config.hidden_size)
        self.normed = bf16(n, config.hidden_size)
        self.delta = bf16(n, config.hidden_size)
        self.q = bf16(n, heads, config.qk_head_dim)
        self.q_latent = bf16(n, heads, latent_row(config))
        self.attended = bf16(n, heads * config.v_head_dim)
        top_k = max(1, config.num_experts_per_tok)
        self.expert_ids = torch.zeros((n, top_k), dtype=torch.int32, device=device)
        self.expert_weights = torch.zeros((n, top_k), dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


@dataclass(frozen=True)
class Step:
    """The rows of one step, the absorbed (decode path) ones first.

    rows       tokens
    absorbed   how many of them attend in latent space
    segments   int32 [count, 4]: first row, rows, sequence and first position of every
               chunk that attends un-absorbed; such steps run eagerly
    """

    rows: int
    absorbed: int
    segments: torch.Tensor
