"""`latentcore chat`: a conversation."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

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
from latentcore.errors import RequestError, UserError

if TYPE_CHECKING:
    from latentcore.engine.interrupts import Interrupts
    from latentcore.engine.loading import CheckedModel

_HELP = (
    "/think on|off  let the model reason first;  /new  start over;  /exit or ^D  leave;  "
    '^C  stop the answer;  """  begins and ends a message of several lines'
)
_EXIT = ("/exit", "/quit", "/bye")
_NEW = ("/new", "/clear")
_QUOTES = '"""'


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
    enforce_eager: EnforceEagerOption = False,
    json_output: JsonOption = False,
    thinking: Annotated[
        bool, typer.Option("--think/--no-think", help="Let the model reason first.")
    ] = False,
) -> None:
    """Talk to a model. Without a terminal, every line of standard input is a message."""
    check_lengths(max_tokens, max_model_len)
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: expected a message, found nothing")
    if prompt is None and sys.stdin is None:
        raise UserError("no message: pass --prompt or pipe lines into standard input")

    from latentcore.cli import session
    from latentcore.engine.chat import chat_prompt
    from latentcore.engine.interrupts import Interrupts

    sampling = SamplingOptions(max_tokens, temperature, top_p, top_k, seed, stop)
    session.check_sampling(sampling)
    options = ModelOptions(model, quantization, threads, max_model_len, enforce_eager)

    def check(model: "CheckedModel") -> None:
        tokenizer, template = session.require_tokenizer(model), model.chat_template
        if template is None:
            raise UserError(f"{model.name} has no chat template; use `latentcore generate`")
        if thinking and not session.can_think(template):
            raise UserError(f"--think: the chat template of {model.name} has no thinking")
        first = [{"role": "user", "content": prompt or "Hello"}]
        tokens = chat_prompt(template, tokenizer, first, template_kwargs={"thinking": thinking})
        model.check_request(tokens, session.sampling_params(model, sampling))

    with ExitStack() as stack:
        llm = stack.enter_context(session.open_model(options, check))
        params = session.sampling_params(llm.loaded, sampling)
        template, tokenizer = llm.loaded.chat_template, llm.loaded.tokenizer
        assert template is not None
        assert tokenizer is not None
        messages: list[dict[str, Any]] = []
        interactive = prompt is None and sys.stdin.isatty()
        interrupts = stack.enter_context(Interrupts())
        if interactive:  # ^C stops an answer or drops a line; it never ends the conversation
            stack.enter_context(interrupts.held())
            session.write_note(f"{llm.loaded.name}. {_HELP}")
        for line in _messages(prompt, interrupts):
            command, _, argument = line.partition(" ")
            if interactive and command.startswith("/"):
                if command in _EXIT:
                    break
                if command in _NEW:
                    messages.clear()
                    session.write_note("(a new conversation)")
                elif command == "/think" and argument in ("on", "off"):
                    thinking = argument == "on"
                    if thinking and not session.can_think(template):
                        session.write_note("this model's chat template has no thinking")
                else:
                    session.write_note(_HELP)
                continue
            turn = len(messages)
            messages.append({"role": "user", "content": line})
            said: list[str] = []
            try:
                tokens = chat_prompt(
                    template, tokenizer, messages, template_kwargs={"thinking": thinking}
                )
                writer = session.ChatWriter(template, tokenizer, tokens, show=not json_output)

                def take(
                    text: str, to: session.ChatWriter = writer, kept: list[str] = said
                ) -> None:
                    kept.append(text)
                    to.push(text)

                with interrupts.allowed():
                    answer = session.answer(llm, tokens, params, take)
                writer.finish()
                # The template shows "<think>" to the model; what follows is its own.
                messages.append({"role": "assistant", "content": answer.text})
                if json_output:
                    found = {
                        "message": line,
                        "reasoning_content": writer.reasoning or None,
                        "text": writer.content,
                        **answer.as_json(),
                    }
                    print(json.dumps(found, ensure_ascii=False), flush=True)
                session.write_note(answer.statistics.line())
            except RequestError as error:
                if not interactive:
                    raise
                messages.pop()
                session.write_note(f"{error}; /new starts over")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                session.write_note("\n(stopped)")
                # What the model has said stays, so that it can be told to go on.
                if said and writer.content:
                    messages[turn + 1 :] = [{"role": "assistant", "content": "".join(said)}]
                else:
                    del messages[turn:]


def _messages(prompt: str | None, interrupts: "Interrupts") -> Iterator[str]:
    """What the user says: --prompt alone, or line after line."""
    if prompt is not None:
        yield prompt
        return
    if not sys.stdin.isatty():
        for raw in sys.stdin.buffer:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8 ({error.reason})") from None
            if line.strip():
                yield line.rstrip("\r\n")
        return
    import readline  # gives input() its line editing and history

    # A paste of several lines is one message; Python turns this off. libedit knows no such thing.
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")

    while True:
        try:
            with interrupts.allowed():
                message = _typed()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # drops what was typed, as in a shell
            print("\n(^D or /exit leaves)", file=sys.stderr)
            continue
        if message:
            yield message


def _typed() -> str:
    """One message from the terminal: a line, or several between triple quotes."""
    line = input("> ").strip()
    if not line.startswith(_QUOTES):
        return line
    lines = [line.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip()
