"""The HTTP application: routes, streaming, errors."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from latentcore import __version__
from latentcore.engine.async_engine import AsyncEngine
from latentcore.server import openapi
from latentcore.server.errors import ApiError, as_api_error, validation_error
from latentcore.server.gate import Application, Gate
from latentcore.server.metrics import CONTENT_TYPE, Metrics
from latentcore.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from latentcore.server.service import ChatRun, CompletionRun, Service

logger = logging.getLogger("latentcore.server")

STATIC = Path(str(resources.files("latentcore"))) / "server" / "static"


@dataclass(frozen=True)
class ServerOptions:
    """How the server answers. Times in seconds, sizes in bytes."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    body_timeout: float = 30.0
    request_timeout: float | None = None
    log_bodies: bool = False
    read_bandwidth: float | None = None


def create_app(engine: AsyncEngine, options: ServerOptions) -> Application:
    """The whole application for one engine. It does not own the engine."""
    service = Service(engine, options.model_names, request_timeout=options.request_timeout)
    metrics = Metrics(engine, options.model_names[0], options.read_bandwidth)
    app = FastAPI(
        title="latentcore",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    _add_error_handlers(app)
    _add_routes(app, service, metrics)
    openapi.describe(app, needs_key=bool(options.api_keys))
    return Gate(
        app,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        body_timeout=options.body_timeout,
        log_bodies=options.log_bodies,
    )


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    engine = service.engine

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether the process is alive", response_model=openapi.Status)
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        summary="Whether requests can be served",
        response_model=openapi.Status,
        responses={503: {"model": openapi.Status, "description": "Dead or shutting down"}},
    )
    async def ready() -> Response:
        if engine.accepting:
            return JSONResponse({"status": "ready"})
        status = "dead" if engine.dead is not None else "shutting down"
        return JSONResponse({"status": status}, status_code=503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    # The documented models are not run over the answers: these are made in one place each.
    @app.get("/v1/models", responses={200: {"model": openapi.ModelList}})
    async def models() -> Response:
        return JSONResponse(service.models())

    @app.get(
        "/v1/models/{name:path}",
        responses={200: {"model": openapi.Model}, **openapi.errors(404)},
    )
    async def model(name: str) -> Response:
        return JSONResponse(service.model(name))

    @app.post(
        "/tokenize", responses={200: {"model": openapi.TokenizeAnswer}, **openapi.POST_ERRORS}
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        # Lists of tokens may be long: they are written on the thread too.
        return await asyncio.to_thread(lambda: JSONResponse(service.tokenize(body)))

    @app.post(
        "/detokenize", responses={200: {"model": openapi.DetokenizeAnswer}, **openapi.POST_ERRORS}
    )
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(service.detokenize, body))

    text = openapi.streamed(openapi.CompletionAnswer, openapi.CompletionAnswer)

    @app.post("/v1/completions", responses={200: text, **openapi.RUN_ERRORS})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        run = await service.completion(body)
        return await _answer(run, request, stream=bool(body.stream))

    chat = openapi.streamed(openapi.ChatCompletionAnswer, openapi.ChatCompletionChunk)

    @app.post("/v1/chat/completions", responses={200: chat, **openapi.RUN_ERRORS})
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        run = await service.chat(body)
        return await _answer(run, request, stream=bool(body.stream))

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)

    @app.get("/favicon.svg", include_in_schema=False)
    async def icon() -> Response:
        return FileResponse(STATIC / "favicon.svg")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


async def _answer(run: CompletionRun | ChatRun, request: Request, *, stream: bool) -> Response:
    if stream:
        return StreamingResponse(
            _events(run), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    return JSONResponse(await _unless_gone(run.whole, run.close, request))


async def _events(run: CompletionRun | ChatRun) -> AsyncIterator[str]:
    """Server-sent events; an error after the start is an event too, since the status is out."""
    try:
        async for chunk in run.chunks():
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except Exception as error:
        api_error = _noted(error)
        yield f"data: {json.dumps(api_error.body())}\n\n"
    finally:
        await run.close()
    yield "data: [DONE]\n\n"


async def _unless_gone(
    work: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
    close: Callable[[], Coroutine[Any, Any, None]],
    request: Request,
) -> dict[str, Any]:
    """Does the work, but stops as soon as the client has gone."""
    working = asyncio.ensure_future(work())
    listening = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away", kind="client_closed_request")
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await close()


async def _gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def _noted(error: BaseException) -> ApiError:
    """The client's view of an error; ours goes to the log."""
    api_error = as_api_error(error)
    if api_error.status == 500:
        logger.error("a request failed", exc_info=error)
    return api_error


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        api_error = _noted(error)
        return JSONResponse(
            api_error.body(), status_code=api_error.status, headers=api_error.headers
        )

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        api_error = validation_error(list(error.errors()))
        return JSONResponse(api_error.body(), status_code=api_error.status)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        message = error.detail
        if error.status_code == 404:
            message = f"there is nothing at {request.url.path[:200]}"
        api_error = ApiError(error.status_code, message, kind=kind)
        return JSONResponse(api_error.body(), status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    from latentcore.errors import LatentcoreError

    for kind in (ApiError, LatentcoreError, TimeoutError):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(Exception, on_error)
