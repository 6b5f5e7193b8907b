"""A model and a sampler that need no weights, yet notice every mistake of the engine's.

`FakeRunner` keeps, in each slot of its cache, a digest of everything that the token in it was
computed from: the tokens before it and the paths they took. Logits are a pseudo-random function of
that digest. A wrong block, position, path or token changes everything that is generated after it.
"""

import hashlib
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from latentcore.config import EngineConfig, GenerationDefaults, ModelConfig
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.engine import Engine, EngineOptions
from latentcore.engine.loading import LoadedModel
from latentcore.engine.request import RequestPreparer
from latentcore.engine.sampler import SampledToken, SampleRow, TokenLogprobs
from latentcore.engine.tokenizer import Tokenizer
from latentcore.models.chunk import SequenceChunk
from latentcore.models.logits import StepLogits

BLOCK_SIZE = 64
VOCAB_SIZE = 300
END_ID = 257


def step_logits(values: torch.Tensor) -> StepLogits:
    """Logits as a runner gives them."""
    return StepLogits(values, values.argmax(dim=1).to(torch.int32))


class FakeRunner:
    """Computes pseudo-logits from the contents of a paged cache."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        max_model_len: int = 1024,
        max_num_batched_tokens: int = 256,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = BLOCK_SIZE
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        self.cache: dict[tuple[int, int], bytes] = {}
        self.steps: list[list[SequenceChunk]] = []
        self.fail_next: Exception | None = None
        self.script: dict[bytes, int] = {}
        self.closed = False

    def choose_path(self, uncached_tokens: int, context: int) -> str:
        return "prefill" if uncached_tokens * 2 >= context else "decode"

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        for offset in range(num_tokens):
            self.cache[target, offset] = self.cache[source, offset]

    def forward(self, chunks: Sequence[SequenceChunk]) -> StepLogits:
        assert not self.closed
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.max_num_batched_tokens
        self.steps.append(list(chunks))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            for chunk in chunks:
                for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
                    self._write(chunk, position, b"rubbish of a failed step")
            raise error
        rows: list[np.ndarray] = []
        written: set[tuple[int, int]] = set()
        for chunk in chunks:
            assert chunk.token_ids
            end = chunk.start + len(chunk.token_ids)
            assert len(chunk.block_table) == -(-end // BLOCK_SIZE)
            state = self._read(chunk, chunk.start - 1) if chunk.start else b""
            for offset, token_id in enumerate(chunk.token_ids):
                assert 0 <= token_id < self.vocab_size
                position = chunk.start + offset
                state = hashlib.blake2b(
                    state + struct.pack("<IQ", token_id, position) + chunk.path.encode(),
                    digest_size=16,
                ).digest()
                slot = self._slot(chunk, position)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.cache[slot] = state
                last = position == end - 1
                if chunk.logits == "all" or (chunk.logits == "last" and last):
                    rows.append(self._logits(state, position))
        if not rows:
            return StepLogits.empty(0, self.vocab_size, torch.device("cpu"))
        return step_logits(torch.from_numpy(np.stack(rows)))

    @property
    def weight_bytes(self) -> int:
        return 5000

    def weight_bytes_per_token(self, batch: int, /) -> float:
        return 1000.0 / batch

    def close(self) -> None:
        self.closed = True

    def _logits(self, state: bytes, position: int) -> np.ndarray:
        generator = np.random.default_rng(int.from_bytes(state, "little"))
        logits = generator.standard_normal(self.vocab_size).astype(np.float32) * 3
        logits[END_ID] -= 4.0
        return logits

    def _slot(self, chunk: SequenceChunk, position: int) -> tuple[int, int]:
        return chunk.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE

    def _read(self, chunk: SequenceChunk, position: int) -> bytes:
        return self.cache[self._slot(chunk, position)]

    def _write(self, chunk: SequenceChunk, position: int, value: bytes) -> None:
        self.cache[self._slot(chunk, position)] = value


class ScriptedRunner(FakeRunner):
    """A model that writes a given text, byte by byte, then its end token."""

    def __init__(self, answer: bytes, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.answer = answer
        self.prompt_length: int | None = None

    def _logits(self, state: bytes, position: int) -> np.ndarray:
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        assert self.prompt_length is not None
        index = position - (self.prompt_length - 1)
        target = END_ID if not 0 <= index < len(self.answer) else byte_token(self.answer[index])
        logits[target] = 20.0
        return logits


class FakeSampler:
    """A plain NumPy sampler with the parameters that these tests need."""

    def sample(self, logits: StepLogits, rows: Sequence[SampleRow]) -> list[SampledToken]:
        assert len(logits) == len(rows)
        return [
            self._row(values.numpy().copy(), row)
            for values, row in zip(logits.values, rows, strict=True)
        ]

    def logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        return [
            _logprobs(values.numpy(), token_id, num_top)
            for values, token_id in zip(logits, token_ids, strict=True)
        ]

    def _row(self, logits: np.ndarray, row: SampleRow) -> SampledToken:
        raw = logits.copy()
        for token_id, bias in row.params.biases.items():
            logits[token_id] += bias
        for token_id in row.banned_ids:
            logits[token_id] = -np.inf
        if row.allowed is not None:
            words = row.allowed.numpy().reshape(-1).view(np.uint32)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)]
            logits[bits == 0] = -np.inf
        if row.params.greedy:
            token_id = int(np.argmax(logits))
        else:
            number = len(row.token_ids) - row.num_prompt_tokens
            noise = np.random.default_rng([row.seed, number]).gumbel(size=len(logits))
            token_id = int(np.argmax(logits / row.params.temperature + noise))
        wanted = row.params.logprobs
        return SampledToken(token_id, None if wanted is None else _logprobs(raw, token_id, wanted))


def _logprobs(logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    values = logits.astype(np.float64)
    values = values - np.log(np.exp(values - values.max()).sum()) - values.max()
    order = np.argsort(-values, kind="stable")[:num_top]
    rank = int((values > values[token_id]).sum()) + 1
    return TokenLogprobs(float(values[token_id]), rank, [(int(i), float(values[i])) for i in order])


def byte_tokenizer(**config: object) -> Tokenizer:
    """256 single bytes (in the order of the byte-level alphabet), `<s>` 256 and `</s>` 257."""
    from tests.engine.test_tokenizer import byte_level_dir

    with tempfile.TemporaryDirectory() as folder:
        template = config.pop("chat_template", None)
        path = byte_level_dir(Path(folder), **config)
        if template is not None:
            (path / "chat_template.jinja").write_text(str(template))
        tokenizer = Tokenizer.load(path)
    assert tokenizer is not None
    return tokenizer


_TOKENIZER = byte_tokenizer()


def byte_token(byte: int) -> int:
    """The id of a single byte's token."""
    return _TOKENIZER.token_bytes.index(bytes([byte]))


def make_engine(
    runner: FakeRunner | None = None,
    *,
    tokenizer: Tokenizer | None = _TOKENIZER,
    max_num_seqs: int = 8,
    enable_prefix_caching: bool = True,
) -> tuple[Engine, RequestPreparer]:
    """An engine on fakes, and what prepares requests for it."""
    engine = Engine(
        runner or FakeRunner(),
        FakeSampler(),
        tokenizer,
        EngineOptions(
            vocab_size=VOCAB_SIZE,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            end_ids=(END_ID,),
        ),
    )
    return engine, RequestPreparer(engine.limits, tokenizer, end_ids=(END_ID,))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% if thinking %}<think>{% endif %}{% endif %}"
)


def make_loaded(
    runner: FakeRunner | None = None,
    *,
    tokenizer: Tokenizer | None = _TOKENIZER,
    template: str | None = TEMPLATE,
    defaults: GenerationDefaults | None = None,
    **engine_options: Any,
) -> LoadedModel:
    """A loaded model on fakes."""
    runner = runner or FakeRunner()
    engine_options.setdefault("max_num_seqs", 8)
    return LoadedModel(
        name="fake",
        path=Path("fake"),
        config=cast(ModelConfig, SimpleNamespace(vocab_size=runner.vocab_size)),
        engine_config=EngineConfig(**engine_options),
        runner=runner,
        sampler=FakeSampler(),
        tokenizer=tokenizer,
        chat_template=None if template is None else ChatTemplate({"default": template}, {}),
        defaults=defaults or GenerationDefaults(),
        end_ids=(END_ID,),
        load_seconds={},
    )
