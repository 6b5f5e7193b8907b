"""`latentcore serve`: an OpenAI-compatible server."""

import enum
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from latentcore.cli.options import (
    EnforceEagerOption,
    MaxModelLenOption,
    Quantization,
    QuantizationOption,
    ThreadsOption,
)
from latentcore.envs import parse_bytes
from latentcore.errors import UserError


class LogLevel(enum.StrEnum):
    """Values of --log-level."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's values the defaults of the command's options."""
    if path is None:
        return None
    try:
        values: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from None
    known = {parameter.name for parameter in context.command.params} - {"config", "help"}
    defaults = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(defaults.keys() - known)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]!r} is not an option of serve; known are "
            f"{', '.join(sorted(name for name in known if name))}"
        )
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model's folder, or a Hugging Face repository. Default: the demo model.",
            show_default=False,
            envvar="LATENTCORE_MODEL",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Ask for this key; may be repeated.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option("--served-model-name", help="What clients call the model; may be repeated."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", help="Most requests computed together.")
    ] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Most tokens computed in a step.")
    ] = 512,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Most requests waiting; more get 429.")
    ] = 256,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-cache-memory", help="For the latent cache. Default: half of what is free."
        ),
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse the cache of equal beginnings.",
        ),
    ] = True,
    quantization: QuantizationOption = Quantization.AUTO,
    threads: ThreadsOption = None,
    max_model_len: MaxModelLenOption = None,
    enforce_eager: EnforceEagerOption = False,
    max_request_bytes: Annotated[
        str, typer.Option("--max-request-bytes", help="Largest body of a request.")
    ] = "16MiB",
    body_timeout: Annotated[
        float, typer.Option("--body-timeout", min=0.1, help="Seconds for a body to arrive.")
    ] = 30.0,
    request_timeout: Annotated[
        float | None,
        typer.Option("--request-timeout", min=0.1, help="Seconds for a whole request."),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option("--drain-timeout", min=0.0, help="Seconds to finish what runs on SIGTERM."),
    ] = 30.0,
    log_level: Annotated[LogLevel, typer.Option("--log-level")] = LogLevel.INFO,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log requests' bodies, prompts included.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=_load_config,
            help="A TOML file with values for these options; the command line goes first.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's protocol, with a chat page at /."""
    cache_bytes = (
        None if kv_cache_memory is None else parse_bytes("--kv-cache-memory", kv_cache_memory)
    )
    body_bytes = parse_bytes("--max-request-bytes", max_request_bytes)

    from latentcore.config import EngineConfig
    from latentcore.server.app import ServerOptions
    from latentcore.server.run import configure_logging, listen
    from latentcore.server.run import serve as run

    engine_config = EngineConfig(
        quantization=quantization.value,
        threads=threads,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=cache_bytes,
        use_graph=not enforce_eager,
        enable_prefix_caching=enable_prefix_caching,
        seed=int.from_bytes(os.urandom(7), "little"),
    )
    listener = listen(host, port)

    from latentcore.cli.session import loading_progress
    from latentcore.engine.async_engine import AsyncEngine
    from latentcore.engine.bandwidth import machine_read_bandwidth

    progress, finish = loading_progress()
    try:
        engine = AsyncEngine(
            model, engine_config=engine_config, max_waiting=max_waiting, progress=progress
        )
    finally:
        finish()
    options = ServerOptions(
        model_names=tuple(served_model_name or [engine.loaded.name]),
        api_keys=tuple(api_key or ()),
        max_body_bytes=body_bytes,
        body_timeout=body_timeout,
        request_timeout=request_timeout,
        log_bodies=log_requests,
        read_bandwidth=machine_read_bandwidth(),
    )
    configure_logging(log_level.value)
    raise typer.Exit(run(engine, options, listener, drain_timeout=drain_timeout))
