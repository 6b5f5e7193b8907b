"""`latentcore preflight`: what it prints, and its exit codes."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import Sparse, random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.cli.app import main

TINY = tiny_config()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    return write_checkpoint(path, TINY, random_tensors(tensor_list(TINY, "int8")))


def test_ready(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", str(folder), "--max-num-seqs", "4", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "deepseek_v3: 3 layers (1 dense), hidden 72, 3 heads, 6 experts + 1 shared" in out
    assert "layers 0-2  " in out
    assert "w8a8_int8" in out
    assert "batch 32" in out
    assert "tokens/s here" in out
    assert "warning: config.json has no quantization_config" in out
    assert "ready (checked in" in out
    assert "not ready" not in out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preflight", str(folder), "--json", "--quantization", "unquant", "--threads", "1"]
    assert main([*arguments, "--max-model-len", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert report["problems"] == []
    assert report["folder"] == str(folder)
    assert report["schemes"]["0"]["o"] == "w8a8_int8 -> bf16"
    assert report["memory"]["max_model_len"] == 100
    assert report["machine"]["threads"] == 1
    assert set(report["tokens_per_second"]) == {"1", "8", "32"}


def test_not_ready_lists_every_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "model.safetensors", 5000)
    (folder / "tokenizer.json").write_text("{")
    assert main(["preflight", str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("problem: ") == 2
    assert "not ready: 2 problems" in out
    assert "tokens/s here" not in out
    assert main(["preflight", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is False
    assert len(report["problems"]) == 2
    assert report["machine"] is None


def test_the_machine_is_reported_where_it_is_too_small(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed, tier and threads help to choose a larger one."""
    arguments = ["preflight", str(folder), "--max-model-len", "512", "--max-num-seqs", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentcore.models.memory.available_memory", lambda: 1000)
        assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (problem,) = report["problems"]
    assert problem.startswith("not enough memory for the model's weights: needed ")
    assert report["machine"]["tier"] == report["tier"]
    assert report["machine"]["threads"] >= 1
    assert set(report["tokens_per_second"]) == {"1", "8", "32"}


def test_problems_are_printed_as_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensor_list(TINY, "bf16")
    name = "model.layers.1.[red]strange[/red].weight"
    tensors[name] = next(iter(tensors.values()))
    Sparse.plan(TINY, tensors, 1).write(tmp_path / "odd")
    assert main(["preflight", str(tmp_path / "odd")]) == 1
    assert f"problem: {name}: left over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "error: no such model folder: /no/such/folder"),
        ([], "error: Missing argument 'folder'"),
        (["/tmp", "--quantization", "int4"], "error: Invalid value for '--quantization'"),
        (["/tmp", "--max-num-seqs", "0"], "error: max_num_seqs: expected an integer from 1"),
    ],
)
def test_unusable_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["preflight", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "expected one of deepseek_v2, deepseek_v3, kimi_k2" in err
    assert 'found "llama"' in err
