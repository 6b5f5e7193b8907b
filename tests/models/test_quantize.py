"""`quantize`: a checkpoint rewritten in another published format runs as it should."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FP8_SECTION,
    Config,
    random_tensors,
    tensor_list,
    tiny_config,
    write_checkpoint,
)

from latentcore.config import ModelConfig
from latentcore.errors import CheckpointError, QuantizationError
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.quantize import quantize_checkpoint
from latentcore.models.resolve import resolve
from latentcore.quant.schemes import SCHEMES

STORED = {"bf16": "bf16", "int8": "w8a8_int8", "fp8": "fp8"}


def _source(tmp_path: Path, fmt: str) -> tuple[Path, dict[str, torch.Tensor]]:
    config = tiny_config(num_nextn_predict_layers=1, auto_map={"AutoConfig": "x.Config"})
    if fmt == "fp8":
        config["quantization_config"] = FP8_SECTION
    tensors = random_tensors(tensor_list(config, fmt))
    return write_checkpoint(tmp_path / "source", config, tensors, shards=2), tensors


def _config(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    ("fmt", "form"),
    [
        ("bf16", "w8a8_int8"),
        ("bf16", "fp8"),
        ("bf16", "compressed-tensors"),
        ("fp8", "w8a8_int8"),
        ("fp8", "bf16"),
        ("int8", "bf16"),
        ("int8", "compressed-tensors"),
    ],
)
def test_written_checkpoint_is_the_exact_conversion(tmp_path: Path, fmt: str, form: str) -> None:
    source, tensors = _source(tmp_path, fmt)
    quantize_checkpoint(source, tmp_path / "out", form)
    run = "w8a8_int8" if form == "compressed-tensors" else form
    target, stored = SCHEMES[run], SCHEMES[STORED[fmt]]
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        plan = resolve(ModelConfig.from_dir(tmp_path / "out"), checkpoint, "auto")
        assert plan.warnings == ()
        assert plan.mtp_layers == 1
        seen: set[str] = set()
        for name, tensor in tensors.items():
            base, _, suffix = name.rpartition(".")
            quantized = "_proj" in name and "eh_proj" not in name
            if not quantized:
                assert torch.equal(checkpoint.tensor(name), tensor)
                seen.add(name)
            elif suffix == "weight":
                here = {"weight": tensor}
                for companion in stored.companions:
                    here[companion.suffix] = tensors[f"{base}.{companion.suffix}"]
                expected = here
                if stored is not target:
                    expected = target.quantize(stored.dequantize(here).to(torch.bfloat16))
                for part, value in expected.items():
                    found = checkpoint.tensor(f"{base}.{part}")
                    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
                    seen.add(f"{base}.{part}")
        assert checkpoint.tensors.keys() == seen
    assert "auto_map" not in _config(tmp_path / "out")
    section = _config(tmp_path / "out").get("quantization_config", {})
    assert section.get("quant_method") == (None if form == "bf16" else form)


def test_tokenizer_goes_along_and_code_does_not(tmp_path: Path) -> None:
    source, _ = _source(tmp_path, "bf16")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text("{}")
    for name in ("modeling_deepseek.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text("x")
    quantize_checkpoint(source, tmp_path / "out", "w8a8_int8")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = _source(tmp_path, "int8")
    out = tmp_path / "out"
    with pytest.raises(QuantizationError, match="--quantization fp8 cannot be met"):
        quantize_checkpoint(source, out, "fp8")
    with pytest.raises(QuantizationError, match="format: expected one of"):
        quantize_checkpoint(source, out, "int4")
    full = shutil._ntuple_diskusage(20, 10, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match=r"not enough disk: needed .* free 10 bytes"):
        quantize_checkpoint(source, out, "bf16")
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="expected an empty folder or none"):
        quantize_checkpoint(source, out, "bf16")


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(tensor_list(config, "fp8"))
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    tensors[name][0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "source", config, tensors)
    with pytest.raises(CheckpointError, match=f"{name}: expected finite scales"):
        quantize_checkpoint(source, tmp_path / "out", "w8a8_int8")
