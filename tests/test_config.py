"""config.json of every supported model, both spellings, and everything that may be wrong in one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, YARN_V3, Config, newer_spelling, tiny_config, write_config

from latentcore.config import (
    EngineConfig,
    GenerationDefaults,
    ModelConfig,
    RopeConfig,
    YarnConfig,
    rope_table,
)
from latentcore.errors import ConfigError, UserError

SCALES = {
    "v2-lite": 0.114721,
    "v2": 0.114721,
    "moonlight": 192**-0.5,
    "v3": 0.135234,
    "kimi-k2": 192**-0.5 * (0.1 * math.log(32) + 1) ** 2,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs(name: str) -> None:
    config = ModelConfig.from_dict(CONFIGS[name])
    raw = CONFIGS[name]
    assert config.softmax_scale == pytest.approx(SCALES[name], abs=5e-7)
    assert config.q_lora_rank == raw["q_lora_rank"]
    assert config.latent_dim == 576
    assert config.qk_head_dim == 192
    assert config.rms_norm_eps == raw["rms_norm_eps"]
    assert config.inner_norm_eps == 1e-6
    assert config.eos_token_ids == (raw["eos_token_id"],)
    assert config.router.top_k == config.num_experts_per_tok == raw["num_experts_per_tok"]
    assert config.router.routed_scaling_factor == raw["routed_scaling_factor"]
    assert config.router.norm_topk_prob is raw["norm_topk_prob"]
    assert (config.n_group, config.topk_group) == (raw["n_group"], raw["topk_group"])
    first = raw["first_k_dense_replace"]
    assert not config.is_moe_layer(first - 1)
    assert config.is_moe_layer(first)
    if raw["model_type"] == "deepseek_v2":
        assert (config.router.scoring, config.router.group_score) == ("softmax", "max")
        assert not config.router.has_bias
    else:
        assert (config.router.scoring, config.router.group_score) == ("sigmoid", "top2_sum")
        assert config.router.has_bias


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_agree(name: str) -> None:
    assert ModelConfig.from_dict(newer_spelling(CONFIGS[name])) == ModelConfig.from_dict(
        CONFIGS[name]
    )


def test_config_without_router_names_is_read_by_its_model_type() -> None:
    newer = tiny_config()
    del newer["topk_method"], newer["scoring_func"]
    assert ModelConfig.from_dict(newer) == ModelConfig.from_dict(tiny_config())


def test_unknown_keys_and_code_are_ignored(tmp_path: Path) -> None:
    config = tiny_config(auto_map={"AutoConfig": "evil.Config"}, some_future_key=[1, {"a": 2}])
    write_config(tmp_path, config)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.from_dict(tiny_config())
    assert not marker.exists()


def test_layer_frequency_and_dense_models() -> None:
    config = ModelConfig.from_dict(tiny_config(moe_layer_freq=2, num_hidden_layers=6))
    assert [config.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]
    dense = ModelConfig.from_dict(tiny_config(n_routed_experts=None, n_shared_experts=None))
    assert not any(dense.is_moe_layer(i) for i in range(6))
    assert (dense.n_routed_experts, dense.n_shared_experts, dense.num_experts_per_tok) == (0, 0, 0)


def test_v2_router_either_norms_or_scales() -> None:
    v2 = {**CONFIGS["v2"], "norm_topk_prob": True}
    assert ModelConfig.from_dict(v2).router.routed_scaling_factor == 1.0
    v3 = ModelConfig.from_dict(CONFIGS["v3"])
    assert v3.router.norm_topk_prob
    assert v3.router.routed_scaling_factor == 2.5


BROKEN: list[tuple[Config, str]] = [
    ({"hidden_size": None}, "hidden_size: expected an integer from 1 to 4194304, found null"),
    (
        {"hidden_size": "72"},
        'hidden_size: expected an integer from 1 to 4194304, found the text "72"',
    ),
    ({"hidden_size": 72.0}, "hidden_size: expected an integer"),
    ({"hidden_size": True}, "hidden_size: expected an integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer from 1 to 10000"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers: expected an integer from 1 to 10000"),
    ({"vocab_size": -3}, "vocab_size: expected an integer from 1 to 4194304"),
    (
        {"num_experts_per_tok": 7},
        "num_experts_per_tok: expected at most n_routed_experts (6), found 7",
    ),
    ({"num_experts_per_tok": 4}, "num_experts_per_tok: expected at most 3 (topk_group 1 x 3"),
    ({"n_group": 4}, "n_group: expected a divisor of n_routed_experts (6), found 4"),
    ({"topk_group": 3}, "topk_group: expected at most n_group (2), found 3"),
    ({"n_group": 6, "topk_group": 6}, "n_group: expected groups of at least 2 experts"),
    (
        {"topk_method": "magic"},
        "topk_method: expected one of greedy, group_limited_greedy, noaux_tc",
    ),
    ({"scoring_func": "softmax"}, 'scoring_func: expected "sigmoid" with topk_method "noaux_tc"'),
    ({"attention_bias": True}, "attention_bias: expected false"),
    ({"mlp_bias": True}, "mlp_bias: expected false"),
    ({"hidden_act": "gelu"}, 'hidden_act: expected the activation "silu", found the text "gelu"'),
    ({"num_key_value_heads": 1}, "num_key_value_heads: expected num_attention_heads (3"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even number, found 7"),
    ({"rope_interleave": False}, "rope_interleave: expected true"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number above 0"),
    ({"rope_theta": 0.5}, "rope_theta: expected a number above 1"),
    ({"rope_scaling": []}, "rope_scaling: expected an object or null, found a list"),
    (
        {"rope_scaling": {"type": "llama3", "factor": 8}},
        'rope_scaling.type: expected the rope type "yarn" or "default", found the text "llama3"',
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        'rope_parameters.rope_type: expected the rope type "yarn" or "default"',
    ),
    ({"rope_scaling": {**YARN_V3, "factor": 0.5}}, "rope_scaling.factor: expected a number of at"),
    ({"rope_scaling": {**YARN_V3, "beta_fast": 0.5}}, "rope_scaling.beta_fast: expected at least"),
    ({"eos_token_id": 300}, "eos_token_id: expected token ids from 0 to 299, found the number 300"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id: expected token ids from 0 to 299, found a list"),
    ({"quantization_config": "fp8"}, "quantization_config: expected an object or null"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[m[:40] for _, m in BROKEN])
def test_each_broken_key_is_named(change: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(tiny_config(**change))
    assert [p for p in caught.value.problems if p.startswith(message)], caught.value.problems
    assert isinstance(caught.value, UserError)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(n_group=4, hidden_act="relu", vocab_size=0, mlp_bias=True))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dir(tmp_path)
    named = {problem.split(":")[0] for problem in caught.value.problems}
    assert {"n_group", "hidden_act", "vocab_size", "mlp_bias"} <= named
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("key", ["q_lora_rank", "kv_lora_rank", "intermediate_size", "v_head_dim"])
def test_missing_key_is_named(key: str) -> None:
    config = tiny_config()
    del config[key]
    with pytest.raises(ConfigError, match=f"{key}: expected an integer .* found nothing"):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, r'"llama" \(LlamaForCaus'),
        ({"model_type": "deepseek_v32"}, '"deepseek_v32"'),
        ({}, "found nothing"),
        ({"model_type": ["deepseek_v3"]}, "found a list"),
        (
            {"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}},
            "its text_config is one",
        ),
    ],
)
def test_other_architectures_are_refused(config: Config, found: str) -> None:
    pattern = f"not a DeepSeek architecture.*deepseek_v2, deepseek_v3, kimi_k2.*{found}"
    with pytest.raises(ConfigError, match=pattern):
        ModelConfig.from_dict(config)


STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    0.0,
    -0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "yarn",
    "\x1b[2J",
    [],
    [1],
    [[]],
    {},
    {"type": "yarn"},
    {"rope_type": None, "factor": None},
    {"quant_method": ["fp8"]},
]


@pytest.mark.parametrize("base", ["v2", "v3"])
def test_strange_values_are_refused_or_make_a_usable_config(base: str) -> None:
    published = CONFIGS[base]
    sections: list[tuple[str, Config]] = [("", published)]
    sections.append(("rope_scaling", published["rope_scaling"]))
    refused = accepted = 0
    for section, keys in sections:
        for key in keys:
            for value in STRANGE:
                config = {**published}
                if section:
                    config[section] = {**published[section], key: value}
                else:
                    config[key] = value
                problem: ConfigError | None = None
                try:
                    found = ModelConfig.from_dict(config)
                except ConfigError as error:
                    problem = error
                if problem is not None:
                    refused += 1
                    assert str(problem).replace("\n", "").isprintable()
                    continue
                accepted += 1
                assert math.isfinite(found.softmax_scale)
                assert torch.isfinite(rope_table(found.rope, 3)).all()
                assert (
                    0 < found.router.top_k <= found.n_routed_experts or not found.n_routed_experts
                )
                assert found.is_moe_layer(10**6) in (True, False)
    assert refused > 300
    assert accepted > 300


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "list": (b"[]", "expected a JSON object, found a list"),
    "cut": (b'{"model_type": "deepseek_v3"', "not valid JSON"),
    "twice": (b'{"hidden_size": 1, "hidden_size": 2}', '"hidden_size" stands twice'),
    "twice-inside": (b'{"a": {"b": 1, "b": 2}}', '"b" stands twice'),
    "nan": (b'{"rms_norm_eps": NaN}', "NaN is not a JSON value"),
    "bomb": (b'{"a":' * 200_000, "nested too deeply"),
    "list-bomb": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "digits": (b'{"hidden_size": ' + b"9" * 100_000 + b"}", "not valid JSON"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "bom": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "large": (b" " * ((16 << 20) + 1), "larger than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dir(tmp_path)
    assert message in str(caught.value)


def test_no_folder_no_config_and_links_that_lead_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        ModelConfig.from_dir(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    write_config(tmp_path / "elsewhere", tiny_config())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(tmp_path / "elsewhere" / "config.json")
    with pytest.raises(ConfigError, match="a link that leads out"):
        ModelConfig.from_dir(model)
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    with pytest.raises(ConfigError, match="expected a plain file"):
        ModelConfig.from_dir(model)


def test_hugging_face_cache_links_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    write_config(blobs, tiny_config())
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    assert ModelConfig.from_dir(snapshot).hidden_size == 72
    (snapshot / "config.json").unlink()
    write_config(tmp_path / "other", tiny_config())
    (snapshot / "config.json").symlink_to(tmp_path / "other" / "config.json")
    with pytest.raises(ConfigError, match="a link that leads out"):
        ModelConfig.from_dir(snapshot)


# ---------------------------------------------------------------------------------------------
# Rope


def _transformers_rope(config: Config) -> tuple[torch.Tensor, float, float]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

    rope = newer_spelling(config)["rope_parameters"]
    theirs = DeepseekV3Config(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_rope_head_dim=config["qk_rope_head_dim"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=rope,
    )
    rotary = reference.DeepseekV3RotaryEmbedding(theirs)
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    scale = reference.yarn_apply_mscale(theirs.rope_parameters, head_dim**-0.5)
    return rotary.inv_freq, rotary.attention_scaling, scale


VARIANTS: dict[str, Config] = {
    **CONFIGS,
    "unequal-mscale": tiny_config(rope_scaling={**YARN_V3, "mscale": 1.3, "mscale_all_dim": 0.4}),
    "no-mscale": tiny_config(
        rope_scaling={
            "type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 2048,
        }
    ),
    "attention-factor": tiny_config(rope_scaling={**YARN_V3, "attention_factor": 1.25}),
    "narrow-ramp": tiny_config(
        qk_rope_head_dim=16, rope_scaling={**YARN_V3, "beta_fast": 2, "beta_slow": 2, "factor": 4}
    ),
    "untruncated": tiny_config(
        qk_rope_head_dim=32, rope_scaling={**YARN_V3, "truncate": False}, rope_theta=50000.0
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rope_agrees_with_transformers(name: str) -> None:
    config = ModelConfig.from_dict(VARIANTS[name])
    frequencies, cos_sin_scale, softmax_scale = _transformers_rope(VARIANTS[name])
    ours = config.rope.inverse_frequencies()
    torch.testing.assert_close(ours.float(), frequencies, rtol=1e-6, atol=0)
    assert config.softmax_scale == pytest.approx(softmax_scale, rel=1e-12)
    scale = config.rope.scaling.cos_sin_scale if config.rope.scaling else 1.0
    assert scale == pytest.approx(cos_sin_scale, rel=1e-12)


def test_rope_table_holds_cos_then_sin_of_each_pair() -> None:
    yarn = YarnConfig(40.0, 4096, mscale=2.0, mscale_all_dim=0.5)
    rope = RopeConfig(theta=10000.0, dim=64, scaling=yarn)
    table = rope_table(rope, 20_000)
    assert table.shape == (20_000, 64)
    assert table.dtype is torch.float32
    frequencies = rope.inverse_frequencies()
    for position in (0, 1, 16_383, 16_384, 19_999):
        angles = position * frequencies
        expected = torch.cat([angles.cos(), angles.sin()]) * yarn.cos_sin_scale
        assert torch.equal(table[position], expected.float())


# ---------------------------------------------------------------------------------------------
# Generation defaults


def _generation(tmp_path: Path, data: Any) -> GenerationDefaults:
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    return GenerationDefaults.from_dir(tmp_path, 300)


def test_generation_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.from_dir(tmp_path, 300) == GenerationDefaults()
    full = _generation(
        tmp_path,
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 50,
            "min_p": 0.0,
            "repetition_penalty": 1.05,
            "eos_token_id": [1, 7, 1],
            "transformers_version": "4.46.3",
        },
    )
    assert full == GenerationDefaults(0.6, 0.95, 50, 0.0, 1.05, (1, 7))
    assert _generation(tmp_path, {"temperature": None}) == GenerationDefaults()
    assert _generation(tmp_path, {"do_sample": False, "temperature": 0.6}).temperature == 0.0


def test_generation_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _generation(tmp_path, {"temperature": -1, "top_p": 0, "eos_token_id": [300]})
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "temperature",
        "top_p",
        "eos_token_id",
    ]


def test_end_tokens_of_both_files_are_joined(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(eos_token_id=1))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1, 9]}))
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (1, 7, 9)


# ---------------------------------------------------------------------------------------------
# Engine


def test_engine_config_lists_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(
            quantization="int4", threads=0, max_model_len=-1, max_num_seqs=0, block_size=16, seed=-1
        )
    named = [problem.split(":")[0] for problem in caught.value.problems]
    assert named == [
        "quantization",
        "threads",
        "max_model_len",
        "max_num_seqs",
        "seed",
        "block_size",
    ]


def test_engine_config_defaults_are_valid() -> None:
    assert EngineConfig().quantization == "auto"
    assert EngineConfig(threads=None, max_model_len=8192, quantization="fp8").max_model_len == 8192
