"""What published checkpoints bring along, run end to end: sections that say too much or nothing,
layers whose parts differ in scheme, dense layers among routed ones, transformers' own reading.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FP8_SECTION, Config, write_checkpoint
from oracle import published
from oracle.distance import errors
from oracle.families import FAMILIES, Family, in_format, is_quantized, prompt
from oracle.model import Model
from oracle.quantizers import Tensors, dequantize, quantize_fp8, quantize_int8
from oracle.running import loaded, run

SLACK = 1.5
LENGTHS = (17, 65, 130)

COMPRESSED_SECTION: Config = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "dynamic": True,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "targets": ["Linear"],
            "weights": {
                "dynamic": False,
                "num_bits": 8,
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def logits(path: Path, quantization: str = "auto") -> list[torch.Tensor]:
    """Prefilled and decoded logits of the prompts of LENGTHS."""
    prompts = [prompt(n) for n in LENGTHS]
    with loaded(path, quantization=quantization) as runner:
        prefilled = run(runner, prompts, "prefill", [[n] for n in LENGTHS])
        return prefilled + run(runner, prompts, "decode", [[1] * n for n in LENGTHS])


def close_to_truth(found: Sequence[torch.Tensor], truth: Model, yardstick: Model) -> bool:
    """Whether the medians over positions are within the bound, prefill and decode each."""
    half = len(LENGTHS)
    for rows, absorbed in ((found[:half], False), (found[half:], True)):
        exact = [truth.logits(prompt(n), 0 if absorbed else n) for n in LENGTHS]
        rough = [yardstick.logits(prompt(n), 0 if absorbed else n) for n in LENGTHS]
        ours = torch.cat([errors(r, e) for r, e in zip(rows, exact, strict=True)])
        allowed = torch.cat([errors(r, e) for r, e in zip(rough, exact, strict=True)])
        if not ours.median() <= SLACK * allowed.median():
            return False
    return True


# ---------------------------------------------------------------------------------------------
# The section of config.json


@pytest.mark.parametrize("name", ["v2-lite", "v3"])
@pytest.mark.parametrize(
    ("fmt", "section", "warned"),
    [
        ("int8", COMPRESSED_SECTION, False),
        ("int8", FP8_SECTION, True),
        ("int8", {"quant_method": "something-new", "bits": 3}, True),
        ("fp8", FP8_SECTION, False),
        ("fp8", {**FP8_SECTION, "scale_fmt": "ue8m0"}, False),
        ("fp8", COMPRESSED_SECTION, True),
        ("bf16", FP8_SECTION, True),
    ],
)
def test_sections_change_no_bit(
    name: str,
    fmt: str,
    section: Config,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The tensors decide; a section that disagrees is reported."""
    family = FAMILIES[name]
    silent = family.write(tmp_path / "silent", fmt)
    config = {**family.config, "quantization_config": section}
    said = write_checkpoint(tmp_path / "said", config, family.stored(fmt))
    expected = logits(silent)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="latentcore"):
        found = logits(said)
    assert ("quantization_config" in caplog.text) is warned
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """UE8M0 files: the same arithmetic, whatever the scales' values."""
    family = FAMILIES["v3-wide"]
    tensors = dict(family.stored("fp8"))
    for name, scale in tensors.items():
        if name.endswith("weight_scale_inv"):
            tensors[name] = scale.log2().ceil().exp2()
    write_checkpoint(tmp_path / "ue8m0", family.config, tensors)
    truth = Model(family.config, tensors)
    yardstick = Model(family.config, tensors, rounding=True)
    assert close_to_truth(logits(tmp_path / "ue8m0"), truth, yardstick)


# ---------------------------------------------------------------------------------------------
# Schemes within one layer


def _stored(plain: Tensors, choice: dict[str, str]) -> Tensors:
    """The checkpoint with every linear layer in the scheme of the first part its name holds."""
    out: Tensors = {}
    for name, tensor in plain.items():
        fmt = next((f for part, f in choice.items() if part in name), "bf16")
        if not is_quantized(name) or fmt == "bf16":
            out[name] = tensor
            continue
        quantized = quantize_int8(tensor) if fmt == "int8" else quantize_fp8(tensor)
        for suffix, value in quantized.items():
            out[f"{name.removesuffix('.weight')}.{suffix}"] = value
    return out


CHOICES: dict[str, dict[str, str]] = {
    "attention int8, experts fp8": {"self_attn": "int8", ".experts.": "fp8"},
    "experts int8, shared fp8": {".experts.": "int8", "shared_experts": "fp8"},
    "q_a and kv_a differ": {"q_a_proj": "int8", "kv_a_proj": "fp8", "q_b_proj": "fp8"},
    "kv_b fp8 in int8": {"kv_b_proj": "fp8", "self_attn": "int8", "mlp": "int8"},
    "kv_b int8 in fp8": {"kv_b_proj": "int8", "self_attn": "fp8", "mlp": "fp8"},
    "down apart": {"down_proj": "int8", "gate_proj": "fp8", "up_proj": "fp8"},
}


@pytest.mark.parametrize("name", ["v3", "v3-wide"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=list(CHOICES))
def test_parts_of_a_layer_in_different_schemes(
    choice: dict[str, str], name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    tensors = _stored(family.stored("bf16"), choice)
    write_checkpoint(tmp_path / "patchwork", family.config, tensors)
    truth = Model(family.config, tensors)
    yardstick = Model(family.config, tensors, rounding=True)
    assert close_to_truth(logits(tmp_path / "patchwork"), truth, yardstick)


@pytest.mark.parametrize(
    ("gate", "up"), [("int8", "fp8"), ("bf16", "int8"), ("fp8", "bf16")], ids=str
)
def test_gate_and_up_that_disagree_run_in_bf16(
    gate: str, up: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same bits as from both dequantized beforehand, and a warning."""
    family = FAMILIES["v3-wide"]
    tensors = _stored(
        family.stored("bf16"), {"gate_proj": gate, "up_proj": up, "down_proj": "int8"}
    )
    plain: Tensors = {}
    for name, tensor in tensors.items():
        base, _, suffix = name.rpartition(".")
        if not base.endswith(("gate_proj", "up_proj")):
            plain[name] = tensor
        elif suffix == "weight":
            parts = {s: tensors[f"{base}.{s}"] for s in SUFFIXES if f"{base}.{s}" in tensors}
            plain[name] = dequantize(parts).to(torch.bfloat16)
    write_checkpoint(tmp_path / "apart", family.config, tensors)
    write_checkpoint(tmp_path / "plain", family.config, plain)
    with caplog.at_level(logging.WARNING, logger="latentcore"):
        found = logits(tmp_path / "apart")
    assert "up_proj" in caplog.text
    expected = logits(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SUFFIXES = ("weight", "weight_scale", "weight_scale_inv")


# ---------------------------------------------------------------------------------------------
# Dense layers among routed ones: transformers knows no moe_layer_freq


@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("first", "freq"), [(1, 2), (2, 2), (0, 3)])
def test_dense_layers_among_routed_ones(first: int, freq: int, fmt: str, tmp_path: Path) -> None:
    v3 = FAMILIES["v3"].config
    config = {
        **v3,
        "first_k_dense_replace": first,
        "moe_layer_freq": freq,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 0,
    }
    routed = _family("routed", {**config, "first_k_dense_replace": 0}).stored("bf16")
    dense = _family("dense", {**config, "first_k_dense_replace": 5}).stored("bf16")
    plain = dict(routed)
    for layer in range(5):
        if layer >= first and layer % freq == 0:
            continue
        prefix = f"model.layers.{layer}.mlp."
        plain = {n: t for n, t in plain.items() if not n.startswith(prefix)}
        plain |= {n: t for n, t in dense.items() if n.startswith(prefix)}
    tensors = in_format(plain, fmt) if fmt != "bf16" else plain
    write_checkpoint(tmp_path / "apart", config, tensors)
    truth, yardstick = Model(config, tensors), Model(config, tensors, rounding=True)
    assert close_to_truth(logits(tmp_path / "apart"), truth, yardstick)


def _family(name: str, config: Config) -> Family:
    return dataclasses.replace(FAMILIES["v3"], name=name, config=config, tensors={})


# ---------------------------------------------------------------------------------------------
# The files themselves, read by transformers


@pytest.mark.parametrize(
    # transformers wants a shared expert's tensors even where it has no width
    "name",
    [name for name, family in FAMILIES.items() if family.config["n_shared_experts"]],
)
def test_transformers_reads_these_files_as_the_oracle_does(name: str, tmp_path: Path) -> None:
    """The layout that these tests write is the published one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[name]
    config: dict[str, Any] = dict(family.config)
    config["model_type"] = config["model_type"].replace("kimi_k2", "deepseek_v3")
    path = write_checkpoint(tmp_path / name, config, family.stored("bf16"))
    asked = AutoConfig.from_pretrained(path)
    asked.num_nextn_predict_layers = 0
    model = AutoModelForCausalLM.from_pretrained(
        path, config=asked, dtype=torch.float32, experts_implementation="eager"
    )
    theirs = published.logits(model.eval(), prompt(65))
    built = published.build(family.config, family.stored("bf16"), torch.float32)
    assert torch.equal(theirs, published.logits(built, prompt(65)))
