"""What a step costs at least: counted from the weights, and by hand from the config."""

from collections.abc import Iterator

import pytest
import torch
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.config import EngineConfig, ModelConfig
from latentcore.layers.step import latent_row
from latentcore.models.chunk import SequenceChunk
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime
from latentcore.quant.packed import HEADER_BYTES, Format

CONFIG = tiny_config(max_position_embeddings=256)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, CONFIG, random_tensors(tensor_list(CONFIG, "int8")))
    engine = EngineConfig(threads=2, max_model_len=200, max_num_seqs=5)
    runner = ModelRunner.load(folder, engine)
    for at in range(5):  # latents for `decode` to attend to
        ids = torch.randint(0, 300, (200,)).tolist()
        table = [4 * at + j for j in range(4)]
        runner.forward([SequenceChunk(ids, 0, table, "prefill", "none")])
    yield runner
    runner.close()


def decode(tokens: list[int], context: int) -> list[SequenceChunk]:
    return [
        SequenceChunk([token], context, [4 * i + j for j in range(4)], "decode", "last")
        for i, token in enumerate(tokens)
    ]


def vector_bytes(config: ModelConfig) -> int:
    """What `weight_bytes_per_token` counts beside matrices: norms, biases, the embedding's row."""
    assert config.q_lora_rank is not None
    each = 2 * config.hidden_size + config.q_lora_rank + config.kv_lora_rank
    layers = range(config.num_hidden_layers)
    moe = sum(config.is_moe_layer(i) for i in layers) * config.n_routed_experts
    return 4 * (each * len(layers) + moe + config.hidden_size) + 2 * config.hidden_size


def test_bytes_of_one_token_are_the_plans(runner: ModelRunner) -> None:
    context = 100
    cost = runner.cost(decode([7], context))
    moe_layers = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
    assert cost.experts == (CONFIG["num_experts_per_tok"],) * moe_layers
    latents = runner.config.num_hidden_layers * (context + 1) * 2 * latent_row(runner.config)
    weights = runner.weight_bytes_per_token(1) - vector_bytes(runner.config)
    headers = 2 * moe_layers * HEADER_BYTES * CONFIG["num_experts_per_tok"]
    headers /= CONFIG["n_routed_experts"]  # the plan's share of those before a stack of experts
    assert cost.total.nbytes - latents == pytest.approx(weights - headers, abs=1)


def test_operations_by_hand(runner: ModelRunner) -> None:
    c, rows, context = runner.config, 3, 50
    assert c.q_lora_rank is not None
    cost = runner.cost(decode([1, 2, 3], context))
    heads, h = c.num_attention_heads, c.hidden_size
    dense = sum(not c.is_moe_layer(i) for i in range(c.num_hidden_layers))
    moe = c.num_hidden_layers - dense
    projections = (
        h * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
        + c.q_lora_rank * heads * c.qk_head_dim
        + heads * c.v_head_dim * h
    )
    experts = (c.num_experts_per_tok + c.n_shared_experts) * 3 * h * c.moe_intermediate_size
    int8 = c.num_hidden_layers * projections + dense * 3 * h * c.intermediate_size + moe * experts
    assert cost.total.operations[Format.INT8] == 2 * rows * int8
    absorbed = heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    assert cost.total.operations[Format.INT8_WIDE] == 2 * rows * c.num_hidden_layers * absorbed
    pair = 2 * c.kv_lora_rank + c.qk_rope_head_dim
    attention = c.num_hidden_layers * (context + 1) * heads * pair
    bf16 = attention + c.vocab_size * h
    routers = moe * h * c.n_routed_experts
    found = cost.total.operations[Format.BF16] + cost.total.operations[Format.F32]
    assert found == 2 * rows * (bf16 + routers)


def test_a_prompt_counts_pairs_once_and_its_last_logits(runner: ModelRunner) -> None:
    c, tokens, start = runner.config, 40, 30
    table = [0, 1, 2, 3]
    first = [SequenceChunk(torch.arange(start).tolist(), 0, table, "prefill", "none")]
    runner.forward(first)
    ids = torch.randint(0, c.vocab_size, (tokens,)).tolist()
    cost = runner.cost([SequenceChunk(ids, start, table, "prefill", "last")])
    attend = cost.kernels["mla_prefill"]
    pairs = sum(start + i + 1 for i in range(tokens))
    per_pair = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    assert attend.operations[Format.BF16] == 2 * c.num_hidden_layers * pairs * per_pair
    kv_b = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    expanded = c.num_hidden_layers * (start + tokens) * kv_b
    assert attend.operations[Format.INT8] == 2 * expanded
    assert "mla_decode" not in cost.kernels
    logits = cost.kernels["linear"].operations[Format.BF16]
    assert logits == 2 * c.vocab_size * c.hidden_size


def test_experts_are_counted_as_they_are_chosen(runner: ModelRunner) -> None:
    """Equal rows choose equal experts; rows that differ choose no fewer."""
    k = CONFIG["num_experts_per_tok"]
    same = runner.cost(decode([5, 5, 5, 5], 0)).experts
    assert set(same) == {k}
    most = min(4 * k, CONFIG["n_routed_experts"])
    other = [runner.cost(decode([i, i + 20, i + 40, i + 60], 0)).experts for i in range(10)]
    assert all(k <= count <= most for counts in other for count in counts)
    assert max(max(counts) for counts in other) > k


def test_counting_leaves_the_step_as_it_would_be(runner: ModelRunner) -> None:
    step = decode([9, 11], 20)
    runner.cost(step)
    before = runner.forward(step).values.clone()
    runner.cost(step)
    assert torch.equal(runner.forward(step).values, before)


def test_kernels_are_those_that_run(runner: ModelRunner) -> None:
    """Costs go by the names that a profile shows."""
    prompt = [SequenceChunk([1, 2, 3], 0, [0], "prefill", "last")]
    for chunks in (decode([1, 2], 10), prompt):
        cost = runner.cost(chunks)
        with runtime.profiled() as regions:
            runner.forward(chunks)
        assert set(cost.kernels) <= {k.kernel for region in regions for k in region.kernels}
        assert all(part.nbytes > 0 and part.operations for part in cost.kernels.values())
