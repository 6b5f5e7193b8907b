"""The demo checkpoint in the package: what it holds, how it tokenizes, renders and loads."""

# ruff: noqa: RUF001  the special tokens are spelled with full-width bars

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open

import latentcore.config
from demo.chat import ADDED_TOKENS, Chat, chat_template, render, render_prompt
from demo.checkpoint import load
from demo.generators.arithmetic import addition
from demo.generators.facts import FACTS, fact_chat
from demo.generators.smalltalk import smalltalk_chat
from demo.generators.stories import story_chat
from demo.generators.tools import tool_chat
from demo.model import Config, Packed

transformers = pytest.importorskip("transformers")

PATH = Path(latentcore.config.__file__).parent / "demo_model"
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden.json"
LIMIT = 36_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def hf_model() -> Any:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers.AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


def expected_tensors(c: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its shape, written out from the published layout."""
    h, heads = c.hidden_size, c.num_attention_heads
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (c.vocab_size, h),
    }

    def mlp(prefix: str, width: int) -> None:
        out[f"{prefix}.gate_proj.weight"] = (width, h)
        out[f"{prefix}.up_proj.weight"] = (width, h)
        out[f"{prefix}.down_proj.weight"] = (h, width)

    for i in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        layer = f"model.layers.{i}"
        out[f"{layer}.input_layernorm.weight"] = (h,)
        out[f"{layer}.post_attention_layernorm.weight"] = (h,)
        a = f"{layer}.self_attn"
        out[f"{a}.q_a_proj.weight"] = (c.q_lora_rank, h)
        out[f"{a}.q_a_layernorm.weight"] = (c.q_lora_rank,)
        out[f"{a}.q_b_proj.weight"] = (heads * (48 + 16), c.q_lora_rank)
        out[f"{a}.kv_a_proj_with_mqa.weight"] = (c.kv_lora_rank + 16, h)
        out[f"{a}.kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        out[f"{a}.kv_b_proj.weight"] = (heads * (48 + 64), c.kv_lora_rank)
        out[f"{a}.o_proj.weight"] = (h, heads * 64)
        if i < c.first_k_dense_replace:
            mlp(f"{layer}.mlp", c.intermediate_size)
            continue
        out[f"{layer}.mlp.gate.weight"] = (c.n_routed_experts, h)
        out[f"{layer}.mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        mlp(f"{layer}.mlp.shared_experts", c.moe_intermediate_size)
        for e in range(c.n_routed_experts):
            mlp(f"{layer}.mlp.experts.{e}", c.moe_intermediate_size)
    mtp = f"model.layers.{c.num_hidden_layers}"
    out[f"{mtp}.enorm.weight"] = out[f"{mtp}.hnorm.weight"] = (h,)
    out[f"{mtp}.eh_proj.weight"] = (h, 2 * h)
    out[f"{mtp}.shared_head.norm.weight"] = (h,)
    return out


def test_tensors_are_exactly_the_published_names_and_shapes() -> None:
    found = {}
    with safe_open(PATH / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            part = file.get_slice(name)
            found[name] = tuple(part.get_shape())
            bias = name.endswith("e_score_correction_bias")
            assert part.get_dtype() == ("F32" if bias else "BF16"), name
    assert found == expected_tensors(Config())


def test_config_is_the_trained_model_s() -> None:
    assert json.loads((PATH / "config.json").read_text()) == Config().to_hf()


def test_the_folder_stays_small() -> None:
    assert sum(f.stat().st_size for f in PATH.iterdir()) <= LIMIT


def test_digits_are_tokens_of_their_own(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("1234 + 56,7%")
    assert [t for t in tokens if any(ch.isdigit() for ch in t)] == list("1234567")


@pytest.mark.parametrize(
    "text",
    [
        "Tell me a story.",
        "naïve café 東京 🙂\n\ttabs",
        " leading and  double ",
        "x = {'a': [1, 2]}\n",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_come_first_and_are_single(tokenizer: Any) -> None:
    for index, (text, special) in enumerate(ADDED_TOKENS):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [index]
        shown = tokenizer.decode([index], skip_special_tokens=True)
        assert shown == ("" if special else text)


def _prompt(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    options.setdefault("add_generation_prompt", True)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


def test_template_switches_thinking(tokenizer: Any) -> None:
    ask = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    head = f"{BOS}Be kind.<｜User｜>Hi<｜Assistant｜>"
    assert _prompt(tokenizer, ask) == head + "</think>"
    assert _prompt(tokenizer, ask, thinking=False) == head + "</think>"
    assert _prompt(tokenizer, ask, thinking=True) == head + "<think>"
    assert _prompt(tokenizer, ask, add_generation_prompt=False) == f"{BOS}Be kind.<｜User｜>Hi"


def test_template_drops_the_reasoning_of_earlier_turns(tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "easy</think>1 + 1 = 2"},
        {"role": "user", "content": "2 + 2"},
    ]
    assert _prompt(tokenizer, turns, thinking=True) == (
        f"{BOS}<｜User｜>1 + 1<｜Assistant｜></think>1 + 1 = 2{EOS}"
        "<｜User｜>2 + 2<｜Assistant｜><think>"
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_template_writes_tool_calls_and_outputs(tokenizer: Any, as_text: bool) -> None:
    arguments: Any = {"city": "Zürich", "days": 2}
    call = {"function": {"name": "f", "arguments": json.dumps(arguments, ensure_ascii=False)}}
    if not as_text:
        call["function"]["arguments"] = arguments
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    one = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Zürich", "days": 2}<｜tool▁call▁end｜>'
    assert _prompt(tokenizer, turns) == (
        f"{BOS}<｜User｜>go<｜Assistant｜></think>"
        f"<｜tool▁calls▁begin｜>{one}{one}<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>1<｜tool▁output▁end｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
    )


def test_template_describes_tools_after_the_system_text(tokenizer: Any) -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "Does f", "parameters": {"type": "object"}},
    }
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "go"}]
    text = _prompt(tokenizer, messages, tools=[tool])
    assert text.startswith(
        f"{BOS}S\n\n## Tools\nYou have access to the following tools:\n\n"
        '### f\nDescription: Does f\n\nParameters: {"type": "object"}\n\nIMPORTANT:'
    )
    assert text.endswith("<｜User｜>go<｜Assistant｜></think>")


def test_template_agrees_with_the_training_text(tokenizer: Any) -> None:
    rng = Random(11)
    makers = [
        story_chat,
        smalltalk_chat,
        lambda r: fact_chat(r, FACTS, held=False),
        lambda r: addition(r, (r.randrange(1000), r.randrange(1000)), r.random() < 0.5),
        lambda r: tool_chat(r, lambda q: fact_chat(q, FACTS, held=False)),
    ]
    for _ in range(200):
        chat: Chat = rng.choice(makers)(rng)
        tools = list(chat.tools) or None
        prompt = _prompt(
            tokenizer, chat.messages[:-1], tools=tools, thinking=chat.thoughts is not None
        )
        assert prompt == render_prompt(chat)
        if chat.thoughts is None:
            whole = _prompt(tokenizer, chat.messages, tools=tools, add_generation_prompt=False)
            assert whole == render(chat)


def test_template_in_the_checkpoint_is_the_source_s() -> None:
    config = json.loads((PATH / "tokenizer_config.json").read_text())
    assert config["chat_template"] == chat_template()


def test_transformers_computes_what_the_training_model_does(hf_model: Any, tokenizer: Any) -> None:
    torch.set_num_threads(1)
    text = "<｜User｜>What is 123 + 456?<｜Assistant｜><think>Add 123 and 456 column by column."
    ids = torch.tensor(tokenizer(text)["input_ids"])
    batch = Packed.of(ids, torch.tensor([0, len(ids)], dtype=torch.int32), 4096)
    own = load(PATH)
    with torch.no_grad():
        hidden, _, _ = own(batch, torch.float32)
        expected = own.lm_head(hidden)
        found = hf_model(ids[None]).logits[0]
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
def test_golden_continuations_are_transformers_own(hf_model: Any) -> None:
    torch.set_num_threads(1)
    for case in json.loads(GOLDEN.read_text())["cases"]:
        prompt, produced = case["prompt_token_ids"], case["token_ids"]
        with torch.no_grad():
            logits = hf_model(torch.tensor([prompt + produced])).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2).values
        for i, token in enumerate(produced):
            clear = case["gaps"][i] > 1e-3
            assert not clear or int(logits[i].argmax()) == token, (case["name"], i)
            assert abs(float(top[i, 0] - top[i, 1]) - case["gaps"][i]) < 1e-2, (case["name"], i)
