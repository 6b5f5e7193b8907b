"""Finding a model by folder, by repository id, or by default; nothing here uses the network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from checkpoints import tiny_config, write_config
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
    (OSError(28, "No space left on device"), "No space left on device; the next try goes on"),
    (ConnectionResetError("reset"), "cannot be fetched: reset"),
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
