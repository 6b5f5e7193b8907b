"""Errors in OpenAI's form."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from latentcore.engine.async_engine import EngineClosedError, EngineDeadError, QueueFullError
from latentcore.engine.engine import StepFailedError
from latentcore.engine.structured import GrammarDeadEndError, GrammarTooSlowError
from latentcore.errors import UserError

RETRY_AFTER_SECONDS = 2

_PARAMETER = re.compile(r"(\w+(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*):")
"""What an error's text begins with where a parameter is at fault: `messages[2].content:`."""


class ApiError(Exception):
    """An answer other than 200: status, OpenAI's `type`, `code` and `param`, one line of text."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.encode("utf-8", "replace").decode()
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        text = str(error)
        found = _PARAMETER.match(text)
        return ApiError(400, text, param=found and found.group(1))
    if isinstance(error, QueueFullError):
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, EngineClosedError):
        return ApiError(
            503,
            str(error),
            kind="service_unavailable",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has stopped", kind="service_unavailable")
    if isinstance(error, GrammarDeadEndError):
        return ApiError(400, str(error), code="grammar_dead_end")
    if isinstance(error, GrammarTooSlowError):
        return ApiError(400, str(error), code="grammar_too_slow")
    if isinstance(error, StepFailedError):
        return ApiError(500, str(error), kind="server_error", code="step_failed")
    if isinstance(error, TimeoutError):
        return ApiError(408, "the request took longer than the server's limit", kind="timeout")
    return ApiError(500, "an internal error; the server's log says more", kind="server_error")


def validation_error(details: list[ErrorDetails]) -> ApiError:
    """One line for the first thing that is wrong with a body."""
    # Where a field may have several forms, each has an error: the form that fits furthest counts.
    field = [part for part in details[0]["loc"] if part not in ("body", "query")][:1]
    same = [one for one in details if [p for p in one["loc"] if p != "body"][:1] == field]
    first = max(same, key=lambda one: len(one["loc"]))
    unknown = first["type"] == "extra_forbidden"
    name = _place([part for part in first["loc"] if part not in ("body", "query")], unknown=unknown)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if unknown:
        return ApiError(400, f"{name}: this field is not known here", param=name)
    return ApiError(400, f"{name or 'body'}: {first['msg'][:300]}", param=name or None)


_FORM = re.compile(r"str|int|float|bool|[A-Z]\w*|.*\[.*", re.DOTALL)
"""What pydantic calls the forms of a field in an error's place; no field has such a name."""


def _place(path: Sequence[int | str], *, unknown: bool) -> str:
    """`messages[2].content`. `unknown`: the path ends in a name of the client's own."""
    place = ""
    for number, part in enumerate(path[:8]):
        if isinstance(part, int):
            place += f"[{part}]"
        elif (unknown and number == len(path) - 1) or not _FORM.fullmatch(part):
            place += f".{part[:100]}" if place else part[:100]
    return place
