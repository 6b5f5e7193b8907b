"""What DeepSeek-V3.1 would do on two-socket servers: a projection, not a measurement.

    python benchmarks/project_v3.py amx:int8=0.83,0.70,0.64,0.22 avx512:int8=0.92,0.68,0.71,0.76

Takes roofline shares that `latentcore bench` measured, by tier and format: decode at batch 1, 8 and
32, and of a prompt. For each server below of that tier it takes the published memory bandwidth and
arithmetic. Bytes and operations of V3.1 are counted from its shapes by the rules of `latentcore
bench`. Whether a share holds on hundreds of threads and across sockets is not known: so the second
figure of each pair is what three quarters of the share would give. Prints a Markdown table.
"""

import argparse
import re
from dataclasses import dataclass

import torch

from latentcore.bench.machine import Ceilings
from latentcore.config import ModelConfig
from latentcore.layers.weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)
from latentcore.models.chunk import SequenceChunk
from latentcore.models.cost import Cost, step_cost
from latentcore.models.synthetic import v3_pair_config
from latentcore.quant.packed import Format, PackedWeight

CAUTION = 0.75
CONTEXT = 2048
BATCHES = (1, 8, 32)
PROMPT = 2048


@dataclass(frozen=True)
class Server:
    """Two sockets; published figures, both sockets together.

    tier                 whose shares hold for it
    channels, transfers  memory channels, and million transfers of 8 bytes a second
    cores, ghz           cores, and the base clock
    int8, bf16           operations a cycle and core; a multiplication and an addition are two
    reached              share of the channels' peak that plain reading commonly reaches
    """

    name: str
    tier: str
    channels: int
    transfers: int
    cores: int
    ghz: float
    int8: int
    bf16: int
    reached: float = 0.85

    def ceilings(self) -> Ceilings:
        """What it can do at most."""
        cycles = self.cores * self.ghz * 1e9
        peaks = {Format.INT8: cycles * self.int8, Format.BF16: cycles * self.bf16}
        peaks[Format.F32] = cycles * 64
        return Ceilings(self.channels * self.transfers * 1e6 * 8 * self.reached, peaks)


SERVERS = (
    Server("2 x Xeon 6980P, MRDIMM-8800, AMX", "amx", 24, 8800, 256, 2.0, 2048, 1024),
    Server("2 x Xeon 8592+, DDR5-5600, AMX", "amx", 16, 5600, 128, 1.9, 2048, 1024),
    Server("2 x EPYC 9755, DDR5-6000, AVX-512", "avx512", 24, 6000, 256, 2.7, 256, 128),
)


def v3_config() -> ModelConfig:
    """DeepSeek-V3.1's shapes."""
    layers = {"num_hidden_layers": 61, "first_k_dense_replace": 3}
    return ModelConfig.from_dict({**v3_pair_config(vocab=129280), **layers})


def v3_weights(c: ModelConfig, fmt: Format) -> ModelWeights:
    """V3.1's weights without memory, linear ones in `fmt`."""
    h, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    assert c.q_lora_rank is not None
    halves = Format.INT8_WIDE if fmt == Format.INT8 else Format.BF16
    vector = torch.empty(0)

    def matrix(rows: int, cols: int, batch: int = 1, parts: int = 1) -> PackedWeight:
        return PackedWeight.fake(fmt, batch, parts, rows, cols)

    def mlp(width: int, batch: int = 1) -> MlpWeights:
        return MlpWeights(matrix(width, h, batch, 2), matrix(h, width, batch))

    attention = AttentionWeights(
        input_norm=vector,
        q_a=matrix(c.q_lora_rank, h),
        q_a_norm=vector,
        q_b=matrix(heads * c.qk_head_dim, c.q_lora_rank),
        q=None,
        kv_a=matrix(c.latent_dim, h),
        kv_a_norm=vector,
        kv_b=matrix(heads * (c.qk_nope_head_dim + c.v_head_dim), rank),
        w_kc=PackedWeight.fake(halves, heads, 1, rank, c.qk_nope_head_dim),
        w_vc=PackedWeight.fake(halves, heads, 1, c.v_head_dim, rank),
        o=matrix(h, heads * c.v_head_dim),
    )
    experts = mlp(c.moe_intermediate_size, c.n_routed_experts)
    moe = MoeWeights(
        router=PackedWeight.fake(Format.BF16, 1, 1, c.n_routed_experts, h),
        router_bias=vector,
        experts_gate_up=experts.gate_up,
        experts_down=experts.down,
        shared=mlp(c.n_shared_experts * c.moe_intermediate_size),
    )
    dense = mlp(c.intermediate_size)
    layers = [
        LayerWeights(attention, vector, moe if c.is_moe_layer(i) else dense)
        for i in range(c.num_hidden_layers)
    ]
    head = PackedWeight.fake(Format.BF16, 1, 1, c.vocab_size, h)
    return ModelWeights(embed=vector, layers=layers, final_norm=vector, lm_head=head)


def cost(c: ModelConfig, weights: ModelWeights, chunks: list[SequenceChunk]) -> Cost:
    """A step's cost, experts taken to be chosen evenly and independently."""
    rows = sum(len(chunk.token_ids) for chunk in chunks)
    unused = (1 - c.num_experts_per_tok / c.n_routed_experts) ** rows
    touched = round(c.n_routed_experts * (1 - unused))
    moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
    return step_cost(c, weights, chunks, [touched] * moe_layers).total


@dataclass(frozen=True)
class Shares:
    """Measured roofline shares of a format in a tier: of decode, as BATCHES, and of a prompt."""

    tier: str
    format: Format
    decode: tuple[float, ...]
    prompt: float

    @classmethod
    def parse(cls, text: str) -> "Shares":
        """From TIER:FORMAT=SHARE,... as on the command line."""
        found = re.fullmatch(r"(amx|avx512):(int8|fp8)=([\d.,]+)", text)
        shares = [float(part) for part in found[3].split(",")] if found else []
        if found is None or len(shares) != len(BATCHES) + 1 or not all(0 < s <= 1 for s in shares):
            raise argparse.ArgumentTypeError(
                f"expected such as amx:int8=0.83,0.70,0.64,0.22, found {text!r}"
            )
        return cls(found[1], Format[found[2].upper()], tuple(shares[:-1]), shares[-1])


def main() -> None:
    """Prints the projection."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shares", type=Shares.parse, nargs="+", metavar="TIER:FORMAT=SHARES")
    args = parser.parse_args()
    config = v3_config()
    head = [f"batch {b}, tokens/s" for b in BATCHES]
    lines = [["server", "format", *head, f"first token of {PROMPT:,}, s"], ["---"] * 6]
    for shares in args.shares:
        weights = v3_weights(config, shares.format)
        for server in (server for server in SERVERS if server.tier == shares.tier):
            ceilings = server.ceilings()
            cells = []
            for batch, share in zip(BATCHES, shares.decode, strict=True):
                chunks = [SequenceChunk([0], CONTEXT, [], "decode", "last")] * batch
                least = ceilings.least_seconds(cost(config, weights, chunks))
                best = batch / least * share
                cells.append(f"{best:.1f}; {best * CAUTION:.1f}")
            prompt = [SequenceChunk([0] * PROMPT, 0, [], "prefill", "last")]
            seconds = ceilings.least_seconds(cost(config, weights, prompt)) / shares.prompt
            cells.append(f"{seconds:.2f}; {seconds / CAUTION:.2f}")
            lines.append([server.name, shares.format.name, *cells])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
