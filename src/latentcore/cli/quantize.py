"""`latentcore quantize`: writes a checkpoint in another published format."""

from pathlib import Path
from typing import Annotated

import typer
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


def quantize(
    source: Annotated[str, typer.Argument(help="A model folder, or a Hugging Face repository id.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; empty or absent.")],
    to: Annotated[
        str,
        typer.Option("--to", help="bf16, w8a8_int8, fp8 or compressed-tensors."),
    ],
) -> None:
    """Write a checkpoint in another published weight format.

    Linear weights are converted by the exact quantizers (int8: a scale a row; FP8: a scale a
    128 x 128 block); the router, norms, embedding and output head stay as they are.
    """
    folder = resolve_model(source)
    bar = Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(f"writing {to}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        quantize_checkpoint(folder, destination, to, progress)
