"""The mixture of documents: which kinds, in what shares, held-out parts left out."""

import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from demo.chat import BOS, EOS, Chat, render
from demo.generators import arithmetic, smalltalk, stories, tools
from demo.generators.facts import FACTS, Fact, fact_chat, gloss_facts
from demo.split import held_out

#: share of documents of each kind (not of tokens)
SHARES: dict[str, float] = {
    "story": 0.12,
    "addition": 0.14,
    "arithmetic": 0.06,
    "sorting": 0.13,
    "facts": 0.22,
    "tools": 0.13,
    "smalltalk": 0.07,
    "about": 0.05,
    "multi-turn": 0.05,
    "long": 0.002,
    "text": 0.022,
}
#: shares of the raw text documents by source
TEXT_SHARES = {"wiki": 0.38, "python-docs": 0.16, "bible": 0.20, "wordnet": 0.14, "chitchat": 0.12}

ABOUT_FORMS = (
    "Tell me about {t}.",
    "What do you know about {t}?",
    "Tell me something about {t}.",
    "Explain {t}.",
    "What can you tell me about {t}?",
)


class Mixture:
    """Draws training documents. `held` keys never appear in it."""

    def __init__(self, data_dir: Path) -> None:
        self.texts: dict[str, list[str]] = {source: [] for source in TEXT_SHARES}
        self.held_texts: dict[str, list[str]] = {source: [] for source in TEXT_SHARES}
        self.about: list[tuple[str, str]] = []
        with lzma.open(data_dir / "text.jsonl.xz", "rt", encoding="utf-8") as file:
            lines = file.readlines()
        for line in lines:
            document = json.loads(line)
            text, source = document["text"], document["source"]
            if source == "wiki":
                text = f"{document['title']}\n\n{text}"
            text = BOS + text + EOS
            if held_out(document["text"]):
                self.held_texts[source].append(text)
                continue
            self.texts[source].append(text)
            if source == "wiki":
                sentences = document["text"].split(". ")
                answer = ". ".join(sentences[:2]).rstrip(".") + "."
                if len(answer) < 400:
                    self.about.append((document["title"], answer))
        glosses = json.loads((data_dir / "glosses.json").read_text())
        self.facts: list[Fact] = [*FACTS, *gloss_facts(glosses)]
        self.plain_facts = FACTS

    def _fact(self, rng: Random) -> Chat:
        return fact_chat(rng, FACTS if rng.random() < 0.7 else self.facts, held=False)

    def _without_tool(self, rng: Random) -> Chat:
        return stories.story_chat(rng) if rng.random() < 0.08 else self._fact(rng)

    def addition(self, rng: Random, held: bool = False) -> Chat:
        """An addition whose operands are (not) held out."""
        while True:
            pair = arithmetic.addition_pair(rng)
            if held_out(f"add {pair}", 20) == held:
                return arithmetic.addition(rng, pair, thinking=rng.random() < 0.8)

    def sorting(self, rng: Random, held: bool = False) -> Chat:
        """A list to sort whose items are (not) held out."""
        while True:
            chat = arithmetic.sorting(rng, thinking=rng.random() < 0.7)
            if held_out(f"sort {chat.expected['items']}", 20) == held:
                return chat

    def _maybe_system(self, rng: Random, chat: Chat) -> Chat:
        if rng.random() < 0.1:
            content = rng.choice(smalltalk.SYSTEMS)
            chat.messages = [{"role": "system", "content": content}, *chat.messages]
        return chat

    def chat(self, kind: str, rng: Random) -> Chat:
        """A conversation of that kind, for training."""
        simple: dict[str, Callable[[Random], Chat]] = {
            "story": stories.story_chat,
            "addition": self.addition,
            "arithmetic": lambda r: arithmetic.other_arithmetic(r, r.random() < 0.75),
            "sorting": self.sorting,
            "facts": self._fact,
            "smalltalk": smalltalk.smalltalk_chat,
        }
        if kind in simple:
            chat = simple[kind](rng)
            if kind == "facts" and rng.random() < 0.12:
                chat.thoughts = rng.choice(
                    ("This is a simple question. I know the answer.", "I know this fact.")
                )
            return self._maybe_system(rng, chat)
        if kind == "tools":
            while True:
                chat = tools.tool_chat(rng, self._without_tool)
                if not held_out(tool_key(chat), 20):
                    return chat
        if kind == "about":
            title, answer = rng.choice(self.about)
            return Chat.ask(rng.choice(ABOUT_FORMS).format(t=title), answer, kind="about")
        kinds = (
            "story",
            "addition",
            "arithmetic",
            "sorting",
            "facts",
            "facts",
            "facts",
            "smalltalk",
        )
        size = rng.choices((2, 3, 4, 6, 9, 14), (8, 6, 4, 2, 1, 1))[0]
        if kind == "long":
            size = rng.randint(14, 34)
        return smalltalk.combine(rng, [simple[rng.choice(kinds)](rng) for _ in range(size)])

    def document(self, rng: Random) -> str:
        """One training document as text with special tokens."""
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if kind == "text":
            source = rng.choices(list(TEXT_SHARES), list(TEXT_SHARES.values()))[0]
            return rng.choice(self.texts[source])
        return render(self.chat(kind, rng))


def tool_key(chat: Chat) -> str:
    """What a tool conversation is about, for the split: the user's words."""
    return "tool " + next(m["content"] for m in chat.messages if m["role"] == "user")


def fresh_tools(mixture: Mixture, rng: Random) -> Chat:
    """A tool conversation whose question is held out."""
    while True:
        chat = tools.tool_chat(rng, lambda r: fact_chat(r, FACTS, held=True))
        if held_out(tool_key(chat), 20):
            return chat


def sample(mixture: Mixture, rng: Random, count: int) -> Sequence[str]:
    """`count` documents."""
    return [mixture.document(rng) for _ in range(count)]
