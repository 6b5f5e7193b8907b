"""A small random checkpoint with a tokenizer, for tests on the real runner."""

import json
from pathlib import Path

from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint

from tests.engine.fakes import TEMPLATE
from tests.engine.test_tokenizer import byte_level_dir


def write_tiny_model(folder: Path, *, max_position_embeddings: int = 512) -> Path:
    """A V3 model of random weights over single bytes; its end token is 257."""
    config = tiny_config(
        eos_token_id=257, bos_token_id=256, max_position_embeddings=max_position_embeddings
    )
    write_checkpoint(folder, config, random_tensors(tensor_list(config, "bf16")))
    byte_level_dir(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [257, 258], "temperature": 0.7, "top_p": 0.9})
    )
    return folder
