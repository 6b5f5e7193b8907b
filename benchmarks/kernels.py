"""Roofline share of the matrix kernels: every scheme, tier and batch size.

    python benchmarks/kernels.py [--threads N] [--tiers avx512,avx2] [--json FILE]

Ceilings are measured in the same run. The least possible time of a call is the larger of (bytes of
weights touched / read bandwidth) and (operations / peak of the format's best instruction). Experts
are chosen at random and counted; the stack of experts is larger than the caches.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from latentcore.ops import dense, moe, packing, runtime
from latentcore.quant.packed import Format, PackedWeight

SCHEMES = (Format.INT8, Format.FP8, Format.BF16)


def packed(fmt: Format, batch: int, parts: int, rows: int, cols: int) -> PackedWeight:
    """A random packed weight; all matrices of the stack hold the same values."""
    weight = PackedWeight.allocate(fmt, batch, parts, rows, cols)
    w = torch.randn(rows, cols).to(torch.bfloat16)
    if fmt == Format.INT8:
        codes, scale = packing.quantize_rows_int8(w)
    elif fmt == Format.FP8:
        codes, scale = packing.quantize_blocks_fp8(w)
    for item in range(batch):
        for part in range(parts):
            if fmt == Format.INT8:
                packing.pack_int8(weight, item, part, codes, scale)
            elif fmt == Format.FP8:
                packing.pack_fp8(weight, item, part, codes, scale)
            else:
                packing.pack_bf16(weight, item, part, w)
    return weight


def median_seconds(call: Callable[[], None], repeats: int) -> float:
    """Median of `repeats` runs after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measures and prints one row a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=runtime.default_threads())
    parser.add_argument("--tiers", default=runtime.isa_tier())
    parser.add_argument("--batches", default="1,8,32,512,2048")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runtime.set_threads(args.threads)
    h, width, experts, k = args.hidden, args.width, args.experts, args.top_k
    rows: list[dict[str, object]] = []
    bandwidth = runtime.read_bandwidth(1 << 30, 2.0)
    print(f"threads {args.threads}, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for fmt in SCHEMES:
        gate_up, down = packed(fmt, experts, 2, width, h), packed(fmt, experts, 1, h, width)
        square = packed(fmt, 1, 1, h, h)
        for tier in args.tiers.split(","):
            with runtime.forced_tier(tier):
                peak = runtime.peak_ops(fmt, 0.5)
                for n in map(int, args.batches.split(",")):
                    x = torch.randn(n, h).to(torch.bfloat16)
                    out = torch.empty_like(x)
                    weights = torch.rand(n, k)
                    sets = [
                        torch.stack([torch.randperm(experts)[:k] for _ in range(n)]).int()
                        for _ in range(8 if n < 64 else 1)
                    ]

                    def experts_call(
                        x=x, sets=sets, weights=weights, out=out, gate_up=gate_up, down=down
                    ) -> None:
                        for ids in sets:
                            moe.moe(x, ids, weights, gate_up, down, out)

                    def linear_call(x=x, out=out, square=square) -> None:
                        dense.linear(x, square, out)

                    touched = sum(len(ids.unique()) for ids in sets) / len(sets)
                    cases = [
                        (
                            "moe",
                            median_seconds(experts_call, args.repeats) / len(sets),
                            touched * (gate_up.item_nbytes + down.item_nbytes),
                            6.0 * n * k * h * width,
                        )
                    ]
                    if n >= 128:
                        seconds = median_seconds(linear_call, args.repeats)
                        cases.append(("linear", seconds, square.nbytes, 2.0 * n * h * h))
                    for name, seconds, nbytes, ops in cases:
                        least = max(nbytes / bandwidth, ops / peak)
                        row = {
                            "op": name,
                            "scheme": fmt.name,
                            "tier": tier,
                            "rows": n,
                            "ms": seconds * 1e3,
                            "GB/s": nbytes / seconds / 1e9,
                            "Gop/s": ops / seconds / 1e9,
                            "peak Gop/s": peak / 1e9,
                            "share": least / seconds,
                        }
                        rows.append(row)
                        print(
                            f"{name:7}{fmt.name:6}{tier:8}{n:6}{row['ms']:10.3f} ms"
                            f"{row['GB/s']:8.1f} GB/s{row['Gop/s']:9.0f}"
                            f" of {row['peak Gop/s']:.0f} Gop/s   share {row['share']:.2f}",
                            flush=True,
                        )
    if args.json:
        args.json.write_text(json.dumps({"bandwidth": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
