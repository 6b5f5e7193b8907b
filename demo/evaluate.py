"""Measures the exported checkpoint and writes the figures of the model card.

    python -m demo.evaluate answer CHECKPOINT .data answers.json      (a GPU helps)
    python -m demo.evaluate judge CHECKPOINT .data answers.json results.json

Answers are generated greedily by transformers in f32 from the bf16 checkpoint, which also checks
that the checkpoint works there. Problems are fresh: operands, lists, tool requests and wordings of
facts that are held out of the training data.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import chat as markers
from demo.chat import Chat, render, render_prompt
from demo.checkpoint import load
from demo.data import LONG
from demo.generators import smalltalk, stories
from demo.generators.facts import FACTS, fact_chat
from demo.mixture import Mixture, fresh_tools
from demo.model import DemoModel, Packed

MAX_NEW = 300


@dataclass
class Reply:
    """A generated reply: its token ids, its text with markers, whether it ended by itself."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool


class Judge:
    """Generates replies in batches."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation="eager"
        )
        self.model = model.eval().to(device)

    @torch.no_grad()
    def answer(self, prompts: list[str]) -> list[Reply]:
        """Greedy replies, in order. Prompts of similar length share a batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies: dict[int, Reply] = {}
        size = 64 if self.device == "cpu" else 1100
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            batch = self.tokenizer(
                [prompts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.device)
            out = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW,
                do_sample=False,
                temperature=None,
                top_p=None,
            )
            width = batch["input_ids"].shape[1]
            for row, i in enumerate(chosen):
                ids = out[row, width:].tolist()
                ended = 1 in ids
                ids = ids[: ids.index(1) + 1] if ended else ids
                kept = batch["attention_mask"][row].bool()
                prompt_ids = batch["input_ids"][row][kept].tolist()
                text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
                replies[i] = Reply(prompt_ids, ids, text, ended)
            print(f"{len(replies)} of {len(prompts)} answered", flush=True)
        return [replies[i] for i in range(len(prompts))]


def parse_calls(text: str) -> list[list[Any]] | None:
    """[name, arguments] of each tool call; None if the format is broken."""
    if markers.CALLS_BEGIN not in text:
        return []
    inner = text.split(markers.CALLS_BEGIN, 1)[1]
    if not inner.endswith(markers.CALLS_END):
        return None
    calls = []
    for part in inner.removesuffix(markers.CALLS_END).split(markers.CALL_BEGIN)[1:]:
        if markers.TOOL_SEP not in part or not part.endswith(markers.CALL_END):
            return None
        name, arguments = part.removesuffix(markers.CALL_END).split(markers.TOOL_SEP, 1)
        try:
            calls.append([name, json.loads(arguments)])
        except json.JSONDecodeError:
            return None
    return calls


def in_format(chat: Chat, reply: Reply) -> bool:
    """Ended by itself, reasoning closed when it is on, no stray marker, well-formed calls."""
    text = reply.text
    if not reply.ended or text.count(markers.END_THINK) != (chat.thoughts is not None):
        return False
    answer = text.split(markers.END_THINK)[-1]
    plain = answer.split(markers.CALLS_BEGIN)[0]
    stray = any(mark in plain for mark, _ in markers.ADDED_TOKENS)
    return not stray and parse_calls(answer) is not None and bool(answer.strip())


def final(reply: Reply) -> str:
    """The answer without its reasoning."""
    return reply.text.split(markers.END_THINK)[-1].strip()


def _first_turn(chat: Chat) -> Chat:
    """The conversation up to its first assistant turn."""
    first = next(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    return Chat(chat.messages[: first + 1], chat.tools, chat.thoughts, chat.kind, chat.expected)


def _addition(chat: Chat, reply: Reply) -> bool:
    return final(reply).endswith(f"= {chat.expected['answer']}")


def _same(chat: Chat, reply: Reply) -> bool:
    return final(reply) == chat.expected["answer"]


def _fact(chat: Chat, reply: Reply) -> bool:
    return chat.expected["must_say"].lower() in final(reply).lower()


def _tools(chat: Chat, reply: Reply) -> bool:
    return parse_calls(final(reply)) == chat.expected["calls"]


def _reply(chat: Chat, reply: Reply) -> bool:
    return final(reply) == chat.expected["reply"]


def _hero(chat: Chat, reply: Reply) -> bool:
    return chat.expected["hero"] in final(reply)


def problems(
    m: Mixture, rng: Random, count: int
) -> dict[str, tuple[list[Chat], Callable[..., bool]]]:
    """Fresh problems of each skill and what counts as right."""

    def make(draw: Callable[[], Chat], keep: Callable[[Chat], bool]) -> list[Chat]:
        found: list[Chat] = []
        while len(found) < count:
            chat = draw()
            if keep(chat):
                found.append(chat)
        return found

    def thinks(chat: Chat) -> bool:
        return chat.thoughts is not None

    def results(chat: Chat) -> bool:
        return "reply" in chat.expected

    def story() -> Chat:
        while True:
            chat = stories.story_chat(rng)
            if chat.expected["hero"] in chat.messages[0]["content"]:
                return chat

    return {
        "addition, thinking": (make(lambda: m.addition(rng, held=True), thinks), _addition),
        "addition, thinking off": (
            make(lambda: m.addition(rng, held=True), lambda c: not thinks(c)),
            _addition,
        ),
        "sorting, thinking": (make(lambda: m.sorting(rng, held=True), thinks), _same),
        "sorting, thinking off": (
            make(lambda: m.sorting(rng, held=True), lambda c: not thinks(c)),
            _same,
        ),
        "facts, new wording": (make(lambda: fact_chat(rng, FACTS, True), lambda c: True), _fact),
        "facts, known wording": (make(lambda: fact_chat(rng, FACTS, False), lambda c: True), _fact),
        "definitions, new wording": (
            make(lambda: fact_chat(rng, m.facts[len(FACTS) :], True), lambda c: True),
            _fact,
        ),
        "tool choice and arguments": (
            [_first_turn(c) for c in make(lambda: fresh_tools(m, rng), lambda c: True)],
            _tools,
        ),
        "reply from tool results": (make(lambda: fresh_tools(m, rng), results), _reply),
        "story (names its hero)": (make(story, lambda c: True), _hero),
        "small talk (format only)": (
            make(lambda: smalltalk.smalltalk_chat(rng), lambda c: True),
            lambda c, r: True,
        ),
    }


@torch.no_grad()
def bits_per_byte(judge: Judge, mixture: Mixture, limit: int) -> dict[str, dict[str, float]]:
    """Held-out raw text by source: bits a byte of text, documents of up to 4,096 tokens."""
    out = {}
    for source, texts in mixture.held_texts.items():
        chosen = Random(3).sample(texts, len(texts))
        nats, size, documents = 0.0, 0, 0
        for text in chosen:
            ids = judge.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            if ids.shape[1] > LONG:
                continue
            ids = ids.to(judge.device)
            logits = judge.model(ids).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            size += len(text.removeprefix(markers.BOS).removesuffix(markers.EOS).encode())
            documents += 1
            if size > limit:
                break
        out[source] = {
            "bits_per_byte": nats / math.log(2) / size,
            "bytes": size,
            "documents": documents,
        }
    return out


@torch.no_grad()
def acceptance(model: DemoModel, replies: list[Reply]) -> tuple[int, int]:
    """Greedy drafts of the MTP layer that equal the greedy token after next, and their number."""
    hits = total = 0
    for reply in replies:
        ids = torch.tensor(reply.prompt_ids + reply.ids)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        _, ahead, _ = model(Packed.of(ids, bounds, LONG), torch.float32)
        drafts = model.lm_head(ahead).argmax(-1)
        # row i drafts token i + 2 once token i + 1 is known; both must be the model's own
        start = len(reply.prompt_ids) - 1
        hits += int((drafts[start:-2] == ids[start + 2 :]).sum())
        total += len(ids) - start - 2
    return hits, total


@torch.no_grad()
def expert_load(model: DemoModel, mixture: Mixture, count: int) -> list[list[float]]:
    """Share of choices of each expert, 1 being even, over documents of the training mixture."""
    tokenizer = AutoTokenizer.from_pretrained(
        Path(__file__).parents[1] / "src/latentcore/demo_model"
    )
    rng, total = Random(99), torch.zeros(0)
    for _ in range(count):
        kinds = ("story", "addition", "sorting", "facts", "tools", "smalltalk")
        held = mixture.held_texts[rng.choice(list(mixture.held_texts))]
        text = (
            rng.choice(held) if rng.random() < 0.2 else render(mixture.chat(rng.choice(kinds), rng))
        )
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:1024])
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        loads = model(Packed.of(ids, bounds, LONG), torch.float32)[2]
        total = loads if total.numel() == 0 else total + loads
    share = total / total.sum(1, keepdim=True) * total.shape[1]
    return [[round(x, 2) for x in row] for row in share.tolist()]


def parameters(model: DemoModel) -> dict[str, int]:
    """Numbers of parameters: all, without the MTP layer, and active a token."""
    c = model.c
    mtp = sum(p.numel() for p in model.mtp.parameters())
    total = sum(p.numel() for p in model.parameters())
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    idle = moe_layers * (c.n_routed_experts - c.num_experts_per_tok) * expert
    active = total - mtp - idle - model.embed_tokens.numel()
    return {"total": total, "mtp": mtp, "main": total - mtp, "active": active}


def answer(args: argparse.Namespace) -> None:
    """Generate all replies and measure held-out text; write both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixture, judge = Mixture(args.data), Judge(args.checkpoint, device)
    answers: dict[str, Any] = {"device": device, "replies": {}}
    began = time.time()
    asked = {k: chats for k, (chats, _) in problems(mixture, Random(2026), args.count).items()}
    replies = judge.answer([render_prompt(chat) for chats in asked.values() for chat in chats])
    for name, chats in asked.items():
        answers["replies"][name] = [asdict(reply) for reply in replies[: len(chats)]]
        replies = replies[len(chats) :]
    print(f"answers in {time.time() - began:.0f} s", flush=True)
    args.answers.write_text(json.dumps(answers, ensure_ascii=False))
    answers["bits_per_byte"] = bits_per_byte(judge, mixture, args.bytes)
    args.answers.write_text(json.dumps(answers, ensure_ascii=False))


def judge_answers(args: argparse.Namespace) -> None:
    """Judge the replies; add MTP acceptance and expert load."""
    torch.set_num_threads(1)
    mixture, model = Mixture(args.data), load(args.checkpoint)
    answers = json.loads(args.answers.read_text())
    results: dict[str, Any] = {"parameters": parameters(model), "skills": {}}
    accepted = drafted = formatted = replied = 0
    by_skill: dict[str, float] = {}
    failures: dict[str, list[list[str]]] = {}
    for name, (chats, right) in problems(mixture, Random(2026), args.count).items():
        replies = [Reply(**entry) for entry in answers["replies"][name]]
        marks = [right(c, r) for c, r in zip(chats, replies, strict=True)]
        formats = [in_format(c, r) for c, r in zip(chats, replies, strict=True)]
        hits, total = acceptance(model, replies[: args.drafts])
        by_skill[name] = round(hits / total, 4)
        accepted, drafted = accepted + hits, drafted + total
        formatted, replied = formatted + sum(formats), replied + len(formats)
        failures[name] = [
            [next(m["content"] for m in reversed(c.messages) if m["role"] == "user"), r.text]
            for c, r, mark, good in zip(chats, replies, marks, formats, strict=True)
            if not (mark and good)
        ][:5]
        results["skills"][name] = {
            "problems": len(chats),
            "right": sum(marks) / len(marks),
            "in_format": sum(formats) / len(formats),
        }
        print(name, results["skills"][name], "drafts accepted", by_skill[name], flush=True)
        for question, text in failures[name][:2]:
            print("   ", repr(question[-120:]), "->", repr(text[-160:]), flush=True)
    results["format"] = {"replies": replied, "in_format": formatted / replied}
    results["mtp"] = {"accepted": accepted / drafted, "drafts": drafted, "by_skill": by_skill}
    results["bits_per_byte"] = answers["bits_per_byte"]
    results["expert_load"] = expert_load(model, mixture, 200)
    results["failures"] = failures
    args.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="problems a skill")
    parser.add_argument("--bytes", type=int, default=100_000, help="held-out bytes a source")
    parser.add_argument("--drafts", type=int, default=40, help="replies a skill for MTP drafts")
    commands = parser.add_subparsers(required=True)
    for run, names in (
        (answer, ("checkpoint", "data", "answers")),
        (judge_answers, ("checkpoint", "data", "answers", "results")),
    ):
        command = commands.add_parser("answer" if run is answer else "judge")
        for name in names:
            command.add_argument(name, type=Path)
        command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
