"""Running the application: uvicorn, signals, draining, logs, exit codes."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from latentcore.engine import structured
from latentcore.engine.async_engine import AsyncEngine
from latentcore.errors import UserError
from latentcore.server.app import ServerOptions, create_app

logger = logging.getLogger("latentcore.server")

EXIT_ENGINE_DEAD = 3
"""Exit code when the engine has died, for a supervisor to start the server again."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure_logging(level: str) -> None:
    """JSON lines on stderr from `level` (debug, info, warning, error) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("latentcore").setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, so that a port in use is found before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, every answer on
    # a kept connection waits some 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror})") from None
    listener.listen(2048)
    return listener


class _Server(uvicorn.Server):
    """uvicorn, but a signal ends in a clean exit and not in the signal's own death.

    After a second Ctrl-C (`hurried`) nobody is waited for; a third ends everything as it stands.
    """

    hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT and not self.hurried:
            self.hurried = True
        else:
            super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for one in signals:
            loop.add_signal_handler(one, self.handle_exit, one, None)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)


def serve(
    engine: AsyncEngine, options: ServerOptions, listener: socket.socket, *, drain_timeout: float
) -> int:
    """Serves until a signal or the engine's death; returns the process's exit code.

    On SIGTERM or SIGINT nothing new is taken; what runs may finish within `drain_timeout` seconds.
    """
    config = uvicorn.Config(
        create_app(engine, options),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # Behind `_drain`, for clients that do not read what they are told.
        timeout_graceful_shutdown=round(drain_timeout) + 5,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)

    async def main() -> None:
        beside = (_end_with_engine(engine, server), _drain(engine, server, drain_timeout))
        tasks = [asyncio.ensure_future(one) for one in beside]
        try:
            await server.serve(sockets=[listener])
        finally:
            for task in tasks:
                task.cancel()

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.warning("serving %s on http://%s:%d", options.model_names[0], shown, port)
    try:
        asyncio.run(main())
    finally:
        listener.close()
    died = engine.dead is not None
    engine.close()
    return EXIT_ENGINE_DEAD if died else 0


async def _end_with_engine(engine: AsyncEngine, server: uvicorn.Server) -> None:
    """Ends the server soon after the engine has died."""
    while engine.dead is None:
        await asyncio.sleep(0.2)
    # Long enough for /ready to be seen and for clients to be told.
    await asyncio.sleep(0.5)
    server.should_exit = True


async def _drain(engine: AsyncEngine, server: _Server, timeout: float) -> None:
    """Once the server is to end, lets requests finish; those that take too long are told so."""
    while not server.should_exit:
        await asyncio.sleep(0.05)
    draining = asyncio.ensure_future(engine.drain(timeout))
    while not draining.done() and not server.hurried:
        await asyncio.sleep(0.05)
    draining.cancel()
    left = engine.end_unfinished()
    await asyncio.to_thread(structured.close)
    if left:
        logger.warning("%d requests did not finish before the end", left)
