"""The offline interface: a model, prompts in, answers out. Names follow vLLM's `LLM`."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from latentcore.config import EngineConfig
from latentcore.engine.chat import Message, chat_prompt
from latentcore.engine.interrupts import Interrupts
from latentcore.engine.loading import LoadedModel, Progress, load_model
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.request import Prompt
from latentcore.engine.sampling_params import RequestOutputKind, SamplingParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import LatentcoreError, RequestError


class LLM:
    """A loaded model. Use it as a context manager, or `close` it, to give its memory back."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        quantization: str | None = None,
        threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Loads `model`: a folder, a Hugging Face repository, or None for the demo model.

        quantization: None or "auto" runs the weights as they are stored; "unquant", "w8a8_int8"
        and "fp8" convert. threads: None uses the physical cores. max_model_len: longest prompt and
        answer in tokens; None takes what model and memory allow. kv_cache_memory_bytes: room of the
        latent cache. enforce_eager: decode without captured graphs. seed: base for requests
        without a seed of their own. progress: called with (bytes loaded, bytes in all).

        Raises UserError, with one clear line, for whatever cannot be done.
        """
        config = EngineConfig(
            quantization=quantization or "auto",
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            use_graph=not enforce_eager,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
        )
        self._start(load_model(model, config, progress))

    @classmethod
    def from_loaded(cls, loaded: LoadedModel) -> "LLM":
        """Wraps a model that is loaded already, and owns it from then on."""
        self = cls.__new__(cls)
        self._start(loaded)
        return self

    def _start(self, loaded: LoadedModel) -> None:
        self._loaded: LoadedModel | None = loaded
        self._engine, self._preparer = loaded.engine()
        self._lock = threading.Lock()
        self._requests = 0

    @property
    def loaded(self) -> LoadedModel:
        """The model's parts. Raises LatentcoreError once it is closed."""
        if self._loaded is None:
            raise LatentcoreError("this LLM is closed")
        return self._loaded

    def get_tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, None where it has none."""
        return self.loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generation_config.json` suggests; used where no parameters are given."""
        return self.loaded.default_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, all together; the results are in the order of the prompts.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": [...]}. `sampling_params` are
        one for all or one a prompt, and so is `priority` (a lower one is served first).
        `on_output` is called with every output as it comes (see `SamplingParams.output_kind`).
        `use_tqdm`: show on a terminal how many prompts are answered, unless `on_output` does so.
        Raises RequestError before anything runs if one of the prompts cannot be served.
        """
        batch = _as_list(prompts)
        if not batch:
            return []
        params = self._params_for(sampling_params, len(batch))
        prepared = [
            self._preparer.prepare(prompt, one) for prompt, one in zip(batch, params, strict=True)
        ]
        priorities = _priorities(priority, len(batch))
        bar = _bar(len(batch)) if use_tqdm and on_output is None else nullcontext(_no_bar)
        with self._lock, bar as advance, Interrupts() as interrupts:
            self.loaded  # noqa: B018 - raises once closed
            request_ids: list[str] = []
            finished: dict[str, RequestOutput] = {}
            try:
                for request, urgency in zip(prepared, priorities, strict=True):
                    request_id = str(self._requests)
                    self._requests += 1
                    request_ids.append(request_id)
                    with interrupts.held():
                        self._engine.add_request(request_id, request, priority=urgency)
                while self._engine.has_unfinished:
                    with interrupts.held():
                        step = self._engine.step()
                    for failure in step.failures.values():
                        raise failure
                    for output in step.outputs:
                        if on_output is not None:
                            on_output(output)
                        if output.finished:
                            finished[output.request_id] = output
                            advance()
            finally:
                with interrupts.held():
                    for request_id in request_ids:
                        self._engine.abort(request_id)
            return [finished[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the checkpoint's chat template.

        Messages and `tools` are in OpenAI's form. `chat_template_kwargs` go to the template
        (`{"thinking": True}`). Raises RequestError where there is no template.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [
            self.chat_prompt(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(
            prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, on_output=on_output
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that `chat` reads for one conversation."""
        return chat_prompt(
            self.loaded.chat_template,
            self.loaded.tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=chat_template_kwargs,
        )

    def close(self) -> None:
        """Gives memory and threads back. The LLM cannot be used afterwards. Safe to repeat."""
        loaded = getattr(self, "_loaded", None)
        if loaded is not None:
            with self._lock:
                self._loaded = None
                self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        found = list(params)
        if len(found) != count or not all(isinstance(one, SamplingParams) for one in found):
            raise RequestError(
                f"sampling_params: expected a SamplingParams, or one for each of {count} prompts"
            )
        return found


def _no_bar() -> None:
    pass


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar of answered prompts on stderr, where that is a terminal; yields what moves it."""
    if not sys.stderr.isatty():
        yield _no_bar
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = ("answered prompts", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _priorities(priority: int | Sequence[int] | None, count: int) -> list[int]:
    if priority is None or isinstance(priority, int):
        return [priority or 0] * count
    if len(priority) != count:
        raise RequestError(
            f"priority: expected one for each of {count} prompts, found {len(priority)}"
        )
    return list(priority)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts: expected a prompt or a list, found {type(prompts).__name__}")
    return list(prompts)


__all__ = ["LLM", "RequestOutputKind", "SamplingParams"]
