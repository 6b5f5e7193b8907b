"""The served OpenAPI document is true, and no request made from it is the server's own fault."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from latentcore.server import openapi
from tests.engine.fakes import FakeRunner
from tests.server.process import ServerProcess
from tests.server.test_app import run, serving
from tests.server.test_server import CHAT, TEXT, TOOLS, USER

EVERYTHING: dict[str, Any] = {
    TEXT: {"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 3, "logprobs": 2, "echo": True},
    CHAT: {"messages": USER, "max_tokens": 60, "logprobs": True, "top_logprobs": 2},
}
CALLS = {**EVERYTHING[CHAT], "tools": TOOLS, "tool_choice": "required"}
THOUGHTS = {**EVERYTHING[CHAT], "chat_template_kwargs": {"thinking": True}}


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    with server.http() as http:
        found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_invalid_requests_are_400_and_every_error_has_openais_form(document: Any) -> None:
    error = {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}
    assert "HTTPValidationError" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert "422" not in answers
            assert ("400" in answers) == ("requestBody" in operation)
            for status, answer in answers.items():
                if status >= "400" and path != "/ready":
                    assert answer["content"] == {"application/json": error}


def test_everything_that_is_referred_to_exists(document: Any) -> None:
    def references(node: Any) -> Any:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "$ref":
                yield value
            elif isinstance(value, dict | list):
                yield from references(value)

    found = set(references(document))
    assert len(found) > 20
    names = document["components"]["schemas"]
    assert found <= {f"#/components/schemas/{name}" for name in names}
    for path in (TEXT, CHAT):
        whole = document["paths"][path]["post"]["responses"]["200"]["content"]
        event = whole["text/event-stream"]["schema"]["description"]
        assert any(f"`data: {name}`" in event for name in names)


def test_keys_stand_where_they_are_asked_for(document: Any) -> None:
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            needed = path not in ("/health", "/ready", "/metrics")
            assert (operation.get("security") == [{"key": []}]) == needed
            assert ("401" in operation["responses"]) == needed


def test_a_server_without_keys_does_not_speak_of_them() -> None:
    async def test() -> None:
        async with serving(FakeRunner()) as (_, client):
            free = (await client.get("/openapi.json")).json()
            assert "securitySchemes" not in free["components"]
            assert '"security"' not in json.dumps(free)

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        (TEXT, EVERYTHING[TEXT], openapi.CompletionAnswer, openapi.CompletionAnswer),
        (CHAT, EVERYTHING[CHAT], openapi.ChatCompletionAnswer, openapi.ChatCompletionChunk),
        (CHAT, CALLS, openapi.ChatCompletionAnswer, openapi.ChatCompletionChunk),
        (CHAT, THOUGHTS, openapi.ChatCompletionAnswer, openapi.ChatCompletionChunk),
    ],
)
def test_answers_have_the_fields_of_the_document_and_no_others(
    server: ServerProcess,
    path: str,
    body: dict[str, Any],
    whole: type[BaseModel],
    chunk: type[BaseModel],
) -> None:
    with server.http() as http:
        whole.model_validate(http.post(path, json=body).json())
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        answer = http.post(path, json=stream)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert len(events) > 3
    for event in events:
        chunk.model_validate_json(event.removeprefix("data: "))


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.slow
def test_random_requests_are_answered_as_documented(server: ServerProcess, tmp_path: Path) -> None:
    pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed: pip install 'latentcore[slow]'"
    )
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += [
        "run",
        f"{server.url}/openapi.json",
        "--header",
        f"Authorization: Bearer {server.key}",
    ]
    command += ["--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing"]
    command += ["--max-examples", "60", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    server.wait_idle()
