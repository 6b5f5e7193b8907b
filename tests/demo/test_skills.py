"""What the demo model can do, through the engine: fresh problems of each skill, in each scheme.

The floors are the project's own. The card's figures are transformers' (`demo/evaluate.py`); what is
asked here is that our kernels and quantizers lose none of it.
"""

from collections.abc import Callable
from random import Random

import pytest

from demo.chat import Chat, render_prompt
from demo.evaluate import MAX_NEW, Reply, final, in_format, parse_calls
from demo.generators import arithmetic
from demo.generators.facts import FACTS, fact_chat
from demo.generators.tools import tool_chat
from demo.mixture import tool_key
from demo.split import held_out
from latentcore import LLM, SamplingParams

COUNT = 200
FORMAT_FLOOR = 0.97


def _drawn(make: Callable[[Random], Chat], key: Callable[[Chat], str] | None) -> list[Chat]:
    """COUNT problems, the same every time, whose keys training left out."""
    rng = Random(20261124)
    chats: list[Chat] = []
    while len(chats) < COUNT:
        chat = make(rng)
        if key is None or held_out(key(chat), 20):
            chats.append(chat)
    return chats


def _addition(rng: Random) -> Chat:
    pair = arithmetic.addition_pair(rng)
    while not held_out(f"add {pair}", 20):
        pair = arithmetic.addition_pair(rng)
    return arithmetic.addition(rng, pair, thinking=True)


def _tools(rng: Random) -> Chat:
    chat = tool_chat(rng, lambda r: fact_chat(r, FACTS, held=True))
    first = next(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    return Chat(chat.messages[: first + 1], chat.tools, chat.thoughts, chat.kind, chat.expected)


Skill = tuple[Callable[[], list[Chat]], Callable[[Chat, Reply], bool], float]

SKILLS: dict[str, Skill] = {
    "addition": (
        lambda: _drawn(_addition, None),
        lambda c, r: final(r).endswith(f"= {c.expected['answer']}"),
        0.85,
    ),
    "sorting": (
        lambda: _drawn(
            lambda r: arithmetic.sorting(r, thinking=r.random() < 0.5),
            lambda c: f"sort {c.expected['items']}",
        ),
        lambda c, r: final(r) == c.expected["answer"],
        0.80,
    ),
    "facts": (
        lambda: _drawn(lambda r: fact_chat(r, FACTS, held=False), None),
        lambda c, r: c.expected["must_say"].lower() in final(r).lower(),
        0.80,
    ),
    "tools": (
        lambda: _drawn(_tools, tool_key),
        lambda c, r: parse_calls(final(r)) == c.expected["calls"],
        0.90,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheme", ["auto", "w8a8_int8", "fp8"])
def test_skills_stand_above_their_floors(scheme: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW, skip_special_tokens=False)
    found: dict[str, float] = {}
    well_formed: list[bool] = []
    with LLM(quantization=scheme, max_model_len=2048, kv_cache_memory_bytes=128 << 20) as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None
        for name, (problems, right, _) in SKILLS.items():
            chats = problems()
            prompts = [tokenizer.encode(render_prompt(c), add_begin=False) for c in chats]
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
            replies = []
            for output in outputs:
                (choice,) = output.outputs
                ended = choice.finish_reason == "stop"
                text = choice.text.removesuffix("<｜end▁of▁sentence｜>")  # noqa: RUF001
                replies.append(Reply(output.prompt_token_ids, choice.token_ids, text, ended))
            pairs = list(zip(chats, replies, strict=True))
            found[name] = sum(right(c, r) for c, r in pairs) / COUNT
            well_formed += [in_format(c, r) for c, r in pairs]
    print(scheme, found, sum(well_formed) / len(well_formed))
    assert {name: share for name, share in found.items() if share < SKILLS[name][2]} == {}
    assert sum(well_formed) / len(well_formed) >= FORMAT_FLOOR
