"""Roofline share of every op, scheme and tier: `latentcore bench --kernels` as a Markdown table.

    python benchmarks/kernels.py [MODEL] [--tier avx512] [--threads N] [--json FILE]

Options that are not named here go to `latentcore bench`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> str:
    """Shares by op, shape and rows, one column a scheme and tier."""
    columns = list(dict.fromkeys((r["scheme"], r["tier"]) for r in found["results"]))
    cells: dict[tuple[str, str, int], dict[tuple[str, str], str]] = {}
    for r in found["results"]:
        row = cells.setdefault((r["op"], r["shape"], r["rows"]), {})
        row[r["scheme"], r["tier"]] = f"{r['share']:.2f}"
    lines = [["op", "rows", *(" ".join(c) for c in columns)], ["---"] * (len(columns) + 2)]
    for (op, shape, rows), shares in cells.items():
        name = f"{op}, {shape}" if shape else op
        lines.append([name, str(rows), *(shares.get(c, "") for c in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the command and lays its figures out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to keep everything")
    args, options = parser.parse_known_args()
    command = [sys.executable, "-m", "latentcore", "bench", "--kernels", "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    print(found["machine"], *found["warnings"], sep="\n", file=sys.stderr)
    for tier, ceilings in found["ceilings"].items():
        print(tier, ceilings, file=sys.stderr)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
