"""Random requests made from the served OpenAPI document: none may be the server's own fault."""

import subprocess
import sys

import pytest

from tests.server.process import ServerProcess


@pytest.mark.slow
def test_no_request_is_a_server_error(server: ServerProcess) -> None:
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += [
        "run",
        f"{server.url}/openapi.json",
        "--header",
        f"Authorization: Bearer {server.key}",
    ]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing"]
    command += ["--max-examples", "60", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:]
    server.wait_idle()
