"""Loading: every weight ends in its place, packed as it should be, and memory stays bounded."""

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    Config,
    random_tensors,
    tensor_list,
    tiny_config,
    write_checkpoint,
)

from latentcore.config import ModelConfig
from latentcore.errors import CheckpointError, InsufficientMemoryError
from latentcore.layers.weights import MlpWeights, ModelWeights, MoeWeights
from latentcore.models import memory
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.loader import load_weights
from latentcore.models.resolve import resolve
from latentcore.ops import packing
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.schemes import SCHEMES, scheme_of

Tensors = dict[str, torch.Tensor]


def _load(folder: Path, quantization: str = "auto") -> ModelWeights:
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(ModelConfig.from_dir(folder), checkpoint, quantization)
        weights = load_weights(plan, checkpoint, None)
        assert _nbytes(weights) == plan.packed_nbytes()
        return weights


def _nbytes(value: Any) -> int:
    """Bytes of all tensors and packed weights inside a tree of dataclasses and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, PackedWeight):
        return value.nbytes
    if isinstance(value, list):
        return sum(map(_nbytes, value))
    if value is None:
        return 0
    return sum(_nbytes(getattr(value, name)) for name in value.__dataclass_fields__)


def _expected(tensors: Tensors, names: list[str], run: str | None, parts: int) -> PackedWeight:
    """Packs the weights of `names` here, by hand: the exact definition of each conversion."""
    packed: PackedWeight | None = None
    for index, name in enumerate(names):
        suffixes = ("weight_scale", "weight_scale_inv")
        found = {s: tensors[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in tensors}
        weight = tensors[f"{name}.weight"]
        stored = scheme_of(weight.dtype, found.keys())
        assert not isinstance(stored, str)
        target = SCHEMES[run] if run else stored
        here: Tensors = {"weight": weight, **found}
        if target is not stored or weight.dtype not in (stored.weight_dtype,):
            here = target.quantize(stored.dequantize(here).to(torch.bfloat16))
        rows, cols = weight.shape
        if packed is None:
            packed = PackedWeight.allocate(target.format, len(names) // parts, parts, rows, cols)
        item, part = divmod(index, parts)
        if target.name == "bf16":
            packing.pack_bf16(packed, item, part, here["weight"])
        elif target.name == "w8a8_int8":
            packing.pack_int8(packed, item, part, here["weight"], here["weight_scale"][:, 0])
        else:
            packing.pack_fp8(packed, item, part, here["weight"], here["weight_scale_inv"])
    assert packed is not None
    return packed


def _same(found: PackedWeight | None, expected: PackedWeight) -> None:
    assert found is not None
    assert found.desc == expected.desc
    assert torch.equal(found.data, expected.data)


def _check_layer(
    weights: ModelWeights, tensors: Tensors, index: int, config: Config, run: str | None
) -> None:
    layer = weights.layers[index]
    prefix = f"model.layers.{index}"
    attn, found = f"{prefix}.self_attn", layer.attention
    if config["q_lora_rank"] is None:
        _same(found.q, _expected(tensors, [f"{attn}.q_proj"], run, 1))
        assert found.q_a is None
        assert found.q_b is None
        assert found.q_a_norm is None
    else:
        _same(found.q_a, _expected(tensors, [f"{attn}.q_a_proj"], run, 1))
        _same(found.q_b, _expected(tensors, [f"{attn}.q_b_proj"], run, 1))
        assert found.q is None
        assert found.q_a_norm is not None
        assert torch.equal(found.q_a_norm, tensors[f"{attn}.q_a_layernorm.weight"].float())
    _same(found.kv_a, _expected(tensors, [f"{attn}.kv_a_proj_with_mqa"], run, 1))
    _same(found.kv_b, _expected(tensors, [f"{attn}.kv_b_proj"], run, 1))
    _same(found.o, _expected(tensors, [f"{attn}.o_proj"], run, 1))
    for vector, name in (
        (found.input_norm, f"{prefix}.input_layernorm.weight"),
        (found.kv_a_norm, f"{attn}.kv_a_layernorm.weight"),
        (layer.post_attention_norm, f"{prefix}.post_attention_layernorm.weight"),
    ):
        assert vector.dtype is torch.float32
        assert vector.is_contiguous()
        assert torch.equal(vector, tensors[name].float())
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    assert found.w_kc.desc[1:] == [heads, 1, config["kv_lora_rank"], nope]
    assert found.w_vc.desc[1:] == [heads, 1, config["v_head_dim"], config["kv_lora_rank"]]
    mlp = f"{prefix}.mlp"
    if index < config["first_k_dense_replace"]:
        assert isinstance(layer.ffn, MlpWeights)
        _check_mlp(layer.ffn, tensors, mlp, run)
        return
    assert isinstance(layer.ffn, MoeWeights)
    experts = [f"{mlp}.experts.{e}" for e in range(config["n_routed_experts"])]
    gate_up = [f"{e}.{p}_proj" for e in experts for p in ("gate", "up")]
    _same(layer.ffn.experts_gate_up, _expected(tensors, gate_up, run, 2))
    down = [f"{e}.down_proj" for e in experts]
    _same(layer.ffn.experts_down, _expected(tensors, down, run, 1))
    assert layer.ffn.shared is not None
    _check_mlp(layer.ffn.shared, tensors, f"{mlp}.shared_experts", run)
    _same(layer.ffn.router, _expected(tensors, [f"{mlp}.gate"], None, 1))
    assert layer.ffn.router_bias is not None
    assert torch.equal(layer.ffn.router_bias, tensors[f"{mlp}.gate.e_score_correction_bias"])


def _check_mlp(found: MlpWeights, tensors: Tensors, name: str, run: str | None) -> None:
    _same(found.gate_up, _expected(tensors, [f"{name}.gate_proj", f"{name}.up_proj"], run, 2))
    _same(found.down, _expected(tensors, [f"{name}.down_proj"], run, 1))


CASES = [
    ("bf16", "auto", None),
    ("int8", "auto", None),
    ("fp8", "auto", None),
    ("int8", "unquant", "bf16"),
    ("fp8", "unquant", "bf16"),
    ("bf16", "w8a8_int8", "w8a8_int8"),
    ("fp8", "w8a8_int8", "w8a8_int8"),
    ("bf16", "fp8", "fp8"),
]


@pytest.mark.parametrize("q_lora_rank", [44, None])
@pytest.mark.parametrize(("fmt", "quantization", "run"), CASES)
def test_every_weight_is_in_its_place(
    tmp_path: Path, fmt: str, quantization: str, run: str | None, q_lora_rank: int | None
) -> None:
    # 200 wide, so that FP8 blocks are partial in both directions and cross heads.
    config = tiny_config(hidden_size=200, kv_lora_rank=136, q_lora_rank=q_lora_rank)
    tensors = random_tensors(tensor_list(config, fmt))
    write_checkpoint(tmp_path, config, tensors, shards=2)
    weights = _load(tmp_path, quantization)
    for index in range(3):
        _check_layer(weights, tensors, index, config, run)
    assert torch.equal(weights.embed, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm, tensors["model.norm.weight"].float())
    _same(weights.lm_head, _expected(tensors, ["lm_head"], None, 1))


@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
def test_kv_b_halves(tmp_path: Path, fmt: str) -> None:
    config = tiny_config(kv_lora_rank=136)
    tensors = random_tensors(tensor_list(config, fmt))
    write_checkpoint(tmp_path, config, tensors)
    found = _load(tmp_path).layers[0].attention
    name = "model.layers.0.self_attn.kv_b_proj"
    form = Format.INT8_WIDE if fmt == "int8" else Format.BF16
    w_kc = PackedWeight.allocate(form, 3, 1, 136, 16)
    w_vc = PackedWeight.allocate(form, 3, 1, 20, 136)
    if fmt == "int8":
        scale = tensors[f"{name}.weight_scale"][:, 0]
        packing.pack_kv_b_int8(w_kc, w_vc, tensors[f"{name}.weight"], scale, 16, 20)
    else:
        weight = tensors[f"{name}.weight"]
        if fmt == "fp8":
            scale = tensors[f"{name}.weight_scale_inv"].repeat_interleave(128, 0)
            scale = scale.repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
            weight = (weight.float() * scale).to(torch.bfloat16)
        packing.pack_kv_b_bf16(w_kc, w_vc, weight, 16, 20)
    _same(found.w_kc, w_kc)
    _same(found.w_vc, w_vc)


def test_tied_head_is_packed_from_the_embedding(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(tensor_list(config, "bf16"))
    write_checkpoint(tmp_path, config, tensors)
    weights = _load(tmp_path)
    _same(weights.lm_head, _expected(tensors, ["model.embed_tokens"], None, 1))


def test_fp32_checkpoint_runs_in_bf16_with_its_router_in_fp32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    tensors = {n: t.float() for n, t in random_tensors(tensor_list(config, "bf16")).items()}
    write_checkpoint(tmp_path, config, tensors)
    with caplog.at_level(logging.WARNING):
        weights = _load(tmp_path)
    assert "rounded to bfloat16" in caplog.text
    assert weights.embed.dtype is torch.bfloat16
    moe = weights.layers[1].ffn
    assert isinstance(moe, MoeWeights)
    expected = PackedWeight.allocate(Format.F32, 1, 1, 6, 72)
    packing.pack_f32(expected, 0, 0, tensors["model.layers.1.mlp.gate.weight"])
    _same(moe.router, expected)
    name = "model.layers.0.self_attn.o_proj"
    rounded = {f"{name}.weight": tensors[f"{name}.weight"].to(torch.bfloat16)}
    _same(weights.layers[0].attention.o, _expected(rounded, [name], None, 1))


def test_weights_stored_differently_but_packed_together(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(tensor_list(config, "int8"))
    name = "model.layers.0.mlp.up_proj"
    codes, scale = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight_scale")
    tensors[f"{name}.weight"] = (codes.float() * scale).to(torch.bfloat16)
    write_checkpoint(tmp_path, config, tensors)
    ffn = _load(tmp_path).layers[0].ffn
    assert isinstance(ffn, MlpWeights)
    names = ["model.layers.0.mlp.gate_proj", name]
    _same(ffn.gate_up, _expected(tensors, names, "bf16", 2))
    assert ffn.down.format is Format.INT8


def _spoil(name: str, value: float) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return apply


@pytest.mark.parametrize(
    ("fmt", "quantization", "name", "value"),
    [
        ("int8", "auto", "model.layers.1.mlp.experts.5.down_proj.weight_scale", float("nan")),
        ("int8", "auto", "model.layers.0.self_attn.kv_b_proj.weight_scale", float("inf")),
        ("fp8", "auto", "model.layers.2.self_attn.o_proj.weight_scale_inv", float("-inf")),
        ("fp8", "w8a8_int8", "model.layers.2.self_attn.o_proj.weight_scale_inv", float("nan")),
        ("bf16", "auto", "model.layers.2.input_layernorm.weight", float("nan")),
        ("bf16", "auto", "model.layers.1.mlp.gate.e_score_correction_bias", float("nan")),
        ("bf16", "auto", "model.norm.weight", float("inf")),
        ("bf16", "w8a8_int8", "model.layers.1.mlp.experts.5.down_proj.weight", float("nan")),
        ("bf16", "fp8", "model.layers.0.self_attn.kv_b_proj.weight", float("-inf")),
        ("fp8", "w8a8_int8", "model.layers.0.self_attn.o_proj.weight", float("nan")),
    ],
)
def test_numbers_that_are_not_finite_are_named(
    tmp_path: Path, fmt: str, quantization: str, name: str, value: float
) -> None:
    config = tiny_config()
    tensors = random_tensors(tensor_list(config, fmt))
    tensors[name].view(-1)[-1] = value
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path, quantization)
    assert name in str(caught.value)
    assert "NaN or infinity" in str(caught.value)


def test_too_little_memory_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, random_tensors(tensor_list(config, "bf16")))
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = resolve(ModelConfig.from_dir(tmp_path), checkpoint, "auto")
        monkeypatch.setattr(memory, "available_memory", lambda: plan.peak_nbytes() - 1)
        monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
        with pytest.raises(InsufficientMemoryError) as caught:
            load_weights(plan, checkpoint, None)
        size = memory.format_bytes(plan.peak_nbytes())
        assert f"the model's weights: needed {size}, available" in str(caught.value)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(tensor_list(config, "fp8"))
    write_checkpoint(tmp_path, config, tensors)
    seen: list[tuple[int, int]] = []
    with Checkpoint.open(tmp_path) as checkpoint:
        plan = resolve(ModelConfig.from_dir(tmp_path), checkpoint, "auto")
        load_weights(plan, checkpoint, lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(seen) == len(tensors)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_weights_do_not_depend_on_the_files_any_more(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config, random_tensors(tensor_list(config, "bf16")))
    weights = _load(tmp_path)
    before = weights.embed.clone(), weights.final_norm.clone()
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert torch.equal(weights.embed, before[0])
    assert torch.equal(weights.final_norm, before[1])


MEASURE = """
import resource, sys, threading, time
from pathlib import Path
import torch
from latentcore.config import ModelConfig
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.loader import load_weights
from latentcore.models.resolve import resolve
from latentcore.ops import runtime

torch.set_num_threads(1)
runtime.set_threads(1)

def resident(*kinds):
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))

folder = Path(sys.argv[1])
checkpoint = Checkpoint.open(folder)
plan = resolve(ModelConfig.from_dir(folder), checkpoint, sys.argv[2])
before, peak, mapped = resident("RssAnon", "RssShmem"), 0, resident("RssFile")
done = threading.Event()
def watch():  # on its own: what a weight needs for a moment is gone when progress is told
    global peak
    while not done.wait(0.0005):
        peak = max(peak, resident("RssAnon", "RssShmem"))
watcher = threading.Thread(target=watch)
watcher.start()
weights = load_weights(plan, checkpoint, None)
done.set()
watcher.join()
peak = max(peak, resident("RssAnon", "RssShmem"))
mapped = resident("RssFile") - mapped
print(peak - before, plan.packed_nbytes(), plan.peak_nbytes(), mapped)
"""


@pytest.mark.parametrize("quantization", ["auto", "w8a8_int8"])
def test_peak_memory_is_packed_size_and_little_more(tmp_path: Path, quantization: str) -> None:
    config = tiny_config(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=16)
    config = {**config, "n_group": 1, "vocab_size": 4000}
    tensors = random_tensors(tensor_list(config, "fp8"))
    write_checkpoint(tmp_path, config, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    command = [sys.executable, "-c", MEASURE, str(tmp_path), quantization]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    used, packed, peak, mapped = map(int, out)
    assert total > 60e6
    assert used <= packed + (24 << 20)
    assert peak <= packed + (16 << 20)
    assert mapped < total // 4  # let go behind the loader; the rest is code of libraries


def test_plan_of_another_checkpoint_is_a_key_error(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(tensor_list(config, "bf16"))
    write_checkpoint(tmp_path / "a", config, tensors)
    with Checkpoint.open(tmp_path / "a") as checkpoint:
        plan = resolve(ModelConfig.from_dir(tmp_path / "a"), checkpoint, "auto")
        stranger = replace(plan.final_norm.info, name="nothing")
        broken = replace(plan, final_norm=replace(plan.final_norm, info=stranger))
        with pytest.raises(KeyError):
            load_weights(broken, checkpoint, None)
