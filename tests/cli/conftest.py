"""Fixtures of these tests."""

from pathlib import Path

import pytest

from tests.engine.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model; see `write_tiny_model`."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
