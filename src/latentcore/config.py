"""What a model is and how it is to be run: frozen, validated values.

`ModelConfig` is read from a checkpoint's own `config.json`, in either spelling (`rope_scaling` +
`rope_theta` + `torch_dtype`, or `rope_parameters` + `dtype` since transformers 5). Keys that do not
change the arithmetic are ignored, `auto_map` among them: no code of a checkpoint is ever run.
`EngineConfig` holds the user's choices.

The file is untrusted: every number is bounded, and all problems are reported at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from latentcore.errors import ConfigError, UnsupportedModelError
from latentcore.files import (
    JsonError,
    UnsafePathError,
    contained_file,
    json_kind,
    read_json_file,
    shorten,
)

SUPPORTED_MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
"""Values of `model_type` that this engine runs. `kimi_k2` is the V3 architecture."""

QUANTIZATIONS = ("auto", "unquant", "w8a8_int8", "fp8")
"""Values of `--quantization`. `auto` keeps what the checkpoint stores."""

INNER_NORM_EPS = 1e-6
"""Eps of `q_a_layernorm` and `kv_a_layernorm`, whatever `rms_norm_eps` says."""

_MAX_CONFIG_BYTES = 16 << 20
_MAX_WIDTH = 1 << 22
_MAX_COUNT = 1 << 16


# ---------------------------------------------------------------------------------------------
# Reading keys


def _read_config_file(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in file `name` of a model folder, None when there is no such file."""
    try:
        return read_json_file(contained_file(folder, name), _MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnsupportedModelError(f"{folder / name}: cannot be read ({error.strerror})") from None
    except UnsafePathError as error:
        raise UnsupportedModelError(str(error)) from None
    except JsonError as error:
        raise UnsupportedModelError(f"{folder / name}: {error}") from None


class _Reader:
    """Takes keys out of one JSON object and notes every problem, not only the first."""

    def __init__(self, data: Mapping[str, Any], problems: list[str], prefix: str = "") -> None:
        self.data = data
        self.problems = problems
        self.prefix = prefix

    def problem(self, key: str, expected: str) -> None:
        found = json_kind(self.data[key]) if key in self.data else "nothing"
        self.problems.append(f"{self.prefix}{key}: expected {expected}, found {found}")

    def integer(
        self,
        key: str,
        *,
        low: int = 1,
        high: int = _MAX_WIDTH,
        default: int | None = None,
        null: int | None = None,
    ) -> int:
        """An integer in [low, high]. Absent: `default`; JSON null: `null`; without those, wrong."""
        value = self.data.get(key)
        if key not in self.data and default is not None:
            return default
        if key in self.data and value is None and null is not None:
            return null
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(key, f"an integer from {low} to {high}")
            return low
        return value

    def number(
        self,
        key: str,
        *,
        low: float = 0.0,
        high: float = 1e12,
        low_open: bool = True,
        default: float | None = None,
    ) -> float:
        """A finite number above `low` (or at least `low`) and at most `high`."""
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (value > low or (not low_open and value == low))
            or not value <= high
        ):
            bound = "above" if low_open else "of at least"
            self.problem(key, f"a number {bound} {low:g} and at most {high:g}")
            return max(low, 1.0)
        return float(value)

    def optional_number(self, key: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        if self.data.get(key) is None:
            return None
        return self.number(key, low=low, high=high)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, "true or false")
            return default
        return value

    def text(self, key: str, *, default: str) -> str:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(key, "a text")
            return default
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.data.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                self.problem(key, f"token ids from 0 to {vocab_size - 1}")
                return ()
        return tuple(dict.fromkeys(items))


# ---------------------------------------------------------------------------------------------
# Rope


@dataclass(frozen=True)
class YarnConfig:
    """Yarn scaling of the rotary embedding (https://arxiv.org/abs/2309.00071).

    `original_max_position_embeddings` is in tokens. `mscale` and `mscale_all_dim` are 0 where the
    config is silent. `attention_factor`, where set, replaces the computed `cos_sin_scale`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by: 1 where `mscale` equals `mscale_all_dim`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_mscale(self) -> float:
        """What query and key are each worth more: it enters the softmax scale squared."""
        return _mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding over `dim` elements, in interleaved pairs (2i, 2i+1)."""

    theta: float
    dim: int
    scaling: YarnConfig | None = None

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians a token for each pair: float64 [dim / 2]."""
        powers = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        plain = 1.0 / self.theta**powers
        yarn = self.scaling
        if yarn is None:
            return plain

        def correction_dim(rotations: float) -> float:
            turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return self.dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = (torch.arange(self.dim // 2, dtype=torch.float64) - low) / (high - low)
        interpolated = ramp.clamp(0.0, 1.0)
        return plain / yarn.factor * interpolated + plain * (1.0 - interpolated)


def rope_table(config: RopeConfig, max_len: int) -> torch.Tensor:
    """cos and sin for positions 0 to `max_len` - 1: float32 [max_len, config.dim].

    Row p holds cos(p x f_i) for the dim / 2 pairs, then sin(p x f_i) for the same pairs, both
    multiplied by yarn's `cos_sin_scale`. Computed in float64 and rounded once.
    """
    frequencies = config.inverse_frequencies()
    scale = config.scaling.cos_sin_scale if config.scaling else 1.0
    half = config.dim // 2
    table = torch.empty(max_len, config.dim, dtype=torch.float32)
    step = 1 << 14
    for start in range(0, max_len, step):
        stop = min(start + step, max_len)
        positions = torch.arange(start, stop, dtype=torch.float64)
        angles = positions[:, None] * frequencies
        table[start:stop, :half] = angles.cos() * scale
        table[start:stop, half:] = angles.sin() * scale
    return table


_PLAIN_ROPE = ("default",)


def _read_rope(reader: _Reader, dim: int) -> RopeConfig:
    """Reads either spelling of the rotary embedding's settings."""
    data, problems = reader.data, reader.problems
    name = "rope_parameters" if data.get("rope_parameters") is not None else "rope_scaling"
    section = data.get(name)
    if section is None:
        return RopeConfig(theta=reader.number("rope_theta", low=1.0, default=10000.0), dim=dim)
    if not isinstance(section, dict):
        reader.problem(name, "an object or null")
        return RopeConfig(theta=10000.0, dim=dim)
    inner = _Reader(section, problems, prefix=f"{name}.")
    if "rope_theta" in section:
        theta = inner.number("rope_theta", low=1.0)
    else:
        theta = reader.number("rope_theta", low=1.0, default=10000.0)
    kind_key = "rope_type" if section.get("rope_type") is not None else "type"
    kind = inner.text(kind_key, default="default")
    if kind in _PLAIN_ROPE:
        return RopeConfig(theta=theta, dim=dim)
    if kind != "yarn":
        inner.problem(kind_key, 'the rope type "yarn" or "default"')
        return RopeConfig(theta=theta, dim=dim)
    max_positions = data.get("max_position_embeddings")
    original_key = "original_max_position_embeddings"
    if section.get(original_key) is None and isinstance(max_positions, int):
        original = max(1, max_positions)
    else:
        original = inner.integer(original_key, high=1 << 30)
    if section.get("factor") is None and isinstance(max_positions, int):
        factor = max(1.0, max_positions / original)
    else:
        factor = inner.number("factor", low=1.0, high=1e6, low_open=False)
    yarn = YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=inner.number("beta_fast", default=32.0),
        beta_slow=inner.number("beta_slow", default=1.0),
        mscale=inner.number("mscale", low_open=False, high=1e3, default=0.0),
        mscale_all_dim=inner.number("mscale_all_dim", low_open=False, high=1e3, default=0.0),
        attention_factor=inner.optional_number("attention_factor", high=1e3),
        truncate=inner.boolean("truncate", default=True),
    )
    if yarn.beta_fast < yarn.beta_slow:
        problems.append(
            f"{name}.beta_fast: expected at least beta_slow ({yarn.beta_slow:g}), "
            f"found {yarn.beta_fast:g}"
        )
    return RopeConfig(theta=theta, dim=dim, scaling=yarn)


# ---------------------------------------------------------------------------------------------
# Router


@dataclass(frozen=True)
class RouterConfig:
    """How `top_k` of the routed experts are chosen for a token, and weighted.

    scoring      scores are the softmax or the sigmoid of the router's logits
    has_bias     `e_score_correction_bias` is added to the scores for the choice only
    n_group      experts lie in this many equal groups, of which the best `topk_group` take part
    group_score  a group's score: its best expert ("max") or the sum of its two best ("top2_sum")
    norm_topk_prob         the chosen scores are divided by their sum
    routed_scaling_factor  and then multiplied by this
    """

    scoring: Literal["softmax", "sigmoid"]
    has_bias: bool
    n_group: int
    topk_group: int
    group_score: Literal["max", "top2_sum"]
    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float


_ROUTERS = {
    "greedy": "softmax",
    "group_limited_greedy": "softmax",
    "noaux_tc": "sigmoid",
}


def _read_router(reader: _Reader, model_type: str, experts: int) -> RouterConfig:
    problems = reader.problems
    newer = model_type != "deepseek_v2"
    method = reader.text("topk_method", default="noaux_tc" if newer else "greedy")
    if method not in _ROUTERS:
        reader.problem("topk_method", f"one of {', '.join(_ROUTERS)}")
        method = "noaux_tc" if newer else "greedy"
    scoring = reader.text("scoring_func", default=_ROUTERS[method])
    if scoring != _ROUTERS[method]:
        reader.problem("scoring_func", f'"{_ROUTERS[method]}" with topk_method "{method}"')
    top_k = reader.integer("num_experts_per_tok", high=_MAX_COUNT)
    n_group = topk_group = 1
    if method != "greedy":
        n_group = reader.integer("n_group", high=_MAX_COUNT, default=1, null=1)
        topk_group = reader.integer("topk_group", high=_MAX_COUNT, default=1, null=1)
    if top_k > experts:
        problems.append(
            f"num_experts_per_tok: expected at most n_routed_experts ({experts}), found {top_k}"
        )
    if topk_group > n_group:
        problems.append(f"topk_group: expected at most n_group ({n_group}), found {topk_group}")
    if experts % n_group:
        problems.append(
            f"n_group: expected a divisor of n_routed_experts ({experts}), found {n_group}"
        )
    else:
        width = experts // n_group
        if method == "noaux_tc" and n_group > 1 and width < 2:
            problems.append(
                f"n_group: expected groups of at least 2 experts (a group's score is the sum of "
                f"its two best), found {n_group} groups of {width}"
            )
        if topk_group <= n_group and topk_group * width < top_k <= experts:
            problems.append(
                f"num_experts_per_tok: expected at most {topk_group * width} (topk_group "
                f"{topk_group} x {width} experts a group), found {top_k}"
            )
    norm = reader.boolean("norm_topk_prob", default=newer)
    scale = reader.number("routed_scaling_factor", high=1e6, default=2.5 if newer else 1.0)
    if method != "noaux_tc" and norm and top_k > 1:
        scale = 1.0  # DeepSeek-V2 either divides by the sum or multiplies by the factor.
    return RouterConfig(
        scoring="sigmoid" if method == "noaux_tc" else "softmax",
        has_bias=method == "noaux_tc",
        n_group=n_group,
        topk_group=topk_group,
        group_score="top2_sum" if method == "noaux_tc" else "max",
        top_k=top_k,
        norm_topk_prob=norm and (method == "noaux_tc" or top_k > 1),
        routed_scaling_factor=scale,
    )


_NO_ROUTER = RouterConfig(
    scoring="softmax",
    has_bias=False,
    n_group=1,
    topk_group=1,
    group_score="max",
    top_k=0,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
)


# ---------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a DeepSeek-class model. Widths are in elements, lengths in tokens.

    `n_routed_experts` and `n_shared_experts` are 0 where there are none, and `router.top_k` is 0
    where no layer routes. `moe_intermediate_size` is the width of one expert; the shared experts of
    a layer are one MLP of width n_shared_experts x moe_intermediate_size. `quantization_config` is
    kept as found: the tensors decide.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    first_k_dense_replace: int
    moe_layer_freq: int
    router: RouterConfig
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization_config: Mapping[str, Any] | None
    inner_norm_eps: float = INNER_NORM_EPS

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts that each token visits in a MoE layer."""
        return self.router.top_k

    @property
    def n_group(self) -> int:
        """Groups that the routed experts lie in."""
        return self.router.n_group

    @property
    def topk_group(self) -> int:
        """Groups that take part in the choice for a token."""
        return self.router.topk_group

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query and key: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements cached a token and layer: kv_lora_rank + rope."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-0.5 x mscale^2."""
        mscale = self.rope.scaling.softmax_mscale if self.rope.scaling else 1.0
        return float(self.qk_head_dim**-0.5 * mscale * mscale)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward part of decoder layer `layer` is a mixture of experts."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @classmethod
    def from_dir(cls, path: Path) -> "ModelConfig":
        """Reads `config.json` (and the end tokens of `generation_config.json`) in folder `path`.

        Raises ConfigError listing every problem, each with its key, what was expected and found;
        UnsupportedModelError where there is no such file or it speaks of another architecture.
        """
        file = path / "config.json"
        if not path.is_dir():
            raise UnsupportedModelError(f"no such model folder: {path}")
        data = _read_config_file(path, "config.json")
        if data is None:
            raise UnsupportedModelError(
                f"{path}: no config.json; expected a folder with a checkpoint as published on "
                f"Hugging Face (config.json, *.safetensors)"
            )
        try:
            config = cls.from_dict(data)
        except ConfigError as error:
            raise type(error)(error.problems, where=str(file)) from None
        generation = GenerationDefaults.from_dir(path, config.vocab_size)
        ids = tuple(dict.fromkeys(config.eos_token_ids + generation.eos_token_ids))
        return cls(**{**config.__dict__, "eos_token_ids": ids})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Builds the config from a parsed `config.json`.

        Raises ConfigError with all problems, UnsupportedModelError for another architecture.
        """
        model_type = data.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedModelError(_unsupported_architecture(data))
        assert isinstance(model_type, str)
        problems: list[str] = []
        reader = _Reader(data, problems)

        heads = reader.integer("num_attention_heads", high=_MAX_COUNT)
        kv_heads = reader.integer("num_key_value_heads", default=heads, null=heads, high=_MAX_COUNT)
        if kv_heads != heads:
            problems.append(
                f"num_key_value_heads: expected num_attention_heads ({heads}; the latent is shared "
                f"by all heads), found {kv_heads}"
            )
        q_lora_rank: int | None = None
        if "q_lora_rank" not in data or data["q_lora_rank"] is not None:
            q_lora_rank = reader.integer("q_lora_rank")
        rope_dim = reader.integer("qk_rope_head_dim", high=_MAX_COUNT)
        if rope_dim % 2:
            problems.append(f"qk_rope_head_dim: expected an even number, found {rope_dim}")
            rope_dim += 1
        experts = reader.integer("n_routed_experts", low=0, high=_MAX_COUNT, default=0, null=0)
        vocab_size = reader.integer("vocab_size")

        for key in ("attention_bias", "mlp_bias"):
            if reader.boolean(key, default=False):
                problems.append(f"{key}: expected false (biases are not supported), found true")
        activation = reader.text("hidden_act", default="silu")
        if activation not in ("silu", "swish"):
            reader.problem("hidden_act", 'the activation "silu"')
        if not reader.boolean("rope_interleave", default=True):
            problems.append(
                "rope_interleave: expected true (weights in DeepSeek's own pair order), found false"
            )
        quantization = data.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            reader.problem("quantization_config", "an object or null")
            quantization = None
        bos = reader.token_ids("bos_token_id", vocab_size)

        config = cls(
            model_type=model_type,
            hidden_size=reader.integer("hidden_size"),
            num_hidden_layers=reader.integer("num_hidden_layers", high=10_000),
            num_attention_heads=heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=reader.integer("kv_lora_rank"),
            qk_nope_head_dim=reader.integer("qk_nope_head_dim", high=_MAX_COUNT),
            qk_rope_head_dim=rope_dim,
            v_head_dim=reader.integer("v_head_dim", high=_MAX_COUNT),
            intermediate_size=reader.integer("intermediate_size"),
            moe_intermediate_size=reader.integer("moe_intermediate_size") if experts else 0,
            n_routed_experts=experts,
            n_shared_experts=(
                reader.integer("n_shared_experts", low=0, high=_MAX_COUNT, default=0, null=0)
                if experts
                else 0
            ),
            first_k_dense_replace=reader.integer("first_k_dense_replace", low=0, default=0, null=0),
            moe_layer_freq=reader.integer("moe_layer_freq", high=_MAX_COUNT, default=1, null=1),
            router=_read_router(reader, model_type, experts) if experts else _NO_ROUTER,
            vocab_size=vocab_size,
            rms_norm_eps=reader.number("rms_norm_eps", high=1.0, default=1e-6),
            rope=_read_rope(reader, rope_dim),
            max_position_embeddings=reader.integer("max_position_embeddings", high=1 << 30),
            tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
            num_nextn_predict_layers=reader.integer(
                "num_nextn_predict_layers", low=0, high=64, default=0, null=0
            ),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
            quantization_config=quantization,
        )
        if problems:
            raise ConfigError(problems)
        return config


def _unsupported_architecture(data: Mapping[str, Any]) -> str:
    model_type = data.get("model_type")
    found = json_kind(model_type) if "model_type" in data else "nothing"
    if isinstance(model_type, str):
        found = f'"{shorten(model_type)}"'
    names = data.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        found += f" ({shorten(names[0])})"
    hint = ""
    for key in ("text_config", "language_config", "thinker_config", "llm_config"):
        inner = data.get(key)
        if isinstance(inner, dict) and inner.get("model_type") in SUPPORTED_MODEL_TYPES:
            hint = f"; its {key} is one, but models with more than text are not supported"
    return (
        f"model_type: not a DeepSeek architecture that is supported: expected one of "
        f"{', '.join(SUPPORTED_MODEL_TYPES)}, found {found}{hint}"
    )


# ---------------------------------------------------------------------------------------------
# Generation defaults


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` suggests; None where it is silent.

    `temperature` is 0 where the file turns sampling off (`do_sample` false).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dir(cls, path: Path, vocab_size: int) -> "GenerationDefaults":
        """Reads `generation_config.json` in folder `path`; all None when there is no such file.

        Raises ConfigError listing every problem.
        """
        file = path / "generation_config.json"
        data = _read_config_file(path, "generation_config.json")
        if data is None:
            return cls()
        problems: list[str] = []
        reader = _Reader(data, problems)

        def optional(key: str, read: Callable[[], Any]) -> Any:
            return None if data.get(key) is None else read()

        temperature = optional(
            "temperature", lambda: reader.number("temperature", low_open=False, high=100.0)
        )
        if data.get("do_sample") is not None and not reader.boolean("do_sample", default=True):
            temperature = 0.0
        defaults = cls(
            temperature=temperature,
            top_p=optional("top_p", lambda: reader.number("top_p", high=1.0)),
            top_k=optional("top_k", lambda: reader.integer("top_k", low=-1, high=1 << 30)),
            min_p=optional("min_p", lambda: reader.number("min_p", low_open=False, high=1.0)),
            repetition_penalty=optional(
                "repetition_penalty", lambda: reader.number("repetition_penalty", high=100.0)
            ),
            eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
        )
        if problems:
            raise ConfigError(problems, where=str(file))
        return defaults


# ---------------------------------------------------------------------------------------------
# The engine


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model: the user's choices. None means that the engine chooses.

    quantization            one of QUANTIZATIONS
    threads                 worker threads; default: the physical cores that run at the same time
    max_model_len           longest prompt + output of one sequence, in tokens
    max_num_seqs            sequences in one step
    max_num_batched_tokens  tokens computed in one step
    kv_cache_memory_bytes   bytes for the latent cache
    block_size              tokens in a cache block
    use_graph               decode by replaying captured graphs
    enable_prefix_caching   reuse cached blocks of equal prefixes
    seed                    base of the random numbers for requests without a seed

    Raises ConfigError listing every value out of range.
    """

    quantization: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    block_size: int = 64
    use_graph: bool = True
    enable_prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.quantization not in QUANTIZATIONS:
            problems.append(
                f"quantization: expected one of {', '.join(QUANTIZATIONS)}, "
                f"found {self.quantization!r}"
            )
        bounds: list[tuple[str, int | None, int, int]] = [
            ("threads", self.threads, 1, 4096),
            ("max_model_len", self.max_model_len, 1, 1 << 30),
            ("max_num_seqs", self.max_num_seqs, 1, 4096),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20),
            ("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50),
            ("seed", self.seed, 0, (1 << 64) - 1),
        ]
        for name, value, low, high in bounds:
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                problems.append(
                    f"{name}: expected an integer from {low} to {high}, found {value!r}"
                )
        if self.block_size != 64:
            problems.append(f"block_size: expected 64, found {self.block_size!r}")
        if problems:
            raise ConfigError(problems)
