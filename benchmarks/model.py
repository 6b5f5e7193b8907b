"""Decode and prefill of a model at the cases that docs/performance.md lists, in its tiers.

    python benchmarks/model.py FOLDER... [--tiers avx512,avx2] [--threads N] [--repeats N]

Prints a Markdown table of roofline shares, one column a folder and tier, below what
`latentcore bench --json` says of each; --json FILE keeps all of it.
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
    lines.append(
        ["read bandwidth, GB/s", *(f"{r['ceilings']['read_bandwidth'] / 1e9:.1f}" for r in runs)]
    )
    lines.append(["peaks, Top/s", *(peaks(run) for run in runs)])
    for at, case in enumerate(runs[0]["results"]):
        found = [run["results"][at] for run in runs]
        lines.append([f"{case['case']}: share", *(f"{c['share']:.2f}" for c in found)])
        lines.append(["tokens/s", *(f"{c['tokens_per_second']:.1f}" for c in found)])
        fabric = (c["fabric"] for c in found)
        text = (f"{100 * f['overhead']:.1f} %; {f['imbalance']:.3f}" for f in fabric)
        lines.append(["fabric; imbalance", *text])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peaks(run: dict[str, Any]) -> str:
    """All peaks of a run."""
    found = run["ceilings"]["peaks"].items()
    return ", ".join(f"{name} {peak / 1e12:.2f}" for name, peak in found)


def main() -> None:
    """Measures one folder and tier after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tiers", default="", help="comma-separated; default: the best")
    parser.add_argument("--json", type=Path, help="where to keep everything")
    args, options = parser.parse_known_args()
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
