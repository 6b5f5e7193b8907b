"""Random clients of a server: what they ask, whether they stay, and what they got."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx2

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
        "required": ["place", "days"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4},
]


@dataclass(frozen=True)
class Visit:
    """One request, when it comes (seconds), and after how many events its client leaves."""

    path: str
    body: dict[str, Any]
    arrives: float
    patience: int | None


def visit(generator: random.Random, number: int, *, within: float) -> Visit:
    """A request that shares no block of its prompt with another; one in five is cut."""
    letters = "abcdefghijklmnopqrstuvwxyz    "
    text = f"client {number} " + "".join(
        generator.choice(letters) for _ in range(generator.randrange(1, 150))
    )
    body: dict[str, Any] = {
        "stream": True,
        "seed": number,
        "temperature": generator.choice([0.0, 0.9]),
        "top_p": generator.choice([1.0, 0.9]),
        "top_k": generator.choice([0, 20]),
        "min_p": generator.choice([0.0, 0.05]),
        "repetition_penalty": generator.choice([1.0, 1.1]),
        "frequency_penalty": generator.choice([0.0, 0.5]),
        "max_tokens": generator.randrange(1, 70),
        "ignore_eos": generator.random() < 0.6,
        "n": generator.choice([1, 1, 1, 2]),
    }
    if generator.random() < 0.3:
        body["stop"] = [generator.choice(letters) for _ in range(2)]
    if generator.random() < 0.2:
        schema = {"name": "answer", "schema": generator.choice(SCHEMAS)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if generator.random() < 0.4:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": text}]
        if generator.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": 1}
    else:
        path = "/v1/completions"
        body["prompt"] = text
        if generator.random() < 0.3:
            body["logprobs"] = 2
    patience = generator.randrange(0, 12) if generator.random() < 0.2 else None
    return Visit(path, body, generator.random() * within, patience)


@dataclass
class Choice:
    """One choice, put together from its events, or as it came at once."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[str, float]] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        message = part.get("delta") or part.get("message") or {}
        self.text += part.get("text") or message.get("content") or ""
        self.finish_reason = part.get("finish_reason") or self.finish_reason
        found = part.get("logprobs")
        if found and "content" in found:
            self.logprobs += [(at["token"], at["logprob"]) for at in found["content"]]
        elif found:
            self.logprobs += zip(found["tokens"], found["token_logprobs"], strict=True)


Answer = dict[int, Choice]


async def ask(client: httpx2.AsyncClient, asked: Visit) -> Answer | None:
    """Streams the answer; None where the client leaves before its end."""
    await asyncio.sleep(asked.arrives)
    answer: Answer = {}
    events = 0
    async with client.stream("POST", asked.path, json=asked.body) as response:
        assert response.status_code == 200, await response.aread()
        if asked.patience == 0:
            return None
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                assert not line
                continue
            if line == "data: [DONE]":
                return answer
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for part in event["choices"]:
                answer.setdefault(part["index"], Choice()).add(part)
            events += 1
            if events == asked.patience:
                return None
    raise AssertionError("the stream ended without [DONE]")


def ask_alone(client: httpx2.Client, asked: Visit) -> Answer:
    """The same request without streaming."""
    response = client.post(asked.path, json={**asked.body, "stream": False})
    assert response.status_code == 200, response.text
    answer: Answer = {}
    for part in response.json()["choices"]:
        answer.setdefault(part["index"], Choice()).add(part)
    return answer
