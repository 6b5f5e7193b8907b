"""`latentcore pack`: makes the packed weights that starts read, ahead of the first start."""

from typing import Annotated

import typer

from latentcore.cli.options import Quantization, QuantizationOption, ThreadsOption


def pack(
    model: Annotated[
        str,
        typer.Argument(help="A model's folder, or a Hugging Face repository.", show_default=False),
    ],
    quantization: QuantizationOption = Quantization.AUTO,
    threads: ThreadsOption = None,
) -> None:
    """Pack a checkpoint into the cache folder, so that its first start is quick too.

    Needs memory for one layer at a time. A pack that is there already is read and checked.
    """
    from latentcore.cli.session import loading_progress
    from latentcore.config import EngineConfig, ModelConfig
    from latentcore.envs import cache_limit
    from latentcore.errors import UserError
    from latentcore.models.checkpoint import Checkpoint
    from latentcore.models.hub import resolve_model
    from latentcore.models.loader import pack_ahead
    from latentcore.models.memory import format_bytes
    from latentcore.models.resolve import resolve
    from latentcore.ops import runtime

    if cache_limit() == 0:
        raise UserError("LATENTCORE_CACHE_LIMIT is 0: the packed cache is turned off")
    engine = EngineConfig(quantization=quantization.value, threads=threads)
    folder = resolve_model(model)
    config = ModelConfig.from_dir(folder)
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(config, checkpoint, engine.quantization)
        runtime.set_threads(engine.threads or runtime.default_threads())
        progress, finish = loading_progress()
        try:
            made, before = pack_ahead(plan, checkpoint, progress)
        finally:
            finish()
            runtime.set_threads(1)
    state = "was there, and is sound" if before else "made"
    print(f"{made.path} ({format_bytes(made.nbytes)}): {state}")
