"""`latentcore quantize`: writes a checkpoint in another published format."""

import enum
from pathlib import Path
from typing import Annotated

import typer


class Form(enum.StrEnum):
    """Values of --to."""

    BF16 = "bf16"
    W8A8_INT8 = "w8a8_int8"
    FP8 = "fp8"
    COMPRESSED_TENSORS = "compressed-tensors"


def quantize(
    source: Annotated[
        str,
        typer.Argument(help="A model's folder, or a Hugging Face repository.", show_default=False),
    ],
    destination: Annotated[
        Path, typer.Argument(help="The folder to write; empty or absent.", show_default=False)
    ],
    to: Annotated[Form, typer.Option("--to", help="The format to write.", show_default=False)],
) -> None:
    """Write a checkpoint in another published weight format.

    Linear weights are converted by the exact quantizers (int8: a scale a row; FP8: a scale a
    128 x 128 block); the router, norms, embedding and output head stay as they are.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from latentcore.models.hub import resolve_model
    from latentcore.models.quantize import quantize_checkpoint

    folder = resolve_model(source)
    bar = Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(f"writing {to}", total=None)

    def progress(done: int, total: int) -> None:
        bar.start()  # not before everything has been checked
        bar.update(task, completed=done, total=total)

    try:
        quantize_checkpoint(folder, destination, to.value, progress)
    finally:
        if bar.live.is_started:
            bar.stop()
