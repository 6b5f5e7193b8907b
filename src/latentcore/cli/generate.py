"""`latentcore generate`: one prompt, one answer."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from latentcore.cli.options import (
    EnforceEagerOption,
    JsonOption,
    MaxModelLenOption,
    MaxTokensOption,
    ModelOption,
    ModelOptions,
    Quantization,
    QuantizationOption,
    SamplingOptions,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    check_lengths,
)
from latentcore.errors import UserError

if TYPE_CHECKING:
    from latentcore.engine.loading import CheckedModel


def generate(
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text to go on from. Default: standard input."),
    ] = None,
    model: ModelOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    quantization: QuantizationOption = Quantization.AUTO,
    threads: ThreadsOption = None,
    max_model_len: MaxModelLenOption = None,
    enforce_eager: EnforceEagerOption = False,
    json_output: JsonOption = False,
) -> None:
    """Continue a text. The text goes to standard output, everything else to standard error."""
    check_lengths(max_tokens, max_model_len)
    text = read_prompt() if prompt is None else prompt
    if not text:
        raise UserError("the prompt is empty; pass --prompt or pipe text into standard input")

    from latentcore.cli import session

    sampling = SamplingOptions(max_tokens, temperature, top_p, top_k, seed, stop)
    session.check_sampling(sampling)
    options = ModelOptions(model, quantization, threads, max_model_len, enforce_eager)

    def check(model: "CheckedModel") -> None:
        session.require_tokenizer(model)
        model.check_request(text, session.sampling_params(model, sampling))

    with session.open_model(options, check) as llm:
        params = session.sampling_params(llm.loaded, sampling)
        show = None if json_output else session.write_text
        answer = session.answer(llm, text, params, show)
        if json_output:
            found = {"prompt": text, "text": answer.text, **answer.as_json()}
            found["load_seconds"] = llm.loaded.load_seconds
            print(json.dumps(found, ensure_ascii=False))
        else:
            session.write_text("\n")
        session.write_note(answer.statistics.line())


def read_prompt() -> str:
    """All of standard input; a UserError where that is a terminal or not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("no prompt: pass --prompt or pipe text into standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error.reason})") from None
