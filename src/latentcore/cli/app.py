"""The `latentcore` program: its commands, and how errors leave it."""

import contextlib
import errno
import logging
import os
import resource
import sys
from typing import Annotated, Any

import typer

from latentcore import __version__
from latentcore.cli import bench, cache, chat, generate, pack, preflight, quantize, serve
from latentcore.cli.interrupted import EXIT_INTERRUPTED, say_interrupted
from latentcore.errors import InsufficientMemoryError, UserError

EXIT_BUG = 1
EXIT_USER_ERROR = 2

_LIBRARIES_BYTES = 750_000_000
"""Address space that importing PyTorch and the tokenizer takes, at least."""

_OUT_OF_MEMORY = (
    "failed to map segment",  # the dynamic linker, for a library
    "cannot allocate memory",
    "can't allocate memory",  # PyTorch
    "bad_alloc",
    "can't start new thread",
)

_ClickException: Any = typer.BadParameter.__mro__[2]
"""The root of the exceptions that the option parser raises; typer does not export it."""

app = typer.Typer(
    name="latentcore",
    help="Runs DeepSeek-architecture language models on CPUs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        print(f"latentcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    _require_address_space()


app.command()(generate.generate)
app.command()(chat.chat)
# Every option of the server may be set by a variable: --max-num-seqs is LATENTCORE_MAX_NUM_SEQS.
app.command(context_settings={"auto_envvar_prefix": "LATENTCORE"})(serve.serve)
app.command()(preflight.preflight)
app.command()(pack.pack)
app.add_typer(cache.app)
app.command()(quantize.quantize)
app.command()(bench.bench)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program on `arguments` (sys.argv by default) and returns its exit code.

    What the user did wrong is `error: ...` on stderr and exit code 2. Set PYTHONDEVMODE=1 to see
    the traceback of anything else.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("huggingface_hub").propagate = False  # it writes to stderr by itself
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.ERROR, "error")
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            say_interrupted()
    except UserError as error:
        return _fail(str(error))
    except _ClickException as error:
        message = error.format_message()
        return _fail(message) if message else EXIT_USER_ERROR  # none where it was the help
    except (KeyboardInterrupt, typer.Abort):
        say_interrupted()
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return EXIT_BUG
    except Exception as error:
        if _lacks_memory(error):
            return _fail(_memory_line(error))
        if isinstance(error, OSError) and error.errno is not None:
            _drop_output()  # it may be what could not be written
            place = "" if error.filename is None else f"{error.filename}: "
            return _fail(f"{place}{error.strerror}")
        if sys.flags.dev_mode:
            raise
        _fail(f"{type(error).__name__}: {error} (unexpected; PYTHONDEVMODE=1 shows where)")
        return EXIT_BUG
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """Sends what is left for standard output nowhere, so that the flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_address_space() -> None:
    """Refuses a limit in which the libraries, loaded next, would abort instead of raising."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LIBRARIES_BYTES:
        raise InsufficientMemoryError(
            f"not enough memory: the libraries alone need {_LIBRARIES_BYTES / 1e6:.0f} MB of "
            f"address space, this process is limited to {limit / 1e6:.0f} MB (ulimit -v)"
        )


def _lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed: Python's, PyTorch's, or the mapping of a library."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return any(sign in text for sign in _OUT_OF_MEMORY)


def _memory_line(error: Exception) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    bound = ""
    if limit != resource.RLIM_INFINITY:
        bound = f"; this process is limited to {limit / 1e9:.1f} GB (ulimit -v)"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"not enough memory{bound} ({reason})"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
