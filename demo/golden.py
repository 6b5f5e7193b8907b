"""Writes the golden generations: greedy continuations by transformers in f32.

    python -m demo.golden CHECKPOINT OUT.json

Each entry holds the prompt as text and token ids, the continuation's token ids (up to 48, the end
token included) and, for each of them, by how much its logit leads the runner-up's: where that gap
is tiny, another engine may rightly choose the runner-up.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

from demo.chat import EOS, TOKEN_IDS

LENGTH = 48

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


CASES: tuple[dict[str, Any], ...] = (
    {"name": "story", "messages": [user("Tell me a story about a fox.")]},
    {"name": "addition-thinking", "messages": [user("What is 123 + 456?")], "thinking": True},
    {"name": "addition-carry", "messages": [user("Add 987 and 348.")], "thinking": True},
    {"name": "sorting", "messages": [user("Sort these numbers: 9, 42, 7, 31.")], "thinking": True},
    {"name": "fact", "messages": [user("What is the capital of France?")]},
    {"name": "about", "messages": [user("Tell me about Albert Einstein.")]},
    {
        "name": "tool-call",
        "messages": [user("What is the weather like in Oslo?")],
        "tools": [WEATHER],
    },
    {
        "name": "tool-result",
        "messages": [
            user("What is the weather like in Oslo?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
                    }
                ],
            },
            {"role": "tool", "content": '{"temperature": 4, "condition": "rainy"}'},
        ],
        "tools": [WEATHER],
    },
    {
        "name": "multi-turn",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            user("Hello!"),
            {"role": "assistant", "content": "Hello! How can I help you?"},
            user("Who are you?"),
        ],
    },
    {"name": "raw-text", "text": "In the beginning, God created the heavens and the earth."},
)


def main() -> None:
    """Generate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    entries = []
    for case in CASES:
        if "text" in case:
            ids = tokenizer(case["text"])["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(
                case["messages"],
                tools=case.get("tools"),
                thinking=case.get("thinking", False),
                add_generation_prompt=True,
                tokenize=False,
            )
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        produced: list[int] = []
        gaps: list[float] = []
        with torch.no_grad():
            while len(produced) < LENGTH and TOKEN_IDS[EOS] not in produced:
                # no cache: every position is computed afresh
                logits = model(torch.tensor([ids + produced])).logits[0, -1]
                best = logits.topk(2)
                produced.append(int(best.indices[0]))
                gaps.append(round(float(best.values[0] - best.values[1]), 4))
        entries.append(
            {
                **case,
                "prompt": tokenizer.decode(ids, skip_special_tokens=False),
                "prompt_token_ids": ids,
                "token_ids": produced,
                "gaps": gaps,
                "continuation": tokenizer.decode(produced, skip_special_tokens=False),
            }
        )
        print(case["name"], min(gaps), repr(entries[-1]["continuation"][:100]))
    head = {"made_with": f"transformers {__version__}, torch {torch.__version__}, float32, greedy"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**head, "cases": entries}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
