"""Finding a model by folder, by repository id, or by default; nothing here leaves this machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx2
import huggingface_hub
import pytest
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint, write_config
from huggingface_hub import errors

from latentcore.errors import CheckpointError, UserError
from latentcore.models import hub
from latentcore.models.hub import resolve_model


def test_folders_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="expected a model folder, found a file"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["./absent", "/no/such/folder", "a/b/c", "name", "", "../x/y", "a b/c", "org/", "~/x/y"]
)
def test_what_cannot_be_a_repository_is_not_looked_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("fetched")
    )
    with pytest.raises(CheckpointError, match="no such model folder"):
        resolve_model(name)


def test_repositories_are_fetched_without_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    seen: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        seen.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("deepseek-ai/DeepSeek-V2-Lite") == tmp_path
    assert seen["repo_id"] == "deepseek-ai/DeepSeek-V2-Lite"
    files = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tiktoken.model",
        "chat_template.jinja",
        "model-00001-of-000004.safetensors",
        "model.safetensors.index.json",
        "modeling_deepseek.py",
        "tokenization_kimi.py",
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "figures/benchmark.png",
        "README.md",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == files[:8]


def _response() -> Any:
    return MagicMock(headers={}, status_code=404, text="")


FAILURES: list[tuple[Exception, str]] = [
    (errors.RepositoryNotFoundError("404", response=_response()), "no such model: there is no"),
    (errors.GatedRepoError("403", response=_response()), "asks for consent first"),
    (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
    (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    (errors.HfHubHTTPError("500 bad\nmore", response=_response()), "cannot be fetched: 500 bad"),
    (errors.HFValidationError("bad id"), r"no such model: org/name \(bad id\)"),
    (OSError(28, "No space left on device"), "No space left on device; try again: the files"),
    (ConnectionResetError("reset"), "cannot be fetched: reset"),
    (httpx2.RemoteProtocolError("cut off"), "cannot be fetched: cut off; try again: the files"),
]


@pytest.mark.parametrize(
    ("failure", "message"), FAILURES, ids=[type(failure).__name__ for failure, _ in FAILURES]
)
def test_failures_are_one_clear_line(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model("org/name")
    assert "org/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_for_real(tmp_path: Path) -> None:
    code = (
        "import sys; from latentcore.models.hub import resolve_model\n"
        "from latentcore.errors import CheckpointError\n"
        "try: resolve_model('org/name')\n"
        "except CheckpointError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "org/name: not in the Hugging Face cache" in result.stdout


def test_cached_snapshot_is_found_offline(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    revision = "0" * 40
    write_config(repo / "snapshots" / revision, tiny_config())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    code = "from latentcore.models.hub import resolve_model; print(resolve_model('org/name'))"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(repo / "snapshots" / revision), result.stderr


def test_no_name_is_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.DEMO_MODEL.parent.name == "latentcore"
    monkeypatch.setattr(hub, "DEMO_MODEL", tmp_path)
    with pytest.raises(CheckpointError, match="the demo model is not in this installation"):
        resolve_model(None)
    write_config(tmp_path, tiny_config())
    assert resolve_model(None) == tmp_path


# ---------------------------------------------------------------------------------------------
# The real client against a repository on this machine

LARGE = "model.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Repository(ThreadingHTTPServer):
    """One repository, as huggingface.co serves it. `requests` holds (path, Range header)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _RepositoryHandler)
        self.files = files
        self.requests: list[tuple[str, str | None]] = []
        self.cut_after: int | None = None
        """Bytes of a large file to send before the connection breaks."""
        self.stays_broken = False
        """Whether no connection succeeds after that."""
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _RepositoryHandler(BaseHTTPRequestHandler):
    server: Repository
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.server.broken:
            self.close_connection = True
            return
        files = self.server.files
        if self.path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{len(data):040x}"}
                for name, data in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {}, with_body)
            return
        if self.path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "org/name", "sha": REVISION, "siblings": siblings}).encode()
            self._send(200, body, {"Content-Type": "application/json"}, with_body)
            return
        prefix = f"/org/name/resolve/{REVISION}/"
        data = files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
        if data is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        wanted = self.headers.get("Range")
        if with_body:
            self.server.requests.append((self.path.removeprefix(prefix), wanted))
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, with_body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        cut = self.server.cut_after
        if cut is not None and len(body) > cut:
            self.wfile.write(body[:cut])
            self.close_connection = True
            self.server.cut_after, self.server.broken = None, self.server.stays_broken
            return
        self.wfile.write(body)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    """Serves a small checkpoint with a shard of 27 MB, and code that must not be fetched."""
    config = tiny_config(hidden_size=512, vocab_size=12000)
    folder = write_checkpoint(
        tmp_path / "served", config, random_tensors(tensor_list(config, "bf16"))
    )
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files[LARGE]) > 25_000_000
    server = Repository({**files, "modeling_deepseek.py": b"raise SystemExit"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(repository: Repository, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`latentcore quantize org/name`, the lightest command that wants a whole repository."""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": repository.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    arguments = ["quantize", "org/name", str(home / "out"), "--to", "fp8"]
    return subprocess.run(
        [sys.executable, "-m", "latentcore", *arguments],
        env=env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def requested(repository: Repository, name: str) -> list[str | None]:
    """The Range headers with which a file was asked for, and forgets all requests."""
    ranges = [wanted for path, wanted in repository.requests if path == name]
    repository.requests.clear()
    return ranges


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    repository: Repository, tmp_path: Path
) -> None:
    repository.cut_after = 22_000_000
    done = fetch(repository, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Fetching 2 files: 100%" in done.stderr
    assert "modeling_deepseek.py" not in {path for path, _ in repository.requests}
    first, *later = requested(repository, LARGE)
    assert first is None
    assert later == ["bytes=20971520-"]  # the last whole piece of the client's 10 MiB

    shutil.rmtree(tmp_path / "out")
    again = fetch(repository, tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert repository.requests == []


@pytest.mark.slow  # the client tries five times, a second apart
def test_files_that_are_complete_are_kept_when_a_download_fails(
    repository: Repository, tmp_path: Path
) -> None:
    repository.cut_after, repository.stays_broken = 22_000_000, True
    first = fetch(repository, tmp_path)
    assert first.returncode == 2, first.stderr
    (said,) = (line for line in first.stderr.splitlines() if line.startswith("error: "))
    assert said.startswith("error: org/name: cannot be fetched: ")
    assert said.endswith("the files that are complete are kept")
    assert "Traceback" not in first.stderr
    (snapshot,) = (tmp_path / "hub" / "models--org--name" / "snapshots").iterdir()
    kept = {path.name for path in snapshot.iterdir()}
    assert kept == {"config.json"}

    repository.cut_after, repository.broken = None, False
    repository.requests.clear()
    second = fetch(repository, tmp_path)
    assert second.returncode == 0, second.stderr
    assert kept.isdisjoint(path for path, _ in repository.requests)
    assert requested(repository, LARGE) == [None]
