"""A model on the command line: loading with a progress bar, streaming, the line of statistics."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from latentcore.cli.options import ModelOptions, SamplingOptions
from latentcore.config import EngineConfig
from latentcore.engine.bandwidth import machine_read_bandwidth
from latentcore.engine.chat import ChatTemplate
from latentcore.engine.llm import LLM
from latentcore.engine.loading import CheckedModel, LoadedModel, Progress, checked_model
from latentcore.engine.outputs import RequestOutput
from latentcore.engine.request import Prompt, TokensPrompt
from latentcore.engine.sampling_params import RequestOutputKind, SamplingParams
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import UserError
from latentcore.ops import runtime
from latentcore.server.parsing import (
    Content,
    Reasoning,
    ReasoningParser,
    prompt_opens_reasoning,
    reasons,
)


@dataclass(frozen=True)
class Statistics:
    """How a request went. Times in seconds, rates a second; None where nothing was decoded.

    `weight_bytes_per_second`: weights read while decoding. `read_bandwidth_share`: that as a share
    of what this machine was measured to read from memory. `weights_fit_in_cache`: they need not
    come from memory, so that the share says little and may exceed 1.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    time_to_first_token: float
    tokens_per_second: float | None
    weight_bytes_per_second: float | None
    read_bandwidth: float | None
    read_bandwidth_share: float | None
    weights_fit_in_cache: bool

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"{self.prompt_tokens} prompt tokens"
            + (f" ({self.cached_tokens} cached)" if self.cached_tokens else ""),
            f"TTFT {_seconds(self.time_to_first_token)}",
            f"{self.output_tokens} tokens",
        ]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.weight_bytes_per_second is not None and self.read_bandwidth_share is not None:
            parts.append(
                f"weights {self.weight_bytes_per_second / 1e9:.2f} GB/s = "
                f"{self.read_bandwidth_share:.0%} of this machine's read bandwidth"
                + (" (but they fit in its caches)" if self.weights_fit_in_cache else "")
            )
        return ", ".join(parts)


def open_model(options: ModelOptions, check: Callable[[CheckedModel], None]) -> LLM:
    """Loads the model, with a progress bar on stderr where that is a terminal.

    `check` raises a UserError where model and command do not go together; it is called before any
    weight is read.
    """
    config = EngineConfig(
        quantization=options.quantization.value,
        threads=options.threads,
        max_model_len=options.max_model_len,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        use_graph=not options.enforce_eager,
    )
    with checked_model(options.model, config) as checked:
        check(checked)
        progress, finish = loading_progress()
        try:
            return LLM.from_loaded(checked.load(progress))
        finally:
            finish()


def require_tokenizer(model: CheckedModel) -> Tokenizer:
    """The model's tokenizer; a UserError where it has none, since the command line takes text."""
    if model.tokenizer is None:
        raise UserError(
            f"{model.name} has no tokenizer files (tokenizer.json or tiktoken.model), so text "
            "cannot be read; add them, or pass token ids in Python"
        )
    return model.tokenizer


def can_think(template: ChatTemplate) -> bool:
    """Whether the template can have the model reason first: it has the marks for it."""
    return reasons(template.source(with_tools=False))


def sampling_params(model: CheckedModel | LoadedModel, options: SamplingOptions) -> SamplingParams:
    """The model's defaults with the options given on the command line."""
    return model.default_params(
        **options.given(), max_tokens=options.max_tokens, output_kind=RequestOutputKind.DELTA
    )


def check_sampling(options: SamplingOptions) -> None:
    """Refuses bad sampling options before anything is loaded."""
    SamplingParams(**options.given(), max_tokens=options.max_tokens)


@dataclass
class Answer:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    statistics: Statistics

    def as_json(self) -> dict[str, object]:
        """For --json, without the text."""
        return {
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "statistics": asdict(self.statistics),
        }


def answer(
    llm: LLM, prompt: Prompt, params: SamplingParams, show: Callable[[str], None] | None
) -> Answer:
    """Generates one answer, handing its text to `show` as it comes."""
    pieces: list[str] = []
    token_ids: list[int] = []
    times: list[float] = []
    started = time.monotonic()

    def take(output: RequestOutput) -> None:
        times.append(time.monotonic())
        for choice in output.outputs:
            token_ids.extend(choice.token_ids)
            pieces.append(choice.text)
            if show is not None and choice.text:
                show(choice.text)

    (final,) = llm.generate(prompt, params, on_output=take)
    reason = final.outputs[0].finish_reason
    assert reason is not None
    decode_tokens = len(token_ids) - 1
    decode_time = times[-1] - times[0]
    rate = decode_tokens / decode_time if decode_tokens > 0 and decode_time > 0 else None
    bytes_per_second = bandwidth = share = None
    if rate is not None:
        bytes_per_second = rate * llm.loaded.runner.weight_bytes_per_token(1)
        bandwidth = machine_read_bandwidth()
        share = bytes_per_second / bandwidth
    statistics = Statistics(
        prompt_tokens=len(final.prompt_token_ids),
        cached_tokens=final.num_cached_tokens,
        output_tokens=len(token_ids),
        time_to_first_token=times[0] - started,
        tokens_per_second=rate,
        weight_bytes_per_second=bytes_per_second,
        read_bandwidth=bandwidth,
        read_bandwidth_share=share,
        weights_fit_in_cache=llm.loaded.runner.weight_bytes <= runtime.last_level_cache(),
    )
    return Answer("".join(pieces), token_ids, reason, statistics)


class ChatWriter:
    """A chat answer, taken apart as it comes: the model's reasoning and what it says.

    Where it is shown, an empty line parts the two, and reasoning is dim on a terminal.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, prompt: TokensPrompt, *, show: bool
    ) -> None:
        self.reasoning = ""
        self.content = ""
        self._show = show
        self._parser: ReasoningParser | None = None
        if can_think(template):
            end = tokenizer.decode(prompt["prompt_token_ids"][-16:], skip_special_tokens=False)
            self._parser = ReasoningParser(inside=prompt_opens_reasoning(end))

    def push(self, text: str) -> None:
        """The next piece of the answer; it may break anywhere."""
        self._take([Content(text)] if self._parser is None else self._parser.push(text))

    def finish(self) -> None:
        """The answer is complete."""
        if self._parser is not None:
            self._take(self._parser.finish())
        if self._show:
            write_text("\n")

    def _take(self, events: Sequence[Reasoning | Content]) -> None:
        for event in events:
            if isinstance(event, Reasoning):
                before = self.reasoning.rstrip("\n")
                self.reasoning += event.text
                # Line breaks at the end may be followed by nothing but the answer: they wait.
                piece = self.reasoning.rstrip("\n")[len(before) :]
                if self._show and piece:
                    write_text(_dim(piece) if sys.stdout.isatty() else piece)
            else:
                if self._show:
                    parted = self.reasoning.strip() and not self.content
                    write_text(("\n\n" if parted else "") + event.text)
                self.content += event.text


def write_text(text: str) -> None:
    """Text alone, at once, to stdout; what the terminal's encoding lacks is replaced."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def write_note(text: str) -> None:
    """A line on stderr, dim where that is a terminal."""
    print(_dim(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"


def loading_progress() -> tuple[Progress, Callable[[], None]]:
    """What to call while loading, and once at its end: a bar on a terminal, a line elsewhere."""
    if sys.stderr.isatty():
        return _progress_bar()
    return _progress_line()


def _progress_bar() -> tuple[Progress, Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    task = bar.add_task("loading", total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    return progress, bar.stop


def _progress_line() -> tuple[Progress, Callable[[], None]]:
    """One line at the end, for logs."""
    started = time.monotonic()
    loaded = 0
    complete = False

    def progress(done: int, total: int) -> None:
        nonlocal loaded, complete
        loaded, complete = done, done == total

    def finish() -> None:
        if complete:
            took = max(time.monotonic() - started, 1e-9)
            write_note(
                f"loaded {loaded / 1e6:.1f} MB in {_seconds(took)} ({loaded / took / 1e6:.0f} MB/s)"
            )

    return progress, finish


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
