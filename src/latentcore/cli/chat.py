"""`latentcore chat`: a conversation."""

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from latentcore.cli.options import (
    JsonOption,
    MaxModelLenOption,
    MaxTokensOption,
    ModelOption,
    ModelOptions,
    NoGraphOption,
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
from latentcore.errors import RequestError, UserError

_HELP = "/think on|off  let the model reason first;  /new  start over;  /exit  leave"


def chat(
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Say this, print the answer and exit."),
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
    no_graph: NoGraphOption = False,
    json_output: JsonOption = False,
    thinking: Annotated[
        bool, typer.Option("--think/--no-think", help="Let the model reason first.")
    ] = False,
) -> None:
    """Talk to a model. Without a terminal, every line of standard input is a message."""
    check_lengths(max_tokens, max_model_len)

    from latentcore.cli import session

    sampling = SamplingOptions(max_tokens, temperature, top_p, top_k, seed, stop)
    session.check_sampling(sampling)
    options = ModelOptions(model, quantization, threads, max_model_len, not no_graph)
    with session.open_model(options) as llm:
        if llm.loaded.chat_template is None:
            raise UserError(f"{llm.loaded.name} has no chat template; use `latentcore generate`")
        params = session.sampling_params(llm, sampling)
        messages: list[dict[str, Any]] = []
        interactive = prompt is None and sys.stdin.isatty()
        if interactive:
            session.write_note(f"{llm.loaded.name}. {_HELP}")
        for line in _messages(prompt):
            command, _, argument = line.partition(" ")
            if interactive and command.startswith("/"):
                if command in ("/exit", "/quit"):
                    break
                if command == "/new":
                    messages.clear()
                elif command == "/think" and argument in ("on", "off"):
                    thinking = argument == "on"
                else:
                    session.write_note(_HELP)
                continue
            messages.append({"role": "user", "content": line})
            try:
                tokens = llm.chat_prompt(messages, chat_template_kwargs={"thinking": thinking})
                show = None if json_output else session.write_text
                answer = session.answer(llm, tokens, params, show)
            except RequestError as error:
                if not interactive:
                    raise
                messages.pop()
                session.write_note(f"{error}; /new starts over")
                continue
            except KeyboardInterrupt:
                if not interactive:
                    raise
                messages.pop()
                session.write_note("\n(stopped)")
                continue
            # The template shows "<think>" to the model; what follows is its own.
            messages.append({"role": "assistant", "content": answer.text})
            if json_output:
                print(json.dumps({"message": line, **answer.as_json()}, ensure_ascii=False))
                sys.stdout.flush()
            else:
                session.write_text("\n")
            session.write_note(answer.statistics.line())


def _messages(prompt: str | None) -> Iterator[str]:
    """What the user says: --prompt alone, or line after line."""
    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt: expected a message, found nothing")
        yield prompt
        return
    if sys.stdin is None:
        raise UserError("no message: pass --prompt or pipe lines into standard input")
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
        return
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()
