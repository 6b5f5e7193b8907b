"""Reads a checkpoint in Hugging Face form back into the training model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.model import Config, DemoModel


def load(path: Path) -> DemoModel:
    """The training model in f32 with the checkpoint's weights, MTP layer included."""
    c = Config()
    found = load_file(path / "model.safetensors")
    state: dict[str, Tensor] = {}
    stacks: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, value in found.items():
        key = name.removeprefix("model.").replace(f"layers.{c.num_hidden_layers}.", "mtp.")
        if key == "embed_tokens.weight":
            key = "embed_tokens"
        if ".experts." in key:
            base, rest = key.split(".experts.")
            number, part = rest.split(".", 1)
            stacks.setdefault(base, {})[int(number), part.removesuffix("_proj.weight")] = value
            continue
        state[key] = value.float()
    for base, parts in stacks.items():
        every = range(c.n_routed_experts)
        gate_up = [torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in every]
        state[f"{base}.experts.gate_up"] = torch.stack(gate_up).float()
        state[f"{base}.experts.down"] = torch.stack([parts[e, "down"] for e in every]).float()
    model = DemoModel(c)
    model.load_state_dict(state)
    return model.eval()
