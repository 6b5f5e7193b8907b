"""Fills the figures of MODEL_CARD.md from results.json and the log of the run.

python -m demo.card
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- figures: written by demo/card.py -->\n", "<!-- end of figures -->\n"


def percent(x: float) -> str:
    """A share; two decimals where one would round an imperfect one up to 100."""
    return f"{100 * x:.2f} %" if 0.9995 <= x < 1 else f"{100 * x:.1f} %"


def figures() -> str:
    """The tables, in Markdown."""
    results = json.loads((HERE / "results.json").read_text())
    log = [json.loads(line) for line in (HERE / "logs" / "run.jsonl").read_text().splitlines()]
    last = next(entry for entry in log if entry.get("finished"))
    # batches of short documents only: the others hold more raw text, and their loss is higher
    steps = [entry for entry in log if entry.get("longest") == 1024]
    shown = ", ".join(
        f"{e['mtp']:.2f} (step {e['step']:,})"
        for e in (steps[0], steps[len(steps) // 10], steps[len(steps) // 2], steps[-1])
    )
    size = results["parameters"]
    accepted = f"{percent(results['mtp']['accepted'])} of {results['mtp']['drafts']:,}"
    formatted = f"{percent(results['format']['in_format'])} of {results['format']['replies']:,}"
    lines = [
        "| | |",
        "|---|---|",
        f"| parameters in the file | {size['total']:,} (MTP layer: {size['mtp']:,}) |",
        f"| parameters of the main model | {size['main']:,} |",
        f"| active a token, without the embedding table | {size['active']:,} |",
        f"| tokens seen | {last['tokens']:,} in {last['steps']:,} steps |",
        f"| GPU time of the run | {last['minutes']} minutes of one H200, compilation apart |",
        f"| MTP loss | {shown} |",
        f"| greedy drafts of the MTP layer accepted | {accepted} |",
        f"| replies in format that ended by themselves | {formatted} |",
        "",
        "| skill | fresh problems | right | in format | drafts accepted |",
        "|---|---|---|---|---|",
    ]
    for name, skill in results["skills"].items():
        right = "not judged" if "format only" in name else percent(skill["right"])
        lines.append(
            f"| {name} | {skill['problems']} | {right} | {percent(skill['in_format'])} "
            f"| {percent(results['mtp']['by_skill'][name])} |"
        )
    lines += ["", "| held-out text | bits a byte | bytes |", "|---|---|---|"]
    for name, text in results["bits_per_byte"].items():
        lines.append(f"| {name} | {text['bits_per_byte']:.3f} | {text['bytes']:,} |")
    lines += [
        "",
        "Load of the routed experts, 1.00 being an even share: at the end of the run, on its own",
        "mixture, and on another one (six kinds of chats in equal parts, a fifth held-out text).",
        "",
        "| layer | run: least | most | other: least | most | other: all |",
        "|---|---|---|---|---|---|",
    ]
    pairs = list(zip(last["load"], results["expert_load"], strict=True))
    for i, (run, other) in enumerate(pairs):
        name = "MTP" if i == len(pairs) - 1 else str(i + 1)
        every = " ".join(f"{x:.2f}" for x in other)
        lines.append(
            f"| {name} | {min(run):.2f} | {max(run):.2f} "
            f"| {min(other):.2f} | {max(other):.2f} | {every} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the part between the markers."""
    card = HERE / "MODEL_CARD.md"
    head, rest = card.read_text().split(BEGIN)
    card.write_text(head + BEGIN + "\n" + figures() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
