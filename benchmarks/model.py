"""Decode and prefill of a whole model: times, and shares of what this machine allows.

    python benchmarks/model.py FOLDER [--threads N] [--tier avx512] [--json FILE]

The roofline share of a step is (least possible time) / (median measured time). The least time is
the larger of bytes / read bandwidth and operations / peak, both measured in the same run by the
same threads. Bytes are the packed weights that the step touches, the chosen experts counted, plus
the latent cache that it reads; operations are those of the matrix products and of attention.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from latentcore.config import EngineConfig
from latentcore.layers.ffn import Mlp, Moe
from latentcore.layers.step import Buffers, Step, latent_row
from latentcore.models.chunk import SequenceChunk
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime
from latentcore.quant.packed import PackedWeight


@contextmanager
def counted_experts() -> Iterator[list[int]]:
    """Collects how many distinct experts each MoE layer touches in eager steps."""
    counts: list[int] = []
    route = Moe._route

    def counting(self: Moe, step: Step, buffers: Buffers) -> None:
        route(self, step, buffers)
        counts.append(len(buffers.expert_ids[: step.rows].unique()))

    Moe._route = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Moe._route = route  # type: ignore[method-assign]


class Costs:
    """Bytes and operations of a step."""

    def __init__(self, runner: ModelRunner) -> None:
        self.config = runner.config
        self.layers = runner._decoder.layers
        self.head: PackedWeight = runner._decoder.weights.lm_head

    def decode(self, experts: list[int], contexts: list[int]) -> tuple[float, float]:
        """Bytes and operations of one token a sequence, at these contexts."""
        c, batch = self.config, len(contexts)
        nbytes, ops = float(self.head.nbytes), 2.0 * batch * c.vocab_size * c.hidden_size
        touched = iter(experts)
        for layer in self.layers:
            w = layer.attention.weights
            for matrix in (w.q, w.q_a, w.q_b, w.kv_a, w.w_kc, w.w_vc, w.o):
                if matrix is not None:
                    nbytes += matrix.nbytes
                    ops += 2.0 * batch * matrix.batch * matrix.rows * matrix.cols
            nbytes += sum(contexts) * latent_row(c) * 2
            pair = c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
            ops += 2.0 * sum(contexts) * pair
            if isinstance(layer.ffn, Mlp):
                m = layer.ffn.weights
                nbytes += m.gate_up.nbytes + m.down.nbytes
                ops += 6.0 * batch * m.gate_up.rows * m.gate_up.cols
                continue
            e = layer.ffn.weights
            nbytes += e.router.nbytes + next(touched) * (
                e.experts_gate_up.item_nbytes + e.experts_down.item_nbytes
            )
            width = c.moe_intermediate_size * c.num_experts_per_tok
            if e.shared is not None:
                nbytes += e.shared.gate_up.nbytes + e.shared.down.nbytes
                width += e.shared.gate_up.rows
            ops += 2.0 * batch * c.hidden_size * (3 * width + c.n_routed_experts)
        return nbytes, ops

    def prefill(self, experts: list[int], tokens: int) -> tuple[float, float]:
        """Bytes and operations of one un-absorbed prompt; logits for its last token."""
        c = self.config
        nbytes, ops = self.decode(experts, [0] * tokens)
        ops -= 2.0 * (tokens - 1) * c.vocab_size * c.hidden_size
        heads = c.num_attention_heads
        pairs = tokens * (tokens + 1) / 2
        ops += 2.0 * len(self.layers) * pairs * heads * (c.qk_head_dim + c.v_head_dim)
        return nbytes, ops  # kv_b costs what w_kc and w_vc were counted as


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after two to warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        call()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measures and prints one row a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--tier", default=runtime.isa_tier())
    parser.add_argument("--decode", default="1:128,1:2048,8:128,32:128", help="batch:context")
    parser.add_argument("--prefill", default="512,2048")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    with runtime.forced_tier(args.tier):
        engine = EngineConfig(threads=args.threads, max_model_len=4096, max_num_seqs=64)
        runner = ModelRunner.load(args.folder, engine)
        loaded = time.perf_counter() - start
        eager = ModelRunner.__new__(ModelRunner)
        eager.__dict__.update(runner.__dict__)
        eager._graphs = {}
        costs = Costs(runner)
        w = runner._decoder.layers[-1].attention.weights.o
        peak = runtime.peak_ops(w.format, 0.5)
        bandwidth = runtime.read_bandwidth(1 << 30, 2.0)
        print(
            f"{w.format.name}, tier {args.tier}, {args.threads} threads, loaded in {loaded:.1f} s, "
            f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} Gop/s in registers"
        )
        rows: list[dict[str, object]] = []
        vocab = runner.config.vocab_size

        def report(name: str, seconds: float, tokens: int, nbytes: float, ops: float) -> None:
            least = max(nbytes / bandwidth, ops / peak)
            row = {
                "case": name,
                "ms": seconds * 1e3,
                "tokens/s": tokens / seconds,
                "share": least / seconds,
                "bytes": nbytes,
                "operations": ops,
            }
            rows.append(row)
            print(
                f"{name:24}{seconds * 1e3:10.2f} ms{tokens / seconds:10.1f} tokens/s   "
                f"share {least / seconds:.3f}",
                flush=True,
            )

        for case in filter(None, args.decode.split(",")):
            batch, context = map(int, case.split(":"))
            each = -(-(context + 1) // runner.block_size)
            tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
            for table in tables:
                ids = torch.randint(0, vocab, (context,)).tolist()
                for at in range(0, context, 1024):
                    part = ids[at : at + 1024]
                    runner.forward([SequenceChunk(part, at, table, "prefill", "none")])
            step = [
                SequenceChunk([int(torch.randint(0, vocab, ()))], context, table, "decode", "last")
                for table in tables
            ]
            with counted_experts() as experts:
                eager.forward(step)
            nbytes, ops = costs.decode(experts, [context + 1] * batch)
            seconds = median_seconds(lambda step=step: runner.forward(step), args.repeats)
            report(f"decode {batch} x {context}", seconds, batch, nbytes, ops)
        for tokens in map(int, filter(None, args.prefill.split(","))):
            ids = torch.randint(0, vocab, (tokens,)).tolist()
            table = list(range(-(-tokens // runner.block_size)))
            prompt = [SequenceChunk(ids, 0, table, "prefill", "last")]
            with counted_experts() as experts:
                eager.forward(prompt)
            nbytes, ops = costs.prefill(experts, tokens)
            repeats = max(3, args.repeats // 2)
            seconds = median_seconds(lambda prompt=prompt: runner.forward(prompt), repeats)
            report(f"prefill {tokens}", seconds, tokens, nbytes, ops)
        runner.close()
    if args.json:
        text = {"bandwidth": bandwidth, "peak": peak, "format": w.format.name, "rows": rows}
        args.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
