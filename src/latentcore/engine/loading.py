"""From a model's name to everything that the engine needs of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentcore.config import EngineConfig, GenerationDefaults, ModelConfig
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.engine import Engine, EngineOptions, Runner
from latentcore.engine.request import RequestPreparer
from latentcore.engine.sampler import Sampler
from latentcore.engine.sampling_params import SamplingParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import ConfigError
from latentcore.models.hub import resolve_model

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

DEMO_MODEL = "latentcore-demo"
"""The name of the model that comes with the package."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with what its folder says about text and sampling."""

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
        found = self.defaults
        values = {
            "temperature": found.temperature,
            "top_p": found.top_p,
            "top_k": found.top_k,
            "min_p": found.min_p,
            "repetition_penalty": found.repetition_penalty,
        }
        values |= {name: value for name, value in changes.items() if value is not None}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, **given)


def model_name(model: str | os.PathLike[str] | None, path: Path) -> str:
    """What to call a model: the demo's name, a repository's, or its folder's."""
    if model is None:
        return DEMO_MODEL
    return path.resolve().name if Path(model).expanduser().is_dir() else str(model)


def load_model(
    model: str | os.PathLike[str] | None,
    engine_config: EngineConfig,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model, once every check of `preflight` has passed.

    Raises UserError for whatever is wrong with it or with the options.
    """
    from latentcore.engine.native_sampler import NativeSampler
    from latentcore.engine.preflight import ready_to_load
    from latentcore.models.runner import ModelRunner

    if engine_config.max_num_batched_tokens < engine_config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: expected at least max_num_seqs "
            f"({engine_config.max_num_seqs}), found {engine_config.max_num_batched_tokens}"
        )
    path = resolve_model(None if model is None else os.fspath(model))
    with ready_to_load(path, engine_config) as ready:
        runner = ModelRunner.from_plan(
            ready.plan, ready.checkpoint, engine_config, ready.limits, progress
        )
    return LoadedModel(
        name=model_name(model, path),
        path=path,
        config=ready.config,
        engine_config=engine_config,
        runner=runner,
        sampler=NativeSampler(ready.config.vocab_size),
        tokenizer=ready.tokenizer,
        chat_template=ready.chat_template,
        defaults=ready.defaults,
        end_ids=end_token_ids(ready.config, ready.defaults, ready.tokenizer),
    )


def end_token_ids(
    config: ModelConfig, defaults: GenerationDefaults, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """All tokens that end an answer, wherever the checkpoint names them."""
    found = {*config.eos_token_ids, *defaults.eos_token_ids}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(i for i in found if i < config.vocab_size))
