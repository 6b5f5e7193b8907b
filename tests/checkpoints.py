"""Builders of checkpoints for tests: configs as published, tensor lists, real and sparse files."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I64": 8}

Config = dict[str, Any]

YARN_V3: Config = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

FP8_SECTION: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

_COMMON: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}


def _auto_map(family: str) -> Config:
    return {
        "AutoConfig": f"configuration_deepseek.{family}Config",
        "AutoModel": f"modeling_deepseek.{family}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{family}ForCausalLM",
    }


CONFIGS: Mapping[str, Config] = {
    "v2-lite": {
        **_COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": _auto_map("DeepseekV2"),
        "model_type": "deepseek_v2",
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rope_scaling": {**YARN_V3, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "v2": {
        **_COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": _auto_map("DeepseekV2"),
        "model_type": "deepseek_v2",
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 60,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "rope_scaling": {**YARN_V3, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "vocab_size": 102400,
    },
    "moonlight": {
        **_COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": _auto_map("DeepseekV3"),
        "model_type": "deepseek_v3",
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "vocab_size": 163840,
    },
    "v3": {
        **_COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": _auto_map("DeepseekV3"),
        "model_type": "deepseek_v3",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rope_scaling": YARN_V3,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
    "kimi-k2": {
        **_COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": _auto_map("DeepseekV3"),
        "model_type": "kimi_k2",
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "first_k_dense_replace": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "rope_scaling": {**YARN_V3, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "vocab_size": 163840,
    },
}
"""`config.json` of every row of the supported models, in the older spelling, as published."""


PREFLIGHT_STEPS = [
    "capture of the decode graphs",
    "prefill of one token",
    "prefill in one chunk",
    "prefill in several chunks",
    "prefill after a prefix hit",
    "prefill after a prefix hit, absorbed",
    "logits of every prompt token",
    "prefill of several sequences",
    "mixed batch",
    "decode at the end of the longest sequence",
    "decode of 1 to 64 sequences",
]
"""Kinds of step that preflight drives every model through, where the limits are the usual ones."""


def tiny_config(**changes: Any) -> Config:
    """A V3 config small enough for real weights; None of the sizes is a multiple of a panel."""
    config = {
        **CONFIGS["v3"],
        "first_k_dense_replace": 1,
        "hidden_size": 72,
        "intermediate_size": 100,
        "kv_lora_rank": 40,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 36,
        "n_group": 2,
        "n_routed_experts": 6,
        "num_attention_heads": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 44,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "rope_scaling": None,
        "topk_group": 1,
        "v_head_dim": 20,
        "vocab_size": 300,
    }
    config.pop("auto_map")
    return {**config, **changes}


def newer_spelling(config: Config) -> Config:
    """The same config as transformers 5 writes it: `rope_parameters` and `dtype`."""
    new = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    rope = dict(config.get("rope_scaling") or {"type": "default"})
    rope["rope_type"] = rope.pop("type")
    new["rope_parameters"] = {**rope, "rope_theta": config["rope_theta"]}
    new["dtype"] = new.pop("torch_dtype", "bfloat16")
    new["rope_interleave"] = True
    return new


# ---------------------------------------------------------------------------------------------
# Tensor lists, written out independently of the code under test


@dataclass
class Entry:
    """One tensor to be: dtype as safetensors spells it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


TensorList = dict[str, Entry]


def _linear(out: TensorList, name: str, rows: int, cols: int, fmt: str) -> None:
    if fmt == "bf16":
        out[f"{name}.weight"] = Entry("BF16", (rows, cols))
    elif fmt == "int8":
        out[f"{name}.weight"] = Entry("I8", (rows, cols))
        out[f"{name}.weight_scale"] = Entry("F32", (rows, 1))
    elif fmt == "fp8":
        out[f"{name}.weight"] = Entry("F8_E4M3", (rows, cols))
        grid = (math.ceil(rows / 128), math.ceil(cols / 128))
        out[f"{name}.weight_scale_inv"] = Entry("F32", grid)
    else:
        raise ValueError(fmt)


def _mlp(out: TensorList, name: str, hidden: int, width: int, fmt: str) -> None:
    _linear(out, f"{name}.gate_proj", width, hidden, fmt)
    _linear(out, f"{name}.up_proj", width, hidden, fmt)
    _linear(out, f"{name}.down_proj", hidden, width, fmt)


def _layer(out: TensorList, config: Config, layer: int, fmt: str, *, moe: bool) -> None:
    h, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    v, rank, q_rank = config["v_head_dim"], config["kv_lora_rank"], config["q_lora_rank"]
    prefix = f"model.layers.{layer}"
    attn = f"{prefix}.self_attn"
    if q_rank is None:
        _linear(out, f"{attn}.q_proj", heads * (nope + rope), h, fmt)
    else:
        _linear(out, f"{attn}.q_a_proj", q_rank, h, fmt)
        out[f"{attn}.q_a_layernorm.weight"] = Entry("BF16", (q_rank,))
        _linear(out, f"{attn}.q_b_proj", heads * (nope + rope), q_rank, fmt)
    _linear(out, f"{attn}.kv_a_proj_with_mqa", rank + rope, h, fmt)
    out[f"{attn}.kv_a_layernorm.weight"] = Entry("BF16", (rank,))
    _linear(out, f"{attn}.kv_b_proj", heads * (nope + v), rank, fmt)
    _linear(out, f"{attn}.o_proj", h, heads * v, fmt)
    if moe:
        out[f"{prefix}.mlp.gate.weight"] = Entry("BF16", (config["n_routed_experts"], h))
        if config.get("topk_method") == "noaux_tc":
            name = f"{prefix}.mlp.gate.e_score_correction_bias"
            out[name] = Entry("F32", (config["n_routed_experts"],))
        width = config["moe_intermediate_size"]
        for expert in range(config["n_routed_experts"]):
            _mlp(out, f"{prefix}.mlp.experts.{expert}", h, width, fmt)
        if config["n_shared_experts"]:
            shared = width * config["n_shared_experts"]
            _mlp(out, f"{prefix}.mlp.shared_experts", h, shared, fmt)
    else:
        _mlp(out, f"{prefix}.mlp", h, config["intermediate_size"], fmt)
    out[f"{prefix}.input_layernorm.weight"] = Entry("BF16", (h,))
    out[f"{prefix}.post_attention_layernorm.weight"] = Entry("BF16", (h,))


def tensor_list(config: Config, fmt: str, *, mtp: bool | None = None) -> TensorList:
    """Every tensor of a published checkpoint of `config`, stored as bf16, int8 or fp8.

    `mtp` None: the multi-token-prediction layer is there when the config speaks of one.
    """
    h, vocab = config["hidden_size"], config["vocab_size"]
    out: TensorList = {"model.embed_tokens.weight": Entry("BF16", (vocab, h))}
    layers = config["num_hidden_layers"]
    for layer in range(layers):
        moe = bool(config["n_routed_experts"]) and layer >= config["first_k_dense_replace"]
        _layer(out, config, layer, fmt, moe=moe)
    if mtp is None:
        mtp = bool(config.get("num_nextn_predict_layers"))
    if mtp:
        prefix = f"model.layers.{layers}"
        out[f"{prefix}.embed_tokens.weight"] = Entry("BF16", (vocab, h))
        out[f"{prefix}.enorm.weight"] = Entry("BF16", (h,))
        out[f"{prefix}.hnorm.weight"] = Entry("BF16", (h,))
        out[f"{prefix}.eh_proj.weight"] = Entry("BF16", (h, 2 * h))
        _layer(out, config, layers, fmt, moe=True)
        out[f"{prefix}.shared_head.norm.weight"] = Entry("BF16", (h,))
        out[f"{prefix}.shared_head.head.weight"] = Entry("BF16", (vocab, h))
    out["model.norm.weight"] = Entry("BF16", (h,))
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = Entry("BF16", (vocab, h))
    return out


# ---------------------------------------------------------------------------------------------
# Files


def header_bytes(tensors: Mapping[str, Entry]) -> bytes:
    """A safetensors header for `tensors`, laid out in their order, with its length in front."""
    offset = 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, entry in tensors.items():
        end = offset + entry.nbytes
        entries[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return raw_header(entries)


def raw_header(entries: object) -> bytes:
    """Any JSON value as a header, padded to 8 bytes, with its length in front."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_config(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass
class Sparse:
    """A headers-only checkpoint to be: data is a hole in the file, so full sizes cost nothing.

    `shards` maps file names to their tensors, `weight_map` is the index; change either before
    `write` to plant a fault.
    """

    config: Config
    shards: dict[str, TensorList]
    weight_map: dict[str, str] = field(default_factory=dict)

    @classmethod
    def plan(cls, config: Config, tensors: TensorList, count: int) -> "Sparse":
        """Deals the tensors out to `count` shards of about equal size, in order."""
        total = sum(entry.nbytes for entry in tensors.values())
        shards: dict[str, TensorList] = {}
        weight_map: dict[str, str] = {}
        done = 0
        for name, entry in tensors.items():
            shard = min(count, done * count // total + 1)
            file = f"model-{shard:05d}-of-{count:06d}.safetensors"
            shards.setdefault(file, {})[name] = entry
            weight_map[name] = file
            done += entry.nbytes
        return cls(config, shards, weight_map)

    def shard_of(self, name: str) -> TensorList:
        return self.shards[self.weight_map[name]]

    def remove(self, name: str) -> None:
        del self.shard_of(name)[name]
        del self.weight_map[name]

    def copy(self) -> "Sparse":
        """A copy that can be changed without changing this one."""
        shards = {file: dict(tensors) for file, tensors in self.shards.items()}
        return Sparse(self.config, shards, dict(self.weight_map))

    def write_beside(self, other: "Sparse", written: Path, folder: Path) -> Path:
        """Writes this checkpoint, with links to the shards that `other` in `written` has too."""
        folder.mkdir()
        for file, tensors in self.shards.items():
            if other.shards.get(file) == tensors:
                (folder / file).hardlink_to(written / file)
        return self.write(folder)

    def write(self, folder: Path) -> Path:
        write_config(folder, self.config)
        for file, tensors in self.shards.items():
            if (folder / file).exists():
                continue
            # Widest dtype first, as published files are, so that every tensor is aligned.
            ordered = dict(sorted(tensors.items(), key=lambda item: -ITEM_SIZES[item[1].dtype]))
            header = header_bytes(ordered)
            with (folder / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(len(header) + sum(e.nbytes for e in ordered.values()))
        index = {
            "metadata": {
                "total_size": sum(e.nbytes for s in self.shards.values() for e in s.values())
            },
            "weight_map": self.weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file with the data of `tensors`, in their order."""
    entries = {
        name: Entry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    with path.open("wb") as stream:
        stream.write(header_bytes(entries))
        for tensor in tensors.values():
            stream.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def random_tensors(tensors: TensorList, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random data for a tensor list: norms near 1, codes over their whole range, small scales."""
    generator = torch.Generator().manual_seed(seed)
    data: dict[str, torch.Tensor] = {}
    for name, entry in tensors.items():
        normal = torch.randn(entry.shape, generator=generator)
        if entry.dtype == "I8":
            data[name] = torch.randint(
                -127, 128, entry.shape, generator=generator, dtype=torch.int8
            )
        elif entry.dtype == "F8_E4M3":
            data[name] = (normal * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
        elif "weight_scale" in name:
            data[name] = 0.001 * (1 + normal.abs())
        elif "norm" in name:
            data[name] = (1 + 0.1 * normal).to(_torch_dtype(entry.dtype))
        else:
            width = entry.shape[-1] ** -0.5 if len(entry.shape) > 1 else 0.1
            data[name] = (normal * width).to(_torch_dtype(entry.dtype))
    return data


def _torch_dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, known in DTYPE_NAMES.items() if known == name)


def write_checkpoint(
    folder: Path, config: Config, tensors: Mapping[str, torch.Tensor], shards: int = 1
) -> Path:
    """Writes a whole checkpoint with real data: one file, or several with an index."""
    write_config(folder, config)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part: Iterable[str] = names[
            shard * len(names) // shards : (shard + 1) * len(names) // shards
        ]
        chosen = {name: tensors[name] for name in part}
        write_tensors(folder / file, chosen)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
