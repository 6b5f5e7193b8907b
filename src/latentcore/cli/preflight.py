"""`latentcore preflight`: is this checkpoint ready to run here?"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcore.cli.options import (
    JsonOption,
    MaxModelLenOption,
    Quantization,
    QuantizationOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from latentcore.engine.preflight import Report

NOT_READY = 1
"""Exit code when problems were found."""


def preflight(
    folder: Annotated[Path, typer.Argument(help="A model's folder.", show_default=False)],
    quantization: QuantizationOption = Quantization.AUTO,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", help="Most sequences in one step.")
    ] = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check a checkpoint without reading its weights.

    Exit code 0: ready. 1: not ready, with every problem listed. 2: no such model.
    """
    from latentcore.config import EngineConfig
    from latentcore.engine.preflight import measure_machine
    from latentcore.engine.preflight import preflight as run

    engine = EngineConfig(
        quantization=quantization.value, threads=threads, max_model_len=max_model_len
    )
    if max_num_seqs is not None:
        engine = replace(engine, max_num_seqs=max_num_seqs)
    report = run(folder, engine)
    if report.tier is not None and report.weight_bytes_per_token:
        report.machine = measure_machine(engine)
    if json_output:
        print(json.dumps(as_json(report), indent=2))
    else:
        show(report)
    if not report.ready:
        raise typer.Exit(NOT_READY)


def as_json(report: "Report") -> dict[str, Any]:
    """The report for --json, sizes in bytes."""
    data = asdict(report)
    data["folder"] = str(report.folder)
    data["ready"] = report.ready
    data["tokens_per_second"] = report.tokens_per_second()
    return data


def show(report: "Report") -> None:
    """Prints the report for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for name, value in _lines(report):
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(value))
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)
    for problem in report.problems:
        console.print(f"[red]problem[/red]: {escape(problem)}", soft_wrap=True)
    count = len(report.problems)
    verdict = "ready" if report.ready else f"not ready: {count} problem{'s' * (count > 1)}"
    console.print(f"[bold]{verdict}[/bold] (checked in {report.seconds:.1f} s, no weight read)")


def _lines(report: "Report") -> list[tuple[str, str]]:
    from latentcore.models.memory import format_bytes

    lines: list[tuple[str, str]] = []
    if report.summary is not None:
        lines.append(("architecture", f"{report.model_type}: {report.summary}"))
    if report.tensors is not None:
        lines.append(("checkpoint", f"{report.tensors} tensors in {report.shards} files"))
    lines += [(f"layers {layers}", text) for layers, text in _scheme_lines(report.schemes)]
    if report.parameters is not None and report.active_parameters is not None:
        active = f"{_count(report.active_parameters)} active a token"
        lines.append(("parameters", f"{_count(report.parameters)}, {active}"))
    figures = report.memory
    if figures is not None:
        weights = f"weights {format_bytes(figures.weights)}"
        peak = f"loading: at most {format_bytes(figures.loading_peak)}"
        available = f"available {format_bytes(figures.available)}"
        lines.append(("memory", f"{weights} ({peak}), {available}"))
        cache = f"{format_bytes(figures.cache_per_1000)} for 1,000 tokens"
        if figures.cache is not None and figures.buffers is not None:
            cache += (
                f"; {format_bytes(figures.cache)} for {figures.cache_tokens} tokens, sequences of "
                f"up to {figures.max_model_len}; buffers {format_bytes(figures.buffers)}"
            )
        lines.append(("cache", cache))
    if report.packed is not None:
        lines.append(("packed on disk", report.packed.line()))
    machine = report.machine
    if machine is not None:
        reads = f"reads {format_bytes(machine.read_bandwidth)}/s"
        lines.append(("machine", f"{machine.tier}, {machine.threads} threads, {reads}"))
    speeds = report.tokens_per_second()
    for batch, nbytes in report.weight_bytes_per_token.items():
        speed = f", at most {speeds[batch]:.1f} tokens/s here" if batch in speeds else ""
        lines.append((f"batch {batch}", f"{format_bytes(nbytes)} of weights a token{speed}"))
    return lines


def _scheme_lines(runs: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """Runs of layers with one scheme for all weights are joined and named once."""
    lines: list[tuple[str, str]] = []
    for layers, schemes in runs.items():
        if len(set(schemes.values())) == 1:
            text = next(iter(schemes.values()))
        else:
            text = ", ".join(f"{role} {scheme}" for role, scheme in schemes.items())
        if lines and lines[-1][1] == text:
            first = lines.pop()[0].split("-")[0]
            layers = f"{first}-{layers.split('-')[-1]}"
        lines.append((layers, text))
    return lines


def _count(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f} billion"
    return f"{parameters / 1e6:.1f} million"
