"""Fixtures of these tests."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.engine.tiny import write_tiny_model
from tests.server.process import ServerProcess, serving
from tests.server.template import CHAT_TEMPLATE


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose chat template thinks and calls tools as V3.1's does."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on the small model, for all tests that do not stop it."""
    with serving(
        tiny_model,
        "--served-model-name",
        "tiny",
        "--served-model-name",
        "also-tiny",
        "--max-request-bytes",
        "1MB",
        "--body-timeout",
        "2",
        key="secret",
        cache=tmp_path_factory.mktemp("cache"),
    ) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()
