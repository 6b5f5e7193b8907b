"""Decode and prefill of a model at the cases that docs/performance.md lists, in its tiers.

    python benchmarks/model.py FOLDER... [--tiers avx512,avx2] [--threads N] [--repeats N]
    python benchmarks/model.py --table int8.json fp8.json...

Prints a Markdown table of roofline shares, one column a folder and tier, below what
`latentcore bench --json` says of each; --json FILE keeps all of it. --table makes the table of runs
that were kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def measured(folder: Path, tier: str | None, options: list[str]) -> dict[str, Any]:
    """One run of `latentcore bench`, in a process of its own."""
    command = [sys.executable, "-m", "latentcore", "bench", str(folder), "--json", *options]
    if tier is not None:
        command += ["--tier", tier]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """The runs side by side, in Markdown."""
    head = [f"{run['format'].lower()} {run['machine']['tier']}" for run in runs]
    lines = [["", *head], ["---"] * (len(runs) + 1)]
    lines.append(["peaks, Top/s", *(peaks(run) for run in runs)])
    for at, case in enumerate(runs[0]["results"]):
        found = [run["results"][at] for run in runs]
        lines.append([f"{case['case']}: share", *(f"{c['share']:.2f}" for c in found)])
        lines.append(["of the least time of its kernels", *(f"{by_kernel(c):.2f}" for c in found)])
        rates = (c["ceilings"]["read_bandwidth"] / 1e9 for c in found)
        limits = (f"{rate:.0f}; {c['limit']}" for rate, c in zip(rates, found, strict=True))
        lines.append(["GB/s; limit", *limits])
        lines.append(["tokens/s", *(f"{c['tokens_per_second']:.1f}" for c in found)])
        fabric = (c["fabric"] for c in found)
        text = (f"{100 * f['overhead']:.1f} %; {f['imbalance']:.3f}" for f in fabric)
        lines.append(["fabric; imbalance", *text])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_kernel(case: dict[str, Any]) -> float:
    """The share where no kernel's reading can hide behind another one's arithmetic.

    Kernels run one after the other, each at best in the larger of its own two times; their sum is
    more than the larger of the two sums, which the roofline share divides by.
    """
    kernels = [k for k in case["fabric"]["kernels"] if k["share"] is not None]
    least: float = sum(k["seconds"] * k["share"] for k in kernels)
    return least / float(case["seconds"]["median"])


def peaks(run: dict[str, Any]) -> str:
    """All peaks of a run."""
    found = run["ceilings"]["peaks"].items()
    return ", ".join(f"{name} {peak / 1e12:.2f}" for name, peak in found)


def main() -> None:
    """Measures one folder and tier after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="runs that were kept")
    parser.add_argument("--tiers", default="", help="comma-separated; default: the best")
    parser.add_argument("--json", type=Path, help="where to keep everything")
    args, options = parser.parse_known_args()
    if bool(args.folders) == bool(args.table):
        parser.error("expected either folders to measure or --table and files")
    if args.table:
        print(table([run for file in args.table for run in json.loads(file.read_text())]))
        return
    runs = []
    for folder in args.folders:
        for tier in args.tiers.split(",") if args.tiers else [None]:
            runs.append(measured(folder, tier, options))
            run = runs[-1]
            print(f"{run['model']}: {run['machine']}", *run["warnings"], sep="\n", file=sys.stderr)
    print(table(runs))
    if args.json is not None:
        args.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
