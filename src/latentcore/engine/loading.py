"""From a model's name to everything that the engine needs of it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentcore.config import EngineConfig, GenerationDefaults, ModelConfig
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.engine import Engine, EngineOptions, Runner
from latentcore.engine.request import ModelLimits, Prompt, RequestPreparer
from latentcore.engine.sampler import Sampler
from latentcore.engine.sampling_params import SamplingParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import ConfigError
from latentcore.models.hub import resolve_model

if TYPE_CHECKING:
    from latentcore.engine.preflight import Ready

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

DEMO_MODEL = "latentcore-demo"
"""The name of the model that comes with the package."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with what its folder says about text and sampling.

    load_seconds  how long each part of loading took, one after the other, imports aside
    """

    name: str
    path: Path
    config: ModelConfig
    engine_config: EngineConfig
    runner: Runner
    sampler: Sampler
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    end_ids: tuple[int, ...]
    load_seconds: dict[str, float]

    def engine(self) -> tuple[Engine, RequestPreparer]:
        """An engine for this model, and what prepares requests for it."""
        options = EngineOptions(
            vocab_size=self.config.vocab_size,
            max_num_seqs=self.engine_config.max_num_seqs,
            enable_prefix_caching=self.engine_config.enable_prefix_caching,
            end_ids=self.end_ids,
            seed=self.engine_config.seed,
        )
        engine = Engine(self.runner, self.sampler, self.tokenizer, options)
        return engine, RequestPreparer(engine.limits, self.tokenizer, end_ids=self.end_ids)

    def default_params(self, *, max_tokens: int | None = 16, **changes: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults, with those of `changes` that are not None."""
        return _params(self.defaults, max_tokens, changes)


@dataclass(frozen=True)
class CheckedModel:
    """A model that has passed every check of `preflight`; none of its weights is read yet.

    What can be known to be wrong with a prompt is known here, before the long work.
    """

    name: str
    path: Path
    engine_config: EngineConfig
    ready: "Ready"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, None where it has none."""
        return self.ready.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, None where it has none."""
        return self.ready.chat_template

    def default_params(self, *, max_tokens: int | None = 16, **changes: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults, with those of `changes` that are not None."""
        return _params(self.ready.defaults, max_tokens, changes)

    def check_request(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises RequestError for a request that the loaded model would refuse."""
        limits = self.ready.limits
        preparer = RequestPreparer(
            ModelLimits(
                vocab_size=self.ready.config.vocab_size,
                max_model_len=limits.max_position,
                cache_tokens=limits.num_blocks * limits.block_size,
            ),
            self.tokenizer,
            end_ids=self._end_ids,
        )
        preparer.prepare(prompt, params)

    def load(self, progress: Progress | None = None) -> LoadedModel:
        """Reads the weights."""
        from latentcore.engine.native_sampler import NativeSampler
        from latentcore.models.runner import ModelRunner

        ready = self.ready
        runner = ModelRunner.from_plan(
            ready.plan, ready.checkpoint, self.engine_config, ready.limits, progress
        )
        seconds = {"checks": ready.seconds, **runner.load_seconds}
        parts = ", ".join(f"{what} {took:.3f} s" for what, took in seconds.items())
        logger.info("%s: loaded in %.3f s: %s", self.name, sum(seconds.values()), parts)
        return LoadedModel(
            name=self.name,
            path=self.path,
            config=ready.config,
            engine_config=self.engine_config,
            runner=runner,
            sampler=NativeSampler(ready.config.vocab_size),
            tokenizer=ready.tokenizer,
            chat_template=ready.chat_template,
            defaults=ready.defaults,
            end_ids=self._end_ids,
            load_seconds=seconds,
        )

    @property
    def _end_ids(self) -> tuple[int, ...]:
        return end_token_ids(self.ready.config, self.ready.defaults, self.ready.tokenizer)


def _params(
    defaults: GenerationDefaults, max_tokens: int | None, changes: dict[str, Any]
) -> SamplingParams:
    values = {
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
    }
    values |= {name: value for name, value in changes.items() if value is not None}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return SamplingParams(max_tokens=max_tokens, **given)


def model_name(model: str | os.PathLike[str] | None, path: Path) -> str:
    """What to call a model: the demo's name, a repository's, or its folder's."""
    if model is None:
        return DEMO_MODEL
    return path.resolve().name if Path(model).expanduser().is_dir() else str(model)


@contextmanager
def checked_model(
    model: str | os.PathLike[str] | None, engine_config: EngineConfig
) -> Iterator[CheckedModel]:
    """Finds a model and runs every check of `preflight` on it; load it within the block.

    Raises UserError for whatever is wrong with it or with the options.
    """
    from latentcore.engine.preflight import ready_to_load

    if engine_config.max_num_batched_tokens < engine_config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: expected at least max_num_seqs "
            f"({engine_config.max_num_seqs}), found {engine_config.max_num_batched_tokens}"
        )
    path = resolve_model(None if model is None else os.fspath(model))
    with ready_to_load(path, engine_config) as ready:
        yield CheckedModel(model_name(model, path), path, engine_config, ready)


def load_model(
    model: str | os.PathLike[str] | None,
    engine_config: EngineConfig,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model, once every check of `preflight` has passed.

    Raises UserError for whatever is wrong with it or with the options.
    """
    with checked_model(model, engine_config) as checked:
        return checked.load(progress)


def end_token_ids(
    config: ModelConfig, defaults: GenerationDefaults, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """All tokens that end an answer, wherever the checkpoint names them."""
    found = {*config.eos_token_ids, *defaults.eos_token_ids}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(i for i in found if i < config.vocab_size))
