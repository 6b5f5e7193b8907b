"""Graphs of decode steps: the same bits as eager execution, every size, and nothing unchecked."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from latentcore.config import EngineConfig
from latentcore.models.chunk import SequenceChunk
from latentcore.models.logits import StepLogits
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime

SEQUENCES = 7
LENGTH = 200
BUDGET = 90
FORMATS = ("bf16", "int8", "fp8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for fmt in FORMATS:
        found[fmt] = tmp_path_factory.mktemp(fmt)
        config = tiny_config(max_position_embeddings=256)
        write_checkpoint(found[fmt], config, random_tensors(tensor_list(config, fmt)))
    return found


def load(folder: Path, *, use_graph: bool, max_num_seqs: int = SEQUENCES) -> ModelRunner:
    engine = EngineConfig(
        threads=2,
        max_model_len=LENGTH,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=BUDGET,
        use_graph=use_graph,
    )
    return ModelRunner.load(folder, engine)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    runtime.set_threads(1)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in nodes of the graphs that were replayed."""
    found: list[int] = []
    replay = runtime.Graph.replay

    def noting(graph: runtime.Graph) -> None:
        found.append(graph.size)
        replay(graph)

    monkeypatch.setattr(runtime.Graph, "replay", noting)
    return found


class Traffic:
    """Random steps: sequences come with prompts in chunks, generate in changing company, and go."""

    def __init__(self, seed: int, vocab_size: int, num_blocks: int) -> None:
        self.random = random.Random(seed)
        self.vocab_size = vocab_size
        each = -(-LENGTH // 64)
        blocks = self.random.sample(range(num_blocks), SEQUENCES * each)
        self.tables = [blocks[i * each : (i + 1) * each] for i in range(SEQUENCES)]
        self.lengths = [0] * SEQUENCES
        self.prompts = [0] * SEQUENCES

    def step(self) -> list[SequenceChunk]:
        """The next step; at least one sequence is in it."""
        numbers = self.random.sample(range(SEQUENCES), self.random.randint(1, SEQUENCES))
        reads = self.random.random() < 0.3
        chunks: list[SequenceChunk] = []
        room = BUDGET - len(numbers)
        for number in numbers:
            if self.lengths[number] == LENGTH:
                self.lengths[number] = self.prompts[number] = 0
            start = self.lengths[number]
            count = 1
            if start == 0:
                self.prompts[number] = self.random.randint(2, 80)
            if start < self.prompts[number]:
                if not reads:
                    continue
                count = min(self.prompts[number] - start, self.random.randint(1, 40), room + 1)
                room -= count - 1
            self.lengths[number] = end = start + count
            chunks.append(
                SequenceChunk(
                    [self.random.randrange(self.vocab_size) for _ in range(count)],
                    start,
                    self.tables[number][: -(-end // 64)],
                    "prefill" if start < self.prompts[number] else "decode",
                    self.random.choice(["last", "last", "last", "all", "none"])
                    if start < self.prompts[number]
                    else "last",
                )
            )
        return chunks or self.step()


def bits(found: StepLogits) -> tuple[torch.Tensor, torch.Tensor]:
    return found.values.view(torch.int32).clone(), found.best.clone()


@pytest.mark.parametrize("fmt", FORMATS)
def test_graphs_give_the_bits_of_eager_steps(
    fmt: str, folders: dict[str, Path], replays: list[int]
) -> None:
    """200 random steps with changing batches, on two runners with caches of their own."""
    graphs, eager = (load(folders[fmt], use_graph=use) for use in (True, False))
    traffic = Traffic(3, graphs.config.vocab_size, graphs.num_blocks)
    sizes: set[int] = set()
    for _ in range(200):
        chunks = traffic.step()
        before = len(replays)
        one, other = bits(graphs.forward(chunks)), bits(eager.forward(chunks))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        pure = all(chunk.path == "decode" for chunk in chunks)
        assert len(replays) - before == pure
        if pure:
            sizes.add(len(chunks))
    assert len(replays) > 80
    assert sizes == set(range(1, SEQUENCES + 1))
    graphs.close()
    eager.close()


def test_the_likeliest_token_comes_with_the_logits(folders: dict[str, Path]) -> None:
    runner = load(folders["bf16"], use_graph=True)
    traffic = Traffic(5, runner.config.vocab_size, runner.num_blocks)
    for _ in range(40):
        found = runner.forward(traffic.step())
        assert found.best.tolist() == found.values.argmax(dim=1).tolist()
    runner.close()


@pytest.mark.parametrize("max_num_seqs", [1, 5, 90])
def test_every_batch_size_has_a_graph(
    max_num_seqs: int, folders: dict[str, Path], replays: list[int]
) -> None:
    runner = load(folders["int8"], use_graph=True, max_num_seqs=max_num_seqs)
    for size in range(1, max_num_seqs + 1):
        runner.forward(
            [SequenceChunk([size], 0, [number], "decode", "last") for number in range(size)]
        )
        assert len(replays) == size
    runner.close()


def decode(number: int, *, token: int = 1, start: int = 70, last: int = 1) -> SequenceChunk:
    return SequenceChunk([token], start, [2 * number, last], "decode", "last")


REFUSED = {
    "a token beyond the vocabulary": ([decode(0, token=2**16)], "token_ids"),
    "a negative token": ([decode(0, token=-1)], "token_ids"),
    "a position beyond the longest sequence": ([decode(0, start=LENGTH)], "positions"),
    "a position beyond its blocks": ([decode(0, start=128)], "positions"),
    "a block beyond the cache": ([decode(0, last=10**6)], "block_tables"),
    "a negative block": ([decode(0, last=-1)], "block_tables"),
    "the same in a later row": ([decode(0), decode(1), decode(2, last=10**6)], "at row 2"),
    "more sequences than it is made for": (
        [decode(number) for number in range(SEQUENCES + 1)],
        f"holds 1 to {SEQUENCES} sequences, found {SEQUENCES + 1}",
    ),
    "more blocks than a sequence has": (
        [SequenceChunk([1], 0, list(range(9)), "decode", "last")],
        "blocks of a sequence, found 9",
    ),
    "more tokens than a step has": (
        [SequenceChunk([1] * (BUDGET + 1), 0, [0, 1], "prefill", "last")],
        f"holds 1 to {BUDGET} tokens, found {BUDGET + 1}",
    ),
    "nothing": ([], "sequences, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_before_it_runs(
    case: str, folders: dict[str, Path], replays: list[int]
) -> None:
    runner = load(folders["bf16"], use_graph=True)
    chunks, message = REFUSED[case]
    good = [decode(number, last=2 * number + 1) for number in range(3)]
    for number in range(3):
        runner.forward(
            [SequenceChunk([3] * 70, 0, [2 * number, 2 * number + 1], "prefill", "none")]
        )
    before = bits(runner.forward(good))
    replays.clear()
    with pytest.raises(RuntimeError, match=message):
        runner.forward(chunks)
    assert not replays
    after = bits(runner.forward(good))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    runner.close()


def test_no_graph_is_kept_where_none_is_wanted(
    folders: dict[str, Path], replays: list[int]
) -> None:
    runner = load(folders["bf16"], use_graph=False)
    runner.forward([decode(0)])
    assert not replays
    runner.close()


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_path_follows_the_cost_of_expanding(fmt: str, folders: dict[str, Path]) -> None:
    """A prompt by itself is read un-absorbed, a few tokens behind a long prefix absorbed; the place
    where that changes comes twice as soon with int8 weights, whose products cost half."""
    runner = load(folders[fmt], use_graph=False)
    context = 10**6
    assert runner.choose_path(200, 200) == "prefill"
    assert runner.choose_path(1, context) == "decode"
    least = next(n for n in range(1, 10**4) if runner.choose_path(n, context) == "prefill")
    c = runner.config
    expand = (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    saved = 2 * c.kv_lora_rank + c.qk_rope_head_dim - c.qk_head_dim - c.v_head_dim
    expected = expand * (0.5 if fmt == "int8" else 1.0) / saved
    assert least == pytest.approx(expected, abs=1.5)
    runner.close()


# ---------------------------------------------------------------------------------------------
# Nothing of a forward pass is computed by PyTorch


class Called(TorchDispatchMode):
    """Notes the names of all ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


NO_ARITHMETIC = {"aten::slice", "aten::view", "aten::lift_fresh"}
"""Views, and a tensor of a list of whole numbers: the segments of a step."""


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_step_falls_back_to_pytorch(folders: dict[str, Path], fmt: str) -> None:
    runner = load(folders[fmt], use_graph=False)
    traffic = Traffic(3, runner.config.vocab_size, runner.num_blocks)
    with Called() as called:
        torch.ones(2) + 1
    assert "aten::add" in called.names  # the mode sees what there is to see
    steps = [traffic.step() for _ in range(40)]
    with Called() as called:
        for chunks in steps:
            runner.forward(chunks)
    ours = {name for name in called.names if name.startswith("latentcore::")}
    assert {f"latentcore::{n}" for n in ("mla_prefill_attention", "mla_decode_attention")} <= ours
    assert {f"latentcore::{n}" for n in ("moe_shared", "mlp", "logits", "greedy")} <= ours
    assert called.names - ours <= NO_ARITHMETIC
    runner.close()
