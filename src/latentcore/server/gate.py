"""The first thing a request meets: its key, its size, the time it takes to come, its log line.

A plain ASGI application around the real one, so that nothing is parsed or kept of a request that is
refused.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from latentcore.server.errors import ApiError

logger = logging.getLogger("latentcore.server")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/", "/favicon.svg"})
"""Paths that need no key. The chat page's own files are open too; what it asks for is not."""


class Gate:
    """Checks keys and limits, gives every request an id, and logs one line a request."""

    def __init__(
        self,
        application: Application,
        *,
        api_keys: tuple[str, ...],
        max_body_bytes: int,
        body_timeout: float,
        log_bodies: bool,
    ) -> None:
        self._application = application
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout
        self._log_bodies = log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        started = time.monotonic()
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        body = b""
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            body = await self._read_body(headers, receive)
        except ApiError as error:
            await send_error(send_noting, error)
        else:
            await self._application(scope, _replay(body, receive), send_noting)
        finally:
            self._log(scope, request_id, status, time.monotonic() - started, body)

    def _check_key(self, path: str, authorization: bytes) -> None:
        if not self._keys or path in OPEN_PATHS or path.startswith("/static/"):
            return
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, each in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip()
        if encoding.lower() not in ("", "identity"):
            raise ApiError(
                415,
                f"Content-Encoding {encoding[:40]!r}: compressed bodies are not read here; send "
                "the body as it is",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "identity", "Connection": "close"},
            )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ApiError(400, "the client went away before its body was complete")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._body_timeout:g} s",
                kind="timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body_bytes} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float, body: bytes) -> None:
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if self._log_bodies and body:
            fields["body"] = body.decode("utf-8", "replace")
        quiet = scope["path"] in OPEN_PATHS and not self._log_bodies
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


async def send_error(send: Send, error: ApiError) -> None:
    """Answers with an error in OpenAI's form."""
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already, then whatever comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def _request_id(given: bytes | None) -> str:
    if given and len(given) <= 128:
        text = given.decode("latin-1")
        if all(character.isalnum() or character in "-_.:" for character in text):
            return text
    return uuid.uuid4().hex
