"""`latentcore bench`: how fast a model runs here, and how fast it could."""

import enum
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcore.cli.options import (
    EnforceEagerOption,
    JsonOption,
    Quantization,
    QuantizationOption,
    ThreadsOption,
)
from latentcore.errors import UserError

if TYPE_CHECKING:
    from latentcore.bench.kernels import KernelsResult
    from latentcore.bench.machine import Ceilings, Disturbance, Machine
    from latentcore.bench.model import Case, CaseResult, ModelResult

DEFAULT_DECODE = ("1x128", "1x2048", "8x128", "32x128")
DEFAULT_PREFILL = (512, 2048)


class Tier(enum.StrEnum):
    """Values of --tier."""

    AVX2 = "avx2"
    AVX512 = "avx512"
    AMX = "amx"


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model's folder, or a Hugging Face repository. Default: the bundled demo model; "
            "with --kernels, the shapes of the benchmark model.",
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            "--decode",
            metavar="BATCHxCONTEXT",
            help="Measure decoding of so many sequences with so many tokens; may be repeated. "
            f"Default: {' '.join(DEFAULT_DECODE)}.",
        ),
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option(
            "--prefill",
            metavar="TOKENS",
            help="Measure reading a prompt of so many tokens; may be repeated. "
            f"Default: {' '.join(map(str, DEFAULT_PREFILL))}.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Measurements of each case.")
    ] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show each kernel's time, share and imbalance.")
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure every op, in every scheme and tier, instead."),
    ] = False,
    tier: Annotated[
        Tier | None,
        typer.Option("--tier", help="Instruction set. Default: the best; with --kernels, each."),
    ] = None,
    quantization: QuantizationOption = Quantization.AUTO,
    threads: ThreadsOption = None,
    enforce_eager: EnforceEagerOption = False,
    json_output: JsonOption = False,
) -> None:
    """Measure speed beside what this machine allows.

    A share is the least possible time over the measured one: the least is the larger of bytes /
    read bandwidth and arithmetic / peak, both measured beside each case by the same threads.
    """
    if kernels:
        for name, given in (
            ("--decode", decode),
            ("--prefill", prefill),
            ("--profile", profile),
            ("--enforce-eager", enforce_eager),
        ):
            if given:
                raise UserError(f"{name} measures a model; leave it out with --kernels")
        kernels_result = _kernels(model, repeats, tier, quantization, threads)
        if json_output:
            print(json.dumps(kernels_as_json(kernels_result), indent=2))
        else:
            _show_kernels(kernels_result)
        return
    default = decode is None and prefill is None
    cases = _cases(
        DEFAULT_DECODE if default else decode or (), DEFAULT_PREFILL if default else prefill or ()
    )
    result = _model(model, cases, repeats, tier, quantization, threads, not enforce_eager)
    if json_output:
        print(json.dumps(model_as_json(result), indent=2))
    else:
        _show_model(result, profile)


def _cases(decode: Iterable[str], prefill: Iterable[int]) -> list["Case"]:
    from latentcore.bench.model import DecodeCase, PrefillCase

    cases: list[Case] = []
    for text in decode:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise UserError(f"--decode: expected BATCHxCONTEXT such as 8x128, found {text!r}")
        cases.append(DecodeCase(int(match[1]), int(match[2])))
    for tokens in prefill:
        if tokens < 1:
            raise UserError(f"--prefill: expected at least 1 token, found {tokens}")
        cases.append(PrefillCase(tokens))
    return cases


def _model(
    model: str | None,
    cases: Sequence["Case"],
    repeats: int,
    tier: Tier | None,
    quantization: Quantization,
    threads: int | None,
    use_graph: bool,
) -> "ModelResult":
    from latentcore.bench.model import bench_model, engine_config
    from latentcore.cli.session import loading_progress
    from latentcore.engine.loading import model_name
    from latentcore.models.hub import resolve_model
    from latentcore.models.runner import ModelRunner
    from latentcore.ops import runtime

    with ExitStack() as stack:
        if tier is not None:
            stack.enter_context(runtime.forced_tier(tier.value))
        folder = resolve_model(model)
        config = engine_config(cases, quantization.value, threads, use_graph=use_graph)
        progress, finish = loading_progress()
        try:
            runner = ModelRunner.load(folder, config, progress)
        finally:
            finish()
        stack.callback(runner.close)
        with _noting() as note:
            return bench_model(runner, model_name(model, folder), cases, repeats, note)


def _kernels(
    model: str | None,
    repeats: int,
    tier: Tier | None,
    quantization: Quantization,
    threads: int | None,
) -> "KernelsResult":
    from latentcore.bench.kernels import bench_kernels
    from latentcore.config import ModelConfig
    from latentcore.models.hub import resolve_model
    from latentcore.models.synthetic import benchmark_config
    from latentcore.ops import runtime
    from latentcore.quant.schemes import SCHEMES

    if model is None:
        config = ModelConfig.from_dict(benchmark_config(dense=10944, vocab=32000))
    else:
        config = ModelConfig.from_dir(Path(resolve_model(model)))
    runtime.isa_tier()
    tiers = [tier.value] if tier else [t.value for t in Tier if t.value in runtime.cpu_features()]
    if quantization is Quantization.AUTO:
        schemes = list(SCHEMES)
    else:
        schemes = ["bf16" if quantization is Quantization.UNQUANT else quantization.value]
    runtime.set_threads(threads or runtime.default_threads())
    try:
        with _noting() as note:
            return bench_kernels(config, schemes, tiers, repeats, note)
    finally:
        runtime.set_threads(1)
        runtime.release_scratch()


@contextmanager
def _noting() -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr: a line that changes on a terminal, a line for each thing elsewhere."""
    from rich.console import Console

    from latentcore.cli.session import write_note

    console = Console(stderr=True)
    if sys.stderr.isatty():
        with console.status("") as status:

            def update(what: str, done: int, total: int) -> None:
                status.update(f"{what}: {done + 1} of {total}")

            yield update
        return
    last = ""

    def line(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            write_note(f"measuring {what}")
        last = what

    yield line


# ---- what is shown -----------------------------------------------------------------------------


def model_as_json(result: "ModelResult") -> dict[str, Any]:
    """For --json: seconds, bytes, operations a second."""
    data = asdict(result)
    data["ceilings"] = _ceilings_as_json(result.ceilings)
    for found, case in zip(data["results"], result.results, strict=True):
        found["ceilings"] = _ceilings_as_json(case.ceilings)
        for kernel, part in zip(found["fabric"]["kernels"], case.fabric.kernels, strict=True):
            kernel["imbalance"] = part.imbalance
    data["warnings"] = _warnings(result.disturbance)
    return data


def kernels_as_json(result: "KernelsResult") -> dict[str, Any]:
    """For --json: seconds, bytes, operations a second."""
    data = asdict(result)
    data["ceilings"] = {t: _ceilings_as_json(c) for t, c in result.ceilings.items()}
    data["warnings"] = _warnings(result.disturbance)
    return data


def _ceilings_as_json(ceilings: "Ceilings") -> dict[str, Any]:
    return {
        "read_bandwidth": ceilings.read_bandwidth,
        "peaks": {fmt.name.lower(): peak for fmt, peak in ceilings.peaks.items()},
    }


def _warnings(disturbance: "Disturbance") -> list[str]:
    warning = disturbance.warning()
    return [] if warning is None else [warning]


def _header(machine: "Machine", disturbance: "Disturbance") -> None:
    print(machine.line())
    for warning in _warnings(disturbance):
        print(f"warning: {warning}")


def _ceilings_line(ceilings: "Ceilings") -> str:
    peaks = ", ".join(f"{fmt.name.lower()} {p / 1e9:.0f}" for fmt, p in ceilings.peaks.items())
    return f"reads {ceilings.read_bandwidth / 1e9:.1f} GB/s; peaks in Gop/s: {peaks}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns in line, the first to the left: plain text that can be copied."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _show_model(result: "ModelResult", profile: bool) -> None:
    _header(result.machine, result.disturbance)
    print(f"{result.model}: mostly {result.format.lower()}; {_ceilings_line(result.ceilings)}")
    loading = ", ".join(f"{what} {took:.2f} s" for what, took in result.load_seconds.items())
    print(f"loading: {loading}; weights: {result.placement.line()}")
    print(f"medians of {result.repeats}, with the lowest and the highest time\n")
    _table(
        (
            *("", "ms", "low", "high", "tokens/s", "share", "limit", "GB/s"),
            *("fabric", "imbalance", "experts"),
        ),
        [
            (
                case.case,
                f"{case.seconds.median * 1e3:.2f}",
                f"{case.seconds.low * 1e3:.2f}",
                f"{case.seconds.high * 1e3:.2f}",
                f"{case.tokens_per_second:.1f}",
                f"{case.share:.3f}",
                case.limit,
                f"{case.ceilings.read_bandwidth / 1e9:.1f}",
                f"{case.fabric.overhead:.1%}",
                f"{case.fabric.imbalance:.3f}",
                "" if case.experts is None else f"{case.experts:.1f}",
            )
            for case in result.results
        ],
    )
    print(
        "\nshare: least possible time / measured; GB/s: read bandwidth around the case; "
        "fabric: time that is not the kernels' own; imbalance: slowest thread / mean"
    )
    if profile:
        for case in result.results:
            _show_profile(case)


def _show_profile(case: "CaseResult") -> None:
    print(f"\n{case.case}")
    total = sum(kernel.seconds for kernel in case.fabric.kernels)
    _table(
        ("kernel", "runs", "ms", "of step", "own ms", "waiting", "imbalance", "share"),
        [
            (
                kernel.kernel,
                str(kernel.runs),
                f"{kernel.seconds * 1e3:.3f}",
                f"{kernel.seconds / total:.1%}",
                f"{kernel.own * 1e3:.3f}",
                f"{max(0.0, 1 - kernel.own / kernel.seconds):.1%}",
                f"{kernel.imbalance:.3f}",
                "" if kernel.share is None else f"{kernel.share:.3f}",
            )
            for kernel in case.fabric.kernels
        ],
    )


def _show_kernels(result: "KernelsResult") -> None:
    _header(result.machine, result.disturbance)
    for tier, ceilings in result.ceilings.items():
        print(f"{tier}: {_ceilings_line(ceilings)}")
    print(f"medians of {result.repeats}\n")
    _table(
        ("op", "scheme", "tier", "rows", "us", "low", "high", "GB/s", "Gop/s", "share", "limit"),
        [
            (
                f"{r.op}, {r.shape}" if r.shape else r.op,
                r.scheme,
                r.tier,
                str(r.rows),
                f"{r.seconds.median * 1e6:.1f}",
                f"{r.seconds.low * 1e6:.1f}",
                f"{r.seconds.high * 1e6:.1f}",
                f"{r.bytes_per_second / 1e9:.1f}",
                f"{r.operations_per_second / 1e9:.1f}",
                f"{r.share:.3f}",
                r.limit,
            )
            for r in result.results
        ],
    )
