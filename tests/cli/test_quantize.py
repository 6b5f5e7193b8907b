"""`latentcore quantize`: writes what it says, and says what it cannot write."""

import json
from pathlib import Path

import pytest
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.cli.app import main
from latentcore.config import ModelConfig
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.resolve import resolve

TINY = tiny_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    return write_checkpoint(path, TINY, random_tensors(tensor_list(TINY, "bf16")))


@pytest.mark.parametrize(
    ("to", "run"),
    [("w8a8_int8", "w8a8_int8"), ("fp8", "fp8"), ("compressed-tensors", "w8a8_int8")],
)
def test_written_checkpoint_resolves(
    folder: Path, tmp_path: Path, to: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(folder), str(out), "--to", to]) == 0
    assert capsys.readouterr().out == ""
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == to
    )
    plan = resolve(ModelConfig.from_dir(out), Checkpoint.open(out), "auto")
    assert {scheme for i in range(3) for scheme in plan.schemes(i).values()} == {run}


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("int4", "error: Invalid value for '--to'"),
        ("fp8", "/out: expected an empty folder or none, found files"),
    ],
)
def test_what_cannot_be_written(
    folder: Path, tmp_path: Path, to: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep")
    assert main(["quantize", str(folder), str(out), "--to", to]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "fp8"]
    assert main(arguments) == 2
    assert "no such model folder" in capsys.readouterr().err
