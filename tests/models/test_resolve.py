"""Full-size tensor lists of every supported model, resolved from headers; seeded faults, named.

The checkpoints are sparse files: complete headers, no data. Nothing here reads a weight.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CONFIGS,
    FP8_SECTION,
    Config,
    Entry,
    Sparse,
    TensorList,
    tensor_list,
    tiny_config,
)

from latentcore.config import ModelConfig
from latentcore.errors import CheckpointError, QuantizationError
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.resolve import MlpPlan, ModelPlan, MoePlan, resolve
from latentcore.quant.packed import Format, packed_nbytes

FORMATS = {"bf16": "bf16", "int8": "w8a8_int8", "fp8": "fp8"}


def _resolve(folder: Path, quantization: str = "auto") -> ModelPlan:
    return resolve(ModelConfig.from_dir(folder), Checkpoint.open(folder), quantization)


def _sparse(config: Config, tensors: TensorList, folder: Path, count: int = 1) -> Path:
    return Sparse.plan(config, tensors, count).write(folder)


def _problems(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        _resolve(folder)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------
# Full size


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Sparse, Path]]:
    """V3 without faults in every format, written."""
    written = {}
    for fmt in FORMATS:
        sparse = Sparse.plan(CONFIGS["v3"], tensor_list(CONFIGS["v3"], fmt), 163)
        written[fmt] = (sparse, sparse.write(tmp_path_factory.mktemp(fmt)))
    return written


PARAMETERS = {
    "v2-lite": (15.7e9, 2.45e9),
    "v2": (235.7e9, 20.9e9),
    "moonlight": (15.96e9, 2.58e9),
    "v3": (671.0e9, 36.6e9),
    "kimi-k2": (1026.4e9, 31.7e9),
}


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("v3", "bf16"),
        ("v3", "int8"),
        ("v3", "fp8"),
        ("kimi-k2", "fp8"),
        ("v2", "bf16"),
        ("v2-lite", "bf16"),
        ("moonlight", "bf16"),
    ],
)
def test_published_models_resolve_completely(tmp_path: Path, name: str, fmt: str) -> None:
    config = CONFIGS[name]
    tensors = tensor_list(config, fmt)
    _sparse(config, tensors, tmp_path, 163)
    start = time.process_time()
    plan = _resolve(tmp_path)
    assert time.process_time() - start < 10
    total, active = PARAMETERS[name]
    assert plan.parameters() == pytest.approx(total, rel=0.005)
    assert plan.active_parameters() == pytest.approx(active, rel=0.005)
    assert plan.mtp_layers == (1 if name == "v3" else 0)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    expected = {tensor for tensor in tensors if not tensor.startswith(mtp)}
    assert {info.name for info in plan.sources()} == expected
    for layer in range(config["num_hidden_layers"]):
        assert set(plan.schemes(layer).values()) == {FORMATS[fmt]}


def test_int8_v3_reads_thirty_seven_gigabytes_a_token(
    sound: dict[str, tuple[Sparse, Path]],
) -> None:
    plan = _resolve(sound["int8"][1])
    assert plan.weight_bytes_per_token(1) == pytest.approx(37.5e9, rel=0.02)
    assert plan.packed_nbytes() == pytest.approx(674e9, rel=0.01)
    assert plan.weight_bytes_per_token(8) < plan.weight_bytes_per_token(1)
    assert plan.peak_nbytes() == plan.packed_nbytes()


# ---------------------------------------------------------------------------------------------
# Seeded faults, in full-size checkpoints

ATTN = "model.layers.5.self_attn"


def _change(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[Sparse], None]:
    def apply(sparse: Sparse) -> None:
        assert name in sparse.shard_of(name)
        sparse.shard_of(name)[name] = Entry(dtype, shape)

    return apply


def _remove(*names: str) -> Callable[[Sparse], None]:
    def apply(sparse: Sparse) -> None:
        for name in names:
            sparse.remove(name)

    return apply


def _rename(old: str, new: str, entry: Entry) -> Callable[[Sparse], None]:
    def apply(sparse: Sparse) -> None:
        shard = sparse.weight_map[old]
        sparse.remove(old)
        sparse.shards[shard][new] = entry
        sparse.weight_map[new] = shard

    return apply


def _add(name: str, entry: Entry) -> Callable[[Sparse], None]:
    def apply(sparse: Sparse) -> None:
        shard = sparse.weight_map["model.norm.weight"]
        sparse.shards[shard][name] = entry
        sparse.weight_map[name] = shard

    return apply


FAULTS: dict[str, tuple[str, Callable[[Sparse], None], list[str]]] = {
    "scale-missing": (
        "int8",
        _remove(f"{ATTN}.o_proj.weight_scale"),
        [
            (
                f"{ATTN}.o_proj.weight: expected weight_scale [out, 1] beside a weight of dtype I8 "
                f"(w8a8_int8), found no companion"
            )
        ],
    ),
    "scale-flat": (
        "int8",
        _change(f"{ATTN}.o_proj.weight_scale", "F32", (7168,)),
        [f"{ATTN}.o_proj.weight_scale: expected shape [7168, 1], found [7168]"],
    ),
    "scale-bf16": (
        "int8",
        _change(f"{ATTN}.o_proj.weight_scale", "BF16", (7168, 1)),
        [
            (
                f"{ATTN}.o_proj.weight_scale: expected dtype F32 beside a weight of I8 "
                f"(w8a8_int8), found BF16"
            )
        ],
    ),
    "grid-short": (
        "fp8",
        _change(f"{ATTN}.kv_a_proj_with_mqa.weight_scale_inv", "F32", (4, 56)),
        [f"{ATTN}.kv_a_proj_with_mqa.weight_scale_inv: expected shape [5, 56], found [4, 56]"],
    ),
    "int8-with-grid": (
        "int8",
        _rename(
            f"{ATTN}.o_proj.weight_scale",
            f"{ATTN}.o_proj.weight_scale_inv",
            Entry("F32", (56, 128)),
        ),
        [
            (
                f"{ATTN}.o_proj.weight: expected weight_scale [out, 1] beside a weight of dtype I8 "
                f"(w8a8_int8), found weight_scale_inv"
            )
        ],
    ),
    "bf16-with-scale": (
        "bf16",
        _add(f"{ATTN}.o_proj.weight_scale", Entry("F32", (7168, 1))),
        [
            (
                f"{ATTN}.o_proj.weight: expected no companion beside a weight of dtype BF16 "
                f"(bf16), found weight_scale"
            )
        ],
    ),
    "both-scales": (
        "fp8",
        _add(f"{ATTN}.o_proj.weight_scale", Entry("F32", (7168, 1))),
        [
            (
                f"{ATTN}.o_proj.weight: expected weight_scale_inv [ceil(out / 128), "
                f"ceil(in / 128)] beside a weight of dtype F8_E4M3 (fp8), found "
                f"weight_scale, weight_scale_inv"
            )
        ],
    ),
    "strange-dtype": (
        "bf16",
        _change(f"{ATTN}.o_proj.weight", "U8", (7168, 16384)),
        [
            (
                f"{ATTN}.o_proj.weight: expected a weight of dtype BF16, I8, F8_E4M3, F32, F16, "
                f"found U8 with no companion"
            )
        ],
    ),
    "expert-absent": (
        "int8",
        _remove(
            *(
                f"model.layers.37.mlp.experts.255.{proj}_proj.{suffix}"
                for proj in ("gate", "up", "down")
                for suffix in ("weight", "weight_scale")
            )
        ),
        [
            (
                "model.layers.37.mlp.experts.255.gate_proj.weight: missing; expected shape "
                "[2048, 7168]"
            ),
            "model.layers.37.mlp.experts.255.up_proj.weight: missing; expected shape [2048, 7168]",
            (
                "model.layers.37.mlp.experts.255.down_proj.weight: missing; expected shape "
                "[7168, 2048]"
            ),
        ],
    ),
    "expert-too-many": (
        "bf16",
        _add("model.layers.37.mlp.experts.256.gate_proj.weight", Entry("BF16", (2048, 7168))),
        ["model.layers.37.mlp.experts.256.gate_proj.weight: left over; a deepseek_v3 model of"],
    ),
    "kv-b-rows": (
        "fp8",
        _change(f"{ATTN}.kv_b_proj.weight", "F8_E4M3", (127 * 256, 512)),
        [f"{ATTN}.kv_b_proj.weight: expected shape [32768, 512], found [32512, 512]"],
    ),
    "quantized-router": (
        "int8",
        _change("model.layers.5.mlp.gate.weight", "I8", (256, 7168)),
        [
            (
                "model.layers.5.mlp.gate.weight: expected dtype BF16, F32 or F16 (this tensor is "
                "never quantized), found I8"
            )
        ],
    ),
    "router-bias-missing": (
        "fp8",
        _remove("model.layers.5.mlp.gate.e_score_correction_bias"),
        ["model.layers.5.mlp.gate.e_score_correction_bias: missing; expected BF16 or F32 [256]"],
    ),
    "norm-missing": (
        "bf16",
        _remove(f"{ATTN}.q_a_layernorm.weight"),
        [f"{ATTN}.q_a_layernorm.weight: missing; expected BF16 or F32 [1536]"],
    ),
    "head-missing": (
        "bf16",
        _remove("lm_head.weight"),
        ["lm_head.weight: missing; expected BF16 or F32 [129280, 7168]"],
    ),
    "weight-missing-scale-there": (
        "int8",
        _remove(f"{ATTN}.o_proj.weight"),
        [f"{ATTN}.o_proj.weight: missing; expected shape [7168, 16384]"],
    ),
    "bias-left-over": (
        "bf16",
        _add(f"{ATTN}.o_proj.bias", Entry("BF16", (7168,))),
        [f"{ATTN}.o_proj.bias: left over; a deepseek_v3 model of this config has no such tensor"],
    ),
    "layer-beyond-mtp": (
        "bf16",
        _add("model.layers.62.input_layernorm.weight", Entry("BF16", (7168,))),
        ["model.layers.62.input_layernorm.weight: left over"],
    ),
    "mtp-shape": (
        "bf16",
        _change("model.layers.61.eh_proj.weight", "BF16", (7168, 7168)),
        [
            (
                "model.layers.61.eh_proj.weight: expected shape [7168, 14336], found [7168, 7168] "
                "(multi-token-prediction layer)"
            )
        ],
    ),
    "mtp-stranger": (
        "bf16",
        _add("model.layers.61.extra.weight", Entry("BF16", (7168,))),
        ["model.layers.61.extra.weight: left over"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_found_and_named(
    tmp_path: Path, sound: dict[str, tuple[Sparse, Path]], fault: str
) -> None:
    fmt, apply, expected = FAULTS[fault]
    sparse = sound[fmt][0].copy()
    apply(sparse)
    problems = _problems(sparse.write_beside(*sound[fmt], tmp_path / "faulty"))
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start), problem


def test_all_faults_are_listed_together(
    tmp_path: Path, sound: dict[str, tuple[Sparse, Path]]
) -> None:
    sparse = sound["int8"][0].copy()
    count = 0
    for name in ("scale-missing", "expert-absent", "mtp-stranger", "quantized-router"):
        FAULTS[name][1](sparse)
        count += len(FAULTS[name][2])
    assert len(_problems(sparse.write_beside(*sound["int8"], tmp_path / "faulty"))) == count


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"num_attention_heads": 64, "num_key_value_heads": 64}, "model.layers.0.self_attn.q_b"),
        ({"vocab_size": 129281}, "model.embed_tokens.weight: expected shape [129281, 7168]"),
        ({"num_hidden_layers": 60, "num_nextn_predict_layers": 0}, "model.layers.60."),
        ({"n_shared_experts": 0}, "model.layers.3.mlp.shared_experts.gate_proj"),
        ({"q_lora_rank": None}, "model.layers.0.self_attn.q_proj.weight: missing"),
        ({"first_k_dense_replace": 2}, "model.layers.2.mlp.gate.weight: missing"),
    ],
)
def test_config_that_does_not_match(
    tmp_path: Path, sound: dict[str, tuple[Sparse, Path]], change: Config, start: str
) -> None:
    sparse = sound["bf16"][0].copy()
    sparse.config = {**CONFIGS["v3"], **change}
    problems = _problems(sparse.write_beside(*sound["bf16"], tmp_path / "faulty"))
    assert any(problem.startswith(start) for problem in problems), problems[:5]


def test_absurd_config_is_refused_at_once(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=10_000, n_routed_experts=65_536, n_group=1, topk_group=1)
    tensors = tensor_list(tiny_config(), "bf16")
    (problem,) = _problems(_sparse(config, tensors, tmp_path))
    assert "config.json calls for at least" in problem


# ---------------------------------------------------------------------------------------------
# What is accepted

TINY = tiny_config()


def test_multi_token_prediction_layer_may_be_dropped(tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    plan = _resolve(_sparse(config, tensor_list(config, "bf16", mtp=False), tmp_path / "without"))
    assert plan.mtp_layers == 0
    plan = _resolve(_sparse(config, tensor_list(config, "bf16", mtp=True), tmp_path / "with"))
    assert plan.mtp_layers == 1
    plan = _resolve(_sparse(TINY, tensor_list(TINY, "bf16", mtp=True), tmp_path / "unannounced"))
    assert plan.mtp_layers == 1
    tensors = tensor_list(config, "fp8", mtp=True)
    del tensors["model.layers.3.embed_tokens.weight"]
    del tensors["model.layers.3.shared_head.head.weight"]
    assert _resolve(_sparse(config, tensors, tmp_path / "shared")).mtp_layers == 1
    del tensors["model.layers.3.enorm.weight"]
    (problem,) = _problems(_sparse(config, tensors, tmp_path / "partial"))
    assert problem.startswith("model.layers.3.enorm.weight: missing")


@pytest.mark.parametrize("family", ["V2", "V3"])
def test_files_that_transformers_saves(tmp_path: Path, family: str) -> None:
    import transformers

    tiny = ModelConfig.from_dict(TINY)
    options = {
        "vocab_size": tiny.vocab_size,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "moe_intermediate_size": tiny.moe_intermediate_size,
        "num_hidden_layers": tiny.num_hidden_layers,
        "num_attention_heads": tiny.num_attention_heads,
        "num_key_value_heads": tiny.num_attention_heads,
        "n_routed_experts": tiny.n_routed_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": tiny.kv_lora_rank,
        "qk_nope_head_dim": tiny.qk_nope_head_dim,
        "qk_rope_head_dim": tiny.qk_rope_head_dim,
        "v_head_dim": tiny.v_head_dim,
    }
    if family == "V2":
        options["topk_method"] = "group_limited_greedy"
    config = getattr(transformers, f"Deepseek{family}Config")(**options)
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    plan = _resolve(tmp_path)
    assert plan.parameters() == sum(p.numel() for p in model.state_dict().values())
    assert plan.warnings == ()


def test_inverse_frequencies_are_ignored(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "bf16")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Entry("F32", (4,))
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = Entry("F32", (4,))
    _resolve(_sparse(TINY, tensors, tmp_path))


@pytest.mark.parametrize("head", [True, False])
def test_tied_embeddings(tmp_path: Path, head: bool) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = tensor_list(config, "bf16")
    assert "lm_head.weight" not in tensors
    if head:
        tensors["lm_head.weight"] = Entry("BF16", (300, 72))
    plan = _resolve(_sparse(config, tensors, tmp_path))
    assert plan.lm_head is None
    untied = _resolve(_sparse(TINY, tensor_list(TINY, "bf16"), tmp_path / "untied"))
    assert plan.packed_nbytes() == untied.packed_nbytes()
    assert plan.active_parameters() == untied.active_parameters()


def test_layers_may_differ(tmp_path: Path) -> None:
    formats = ["bf16", "int8", "fp8"]
    lists = [tensor_list(TINY, fmt) for fmt in formats]
    tensors = {k: v for k, v in lists[0].items() if ".layers." not in k}
    for layer, each in enumerate(lists):
        tensors |= {k: v for k, v in each.items() if f".layers.{layer}." in k}
    plan = _resolve(_sparse(TINY, tensors, tmp_path))
    assert [set(plan.schemes(i).values()) for i in range(3)] == [{"bf16"}, {"w8a8_int8"}, {"fp8"}]
    assert plan.layers[1].attention.kv_b.format is Format.INT8_WIDE
    assert plan.layers[2].attention.kv_b.format is Format.BF16


def test_weights_packed_together_but_stored_differently_run_in_bf16(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "int8")
    name = "model.layers.1.mlp.experts.4.up_proj"
    del tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight"] = Entry("BF16", (36, 72))
    plan = _resolve(_sparse(TINY, tensors, tmp_path))
    assert plan.schemes(1)["experts.gate_up"] == "bf16/w8a8_int8 -> bf16"
    assert plan.schemes(1)["experts.down"] == "w8a8_int8"
    (warning,) = [w for w in plan.warnings if "run in bf16" in w]
    assert "model.layers.1.mlp.experts.0.gate_proj" in warning
    again = _resolve(tmp_path, "w8a8_int8")
    assert again.schemes(1)["experts.gate_up"] == "bf16/w8a8_int8 -> w8a8_int8"
    assert not [w for w in again.warnings if "run in bf16" in w]


def test_wider_weights_are_rounded_with_a_warning(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "bf16")
    for name, entry in tensors.items():
        tensors[name] = Entry("F16" if "o_proj" in name else "F32", entry.shape)
    plan = _resolve(_sparse(TINY, tensors, tmp_path))
    assert any("rounded to bfloat16" in warning for warning in plan.warnings)
    moe = plan.layers[1].ffn
    assert isinstance(moe, MoePlan)
    assert moe.router_format is Format.F32
    assert plan.schemes(0)["o"] == "bf16"
    assert plan.peak_nbytes() == plan.packed_nbytes() + 2 * 100 * 72


@pytest.mark.parametrize(
    ("fmt", "section", "warning"),
    [
        ("bf16", None, None),
        ("fp8", FP8_SECTION, None),
        ("int8", {"quant_method": "compressed-tensors", "format": "int-quantized"}, None),
        ("int8", {"quant_method": "w8a8_int8"}, None),
        ("int8", None, "config.json has no quantization_config, but weights are stored as w8a8"),
        ("int8", FP8_SECTION, "config.json's quantization_config (fp8) is stale: weights are"),
        ("bf16", FP8_SECTION, "config.json's quantization_config (fp8) is stale: weights are"),
        ("fp8", {"quant_method": "awq"}, "config.json's quantization_config (awq) is stale"),
        ("fp8", {"quant_method": 3}, "config.json's quantization_config (3) is stale"),
    ],
)
def test_the_tensors_decide_and_a_stale_section_is_a_warning(
    tmp_path: Path, fmt: str, section: Config | None, warning: str | None
) -> None:
    config = TINY if section is None else {**TINY, "quantization_config": section}
    plan = _resolve(_sparse(config, tensor_list(config, fmt), tmp_path))
    assert set(plan.schemes(0).values()) == {FORMATS[fmt]}
    assert len(plan.warnings) == (0 if warning is None else 1)
    if warning is not None:
        assert plan.warnings[0].startswith(warning)


# ---------------------------------------------------------------------------------------------
# --quantization

PAIRS = {
    ("bf16", "auto"): "bf16",
    ("int8", "auto"): "w8a8_int8",
    ("fp8", "auto"): "fp8",
    ("bf16", "unquant"): "bf16",
    ("int8", "unquant"): "bf16",
    ("fp8", "unquant"): "bf16",
    ("bf16", "w8a8_int8"): "w8a8_int8",
    ("int8", "w8a8_int8"): "w8a8_int8",
    ("fp8", "w8a8_int8"): "w8a8_int8",
    ("bf16", "fp8"): "fp8",
    ("int8", "fp8"): None,
    ("fp8", "fp8"): "fp8",
}


@pytest.mark.parametrize(("fmt", "quantization"), PAIRS)
def test_quantization_pairs(tmp_path: Path, fmt: str, quantization: str) -> None:
    _sparse(TINY, tensor_list(TINY, fmt), tmp_path)
    run = PAIRS[fmt, quantization]
    if run is None:
        with pytest.raises(QuantizationError) as caught:
            _resolve(tmp_path, quantization)
        text = str(caught.value)
        assert "--quantization fp8 cannot be met" in text
        assert "model.layers.0.self_attn.q_a_proj.weight (w8a8_int8)" in text
        assert "\n" not in text
        return
    plan = _resolve(tmp_path, quantization)
    stored = FORMATS[fmt]
    text = run if stored == run else f"{stored} -> {run}"
    assert {s for i in range(3) for s in plan.schemes(i).values()} == {text}
    assert {m.scheme.name for m in plan.matrices()} == {run}


def test_missing_tensors_come_before_refused_quantization(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "int8")
    del tensors["model.norm.weight"]
    _sparse(TINY, tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: missing"):
        _resolve(tmp_path, "fp8")


# ---------------------------------------------------------------------------------------------
# Sizes


def test_sizes_add_up(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "int8")
    plan = _resolve(_sparse(TINY, tensors, tmp_path))
    assert plan.source_nbytes() == sum(entry.nbytes for entry in tensors.values())
    weights = sum(
        entry.shape[0] * (entry.shape[1] if len(entry.shape) == 2 else 1)
        for name, entry in tensors.items()
        if not name.endswith("weight_scale")
    )
    assert plan.parameters() == weights
    layer = plan.layers[1]
    assert isinstance(layer.ffn, MoePlan)
    assert isinstance(plan.layers[0].ffn, MlpPlan)
    gate_up = layer.ffn.experts_gate_up
    assert (gate_up.batch, gate_up.parts, gate_up.rows, gate_up.cols) == (6, 2, 36, 72)
    assert gate_up.packed_nbytes == packed_nbytes(Format.INT8, 6, 2, 36, 72)
    assert [piece.name.split(".")[-2:] for piece in gate_up.pieces[:3]] == [
        ["0", "gate_proj"],
        ["0", "up_proj"],
        ["1", "gate_proj"],
    ]
    kv_b = layer.attention.kv_b
    assert (kv_b.heads, kv_b.nope, kv_b.v, kv_b.rank) == (3, 16, 20, 40)
    assert kv_b.heads_nbytes == packed_nbytes(Format.INT8_WIDE, 3, 1, 40, 16) + packed_nbytes(
        Format.INT8_WIDE, 3, 1, 20, 40
    )


def test_bytes_a_token_fall_with_the_batch_until_all_experts_are_read(tmp_path: Path) -> None:
    plan = _resolve(_sparse(TINY, tensor_list(TINY, "bf16"), tmp_path))
    steps = [plan.weight_bytes_per_token(batch) * batch for batch in (1, 2, 8, 10_000)]
    assert steps == sorted(steps)
    everything = plan.packed_nbytes() - sum(
        layer.attention.kv_b.linear.packed_nbytes for layer in plan.layers
    )
    unread = 2 * 300 * 72  # the embedding: one row a token is read instead
    assert steps[-1] - 2 * 72 * 10_000 == pytest.approx(everything - unread)


def test_index_total_size_is_not_trusted(tmp_path: Path) -> None:
    _sparse(TINY, tensor_list(TINY, "bf16"), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["metadata"] = {"total_size": -1}
    index.write_text(json.dumps(data))
    assert _resolve(tmp_path).source_nbytes() > 0
