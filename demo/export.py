"""Writes the checkpoint in Hugging Face form: bf16 safetensors, config, generation config.

python -m demo.export WEIGHTS.pt OUT_DIR
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.model import Config

GENERATION = {
    "_from_model_config": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
}


def hf_tensors(state: dict[str, Tensor], c: Config) -> dict[str, Tensor]:
    """Rename to the published keys; stacked experts become single matrices.

    The MTP layer stands at index `num_hidden_layers`. Its embedding and head are the main
    model's, so they are not stored a second time.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "embed_tokens":
            out["model.embed_tokens.weight"] = value.bfloat16()
            continue
        if key.startswith("mtp."):
            key = f"layers.{c.num_hidden_layers}." + key.removeprefix("mtp.")
        name = key if key.startswith("lm_head") else "model." + key
        if name.endswith("e_score_correction_bias"):
            out[name] = value.float()
        elif name.endswith("experts.gate_up"):
            base = name.removesuffix("gate_up")
            for e, matrix in enumerate(value.bfloat16()):
                gate, up = matrix.chunk(2, 0)
                out[f"{base}{e}.gate_proj.weight"] = gate
                out[f"{base}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down"):
            base = name.removesuffix("down")
            for e, matrix in enumerate(value.bfloat16()):
                out[f"{base}{e}.down_proj.weight"] = matrix
        else:
            out[name] = value.bfloat16()
    return {k: v.contiguous().clone() for k, v in sorted(out.items())}


def write(state: dict[str, Tensor], c: Config, out: Path) -> None:
    """Write weights and configs (the tokenizer is written by `demo.tokenizer`)."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(state, c), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(c.to_hf(), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")


def main() -> None:
    """Export a file saved by the training run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    state = torch.load(args.weights, map_location="cpu", weights_only=True)
    write(state, Config(), args.out)


if __name__ == "__main__":
    main()
