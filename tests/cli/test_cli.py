"""The program: what goes to which stream, exit codes, and one clear line for every mistake."""

import errno
import json
import os
import pty
import re
import readline
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from latentcore import __version__
from latentcore.cli import app, chat, session
from latentcore.cli.options import ModelOptions, Quantization
from latentcore.engine import interrupts
from latentcore.engine.async_engine import EngineDeadError
from latentcore.engine.chat import ChatTemplate, chat_prompt
from latentcore.engine.request import TokensPrompt
from latentcore.engine.tokenizer import Tokenizer
from latentcore.models.hub import DEMO_MODEL
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime

STATISTICS = re.compile(
    r"^(\d+) prompt tokens, TTFT [\d.]+ m?s, (\d+) tokens, [\d.]+ tokens/s, "
    r"weights [\d.]+ GB/s = \d+% of this machine's read bandwidth \(but they fit in its caches\)$",
    re.MULTILINE,
)


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "machine_read_bandwidth", lambda: 20e9)


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "latentcore", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def generate(model: Path, *more: str) -> list[str]:
    base = ["generate", "--model", str(model), "--threads", "1", "--temperature", "0"]
    return [*base, "--max-tokens", "12", *more]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentcore {__version__}\n"


def run_code(program: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from latentcore.cli.app import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'xgrammar'} & set(sys.modules)\n"
        "sys.exit(code or bool(heavy))\n"
    )
    done = run_code(program)
    assert done.returncode == 0, done.stderr
    for command in ("generate", "chat", "serve", "preflight", "quantize"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_no_command_shows_the_help_alone(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    shown = capsys.readouterr()
    assert "Usage: " in shown.out
    assert shown.err == ""


def test_text_alone_goes_to_stdout(tiny_model: Path) -> None:
    done = run(*generate(tiny_model, "--prompt", "Once"))
    assert done.returncode == 0, done.stderr
    asked = run(*generate(tiny_model, "--prompt", "Once", "--json"))
    assert done.stdout == json.loads(asked.stdout)["text"] + "\n"
    found = STATISTICS.search(done.stderr)
    assert found is not None, done.stderr
    assert found.groups() == ("4", "12")
    assert re.search(r"loaded [\d.]+ MB in .* MB/s\)", done.stderr)


def test_the_prompt_may_come_from_stdin(tiny_model: Path) -> None:
    piped = run(*generate(tiny_model, "--json"), stdin="Once\n")
    given = run(*generate(tiny_model, "--json", "--prompt", "Once"))
    first, second = json.loads(piped.stdout), json.loads(given.stdout)
    assert first["prompt"] == "Once"
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 12
    assert first["finish_reason"] == "length"
    assert first["statistics"]["prompt_tokens"] == 4
    assert list(first["load_seconds"]) == ["checks", "weights", "buffers and graphs"]
    assert min(first["load_seconds"].values()) > 0


def test_sampling_options_reach_the_model(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokens(*more: str) -> list[int]:
        arguments = ["generate", "--model", str(tiny_model), "--threads", "1", "--json"]
        assert app.main([*arguments, "--prompt", "Hi", "--max-tokens", "12", *more]) == 0
        return list(json.loads(capsys.readouterr().out)["token_ids"])

    greedy = tokens("--temperature", "0")
    assert tokens("--temperature", "5", "--top-k", "1") == greedy
    assert tokens("--temperature", "5", "--top-p", "0.0001") == greedy
    assert tokens("--seed", "1", "--temperature", "2") == tokens(
        "--seed", "1", "--temperature", "2"
    )
    assert tokens("--seed", "1", "--temperature", "2") != tokens(
        "--seed", "2", "--temperature", "2"
    )
    assert tokens("--temperature", "0", "--enforce-eager") == greedy
    assert len(tokens("--temperature", "0", "--quantization", "w8a8_int8")) == 12


def test_stop_strings_end_the_text(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = generate(tiny_model, "--prompt", "Once", "--json")
    assert app.main(arguments) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = next(c for c in text[3:] if c.isascii() and c.isprintable())
    assert app.main([*arguments, "--stop", "nowhere", "--stop", stop]) == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_chat_answers_every_line(tiny_model: Path) -> None:
    arguments = ["chat", "--model", str(tiny_model), "--threads", "1", "--max-tokens", "5"]
    done = run(*arguments, "--temperature", "0", "--json", stdin="Hello\n\nAnd now?\n")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["message"], second["message"]) == ("Hello", "And now?")
    assert second["statistics"]["prompt_tokens"] > first["statistics"]["prompt_tokens"] + 8
    single = run(*arguments, "--temperature", "0", "--prompt", "Hello")
    assert single.stdout == first["text"] + "\n"


def heed_interrupts() -> None:
    """In a process to be: a shell's background jobs, which a test run may be, ignore ^C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.parent, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latentcore", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            close_fds=True,
            preexec_fn=heed_interrupts,
        )
        os.close(child)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.parent, text.encode())

    def read(self) -> bool:
        """Reads what there is; False at the end."""
        try:
            piece = os.read(self.parent, 4096)
        except OSError:
            return False
        self.text += piece.decode(errors="replace")
        return bool(piece)

    def wait_for(self, pattern: str) -> None:
        """Reads until the pattern stands in what was shown since the last call."""
        while not (found := re.search(pattern, self.text)):
            assert self.read(), self.text
        self.text = self.text[found.end() :]

    def interrupt(self, pattern: str) -> None:
        """^C, after which the pattern is shown. Again where nothing is shown for long: one that
        comes just as Python begins to wait for a key is noticed with the next."""
        self.process.send_signal(signal.SIGINT)
        while not re.search(pattern, self.text):
            if select.select([self.parent], [], [], 5)[0]:
                assert self.read(), self.text
            else:
                self.process.send_signal(signal.SIGINT)
        self.wait_for(pattern)

    def finish(self) -> str:
        while self.read():
            pass
        assert self.process.wait(60) == 0
        os.close(self.parent)
        return self.text


def test_chat_on_a_terminal(tiny_model: Path) -> None:
    terminal = Terminal("chat", "--model", str(tiny_model), "--threads", "1", "--max-tokens", "4")
    terminal.type("Hello\n/think on\nAgain\n/new\n/what\n\n")
    terminal.type('"""Once\n\nmore"""\n"""\nand\n"""\n/exit\n')
    text = terminal.finish()
    assert len(re.findall(r"prompt tokens", text)) == 4
    assert "/new" in text
    assert "Traceback" not in text


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit marks no pastes")
def test_what_is_pasted_is_one_message(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal("chat", "--model", str(tiny_model), "--threads", "1", "--max-tokens", "4")
    terminal.wait_for(r"\x1b\[\?2004h")  # asks the terminal to mark what is pasted
    terminal.type("\x1b[200~Once\nupon\n\x1b[201~ a time\n")
    terminal.wait_for("prompt tokens")
    terminal.type("\x04")
    assert "prompt tokens" not in terminal.finish()


def test_an_interrupt_on_a_terminal_stops_the_answer_alone() -> None:
    terminal = Terminal("chat", "--threads", "1", "--temperature", "0")
    terminal.wait_for("leave")
    terminal.wait_for("> ")
    terminal.interrupt(r"\^D or /exit leaves")
    for message in ("Tell me a story", "Another one"):
        terminal.wait_for("> ")
        terminal.type(f"{message}\n")
        terminal.wait_for(rf"{message}\r\n.")
        terminal.interrupt(r"\(stopped\)|leaves")  # the latter where the answer was quicker
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert "Traceback" not in terminal.finish()


def test_an_interrupt_at_any_moment_does_not_end_a_conversation(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every moment of the conversation's own code: it drops a line or stops an answer."""
    options = ModelOptions(str(tiny_model), Quantization.AUTO, 1, None, enforce_eager=False)
    llm = session.open_model(options, lambda _: None)
    monkeypatch.setattr(session, "open_model", lambda *_: nullcontext(llm))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    interrupted_at = calls = 0
    lines: list[str] = []
    files = {module.__file__ for module in (chat, session, interrupts)}

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if frame.f_code.co_filename in files:
            calls += 1
            if calls == interrupted_at:
                signal.raise_signal(signal.SIGINT)

    def type_line(_: str) -> str:
        sys.setprofile(count if lines else None)
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", type_line)

    def converse(moment: int) -> str:
        nonlocal interrupted_at, calls
        interrupted_at, calls = moment, 0
        lines[:] = ["Hello", "/think off", "Again"]
        assert app.main(["chat", "--max-tokens", "2", "--temperature", "0"]) == 0
        return capsys.readouterr().err

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        converse(0)
        said = converse(0)  # the first time more is called
        last = calls
        assert "stopped" not in said
        assert "leaves" not in said
        seen = [converse(moment) for moment in range(1, last + 1)]
    finally:
        signal.signal(signal.SIGINT, handler)
        llm.close()
    assert all(said.count("(stopped)") + said.count("leaves)") == 1 for said in seen)
    assert any("(stopped)" in said for said in seen)
    assert any("leaves)" in said for said in seen)


def bad(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs what must fail; returns its one line."""
    code = app.main(arguments)
    streams = capsys.readouterr()
    assert code == 2, streams.err
    assert streams.out == ""
    lines = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, streams.err
    assert "Traceback" not in streams.err
    return lines[0]


THOUGHT = re.compile(r"^Add 123 and 456[^<]*[^\n]\n\n123 \+ 456 = 579\n$", re.DOTALL)
QUESTION = ["chat", "--threads", "1", "--temperature", "0", "--prompt", "What is 123 + 456?"]


def test_reasoning_is_parted_from_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*QUESTION, "--think"]) == 0
    shown = capsys.readouterr().out
    assert THOUGHT.match(shown), shown
    assert app.main([*QUESTION, "--think", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "123 + 456 = 579"
    assert f"{found['reasoning_content']}\n\n{found['text']}\n" == shown
    assert app.main([*QUESTION, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reasoning_content"] is None
    assert found["text"].endswith("579")


def test_reasoning_is_dim_on_a_terminal_and_text_alone_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(DEMO_MODEL)
    assert tokenizer is not None
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    messages = [{"role": "user", "content": "Hi"}]
    opened = chat_prompt(template, tokenizer, messages, template_kwargs={"thinking": True})
    closed = chat_prompt(template, tokenizer, messages, template_kwargs={"thinking": False})

    def shown(prompt: TokensPrompt, text: str, size: int) -> str:
        writer = session.ChatWriter(template, tokenizer, prompt, show=True)
        for start in range(0, len(text), size):
            writer.push(text[start : start + size])
        writer.finish()
        return capsys.readouterr().out

    for size in (1, 2, 3, 5, 8, 100):
        assert shown(opened, "a\n\nb\n</think>\n\nc\n\nd", size) == "a\n\nb\n\nc\n\nd\n"
        assert shown(opened, "</think>c", size) == "c\n"
        assert shown(opened, "cut off, 1 < 2\n", size) == "cut off, 1 < 2\n"
        assert shown(closed, "no thought < c", size) == "no thought < c\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    dim, plain = "\x1b[2m", "\x1b[0m"
    assert shown(opened, "a b</think>c", 100) == f"{dim}a b{plain}\n\nc\n"


def test_thinking_needs_a_template_that_knows_it(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", "--model", str(tiny_model), "--prompt", "Hi", "--think"]
    assert "--think: the chat template of" in bad(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["generate", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["generate", "--quantization", "int4", "--prompt", "x"], "'int4' is not one of"),
        (["generate", "--max-tokens", "x", "--prompt", "x"], "'--max-tokens'"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens: expected at least 1"),
        (
            ["generate", "--prompt", "x", "--max-tokens", "64", "--max-model-len", "64"],
            "leaves no room",
        ),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature: expected"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p: expected"),
        (["generate", "--prompt", "x", "--top-k", "-5"], "top_k: expected"),
        (["generate", "--prompt", "x", "--stop", ""], "stop: expected"),
        (["generate", "--prompt", "x", "--model", "/nowhere"], "no such model"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--threads", "0"], "threads: expected"),
        (
            ["generate", "--prompt", "x", "--model", "MODEL", "--max-model-len", "-1"],
            "max_model_len",
        ),
        (["generate", "--prompt", "x" * 600, "--model", "MODEL"], "max_model_len is 512"),
        (
            ["generate", "--prompt", "x" * 60, "--model", "MODEL", "--max-model-len", "50"],
            "has 60 tokens, max_model_len is 50",
        ),
        (["generate", "--prompt", "x", "--model", "MODEL", "--max-tokens", "900"], "at most 511"),
        (["generate", "--prompt", "a\udcff", "--model", "MODEL"], "not valid Unicode"),
        (["chat", "--prompt", " ", "--model", "MODEL"], "--prompt: expected a message"),
        (["chat", "--prompt", "x" * 600, "--model", "MODEL"], "max_model_len is 512"),
        (["chat", "--model", "MODEL", "--max-tokens", "900"], "max_tokens can be at most"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    match: str,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None of them reads a weight first."""
    monkeypatch.setattr(ModelRunner, "from_plan", lambda *_: pytest.fail("weights were read"))
    filled = [str(tiny_model) if argument == "MODEL" else argument for argument in arguments]
    assert match in bad(filled, capsys)


def broken(tiny_model: Path, folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(tiny_model, target)
    return target


def change_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_broken_models_are_one_line(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = broken(tiny_model, tmp_path)
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "model.safetensors" in bad(generate(model, "--prompt", "x"), capsys)
    weights.write_bytes(data)
    change_config(model, model_type="llama")
    assert 'found "llama"' in bad(generate(model, "--prompt", "x"), capsys)
    change_config(model, model_type="deepseek_v3")
    assert app.main(generate(model, "--prompt", "x")) == 0
    capsys.readouterr()
    monkeypatch.setattr(ModelRunner, "from_plan", lambda *_: pytest.fail("weights were read"))
    (model / "chat_template.jinja").rename(model / "kept")
    assert "no chat template" in bad(["chat", "--model", str(model), "--prompt", "x"], capsys)
    (model / "tokenizer.json").write_text("{")
    assert "not a readable tokenizer" in bad(generate(model, "--prompt", "x"), capsys)
    (model / "tokenizer.json").unlink()
    assert "no tokenizer files" in bad(generate(model, "--prompt", "x"), capsys)
    assert "no tokenizer files" in bad(["chat", "--model", str(model), "--prompt", "x"], capsys)
    weights.write_bytes(data[:-100])
    assert "model.safetensors" in bad(generate(model, "--prompt", "x"), capsys)


def test_a_tier_that_this_cpu_lacks_is_one_line(tiny_model: Path) -> None:
    missing = "sse" if "amx" in runtime.cpu_features() else "amx"
    done = run(*generate(tiny_model, "--prompt", "x"), LATENTCORE_FORCE_ISA=missing)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"LATENTCORE_FORCE_ISA={missing}: " in line


def test_no_terminal_and_no_prompt(tiny_model: Path) -> None:
    done = run(*generate(tiny_model))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the prompt is empty")
    assert done.stdout == ""


def test_input_that_is_not_text(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "latentcore", *generate(tiny_model)],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard input is not UTF-8")


def test_messages_that_are_not_text(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "latentcore", "chat", "--model", str(tiny_model)],
        input=b"\xff\xfe\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"error: standard input is not UTF-8" in done.stderr


def test_what_cannot_be_written_is_one_line(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "latentcore", *generate(tiny_model, "--prompt", "x")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    said = done.stderr.decode().splitlines()
    assert said[-1] == "error: No space left on device"
    assert [line for line in said if line.startswith(("Traceback", "Exception"))] == []


def test_closed_streams_are_nothing_to_write_to(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert app.main(generate(tiny_model, "--prompt", "x")) == 0
    assert "prompt tokens" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", None)
    assert app.main(generate(tiny_model, "--prompt", "x")) == 0


def test_an_interrupt_is_quiet(tiny_model: Path) -> None:
    arguments = [*generate(tiny_model), "--prompt", "Once", "--max-model-len", "512"]
    arguments[arguments.index("--max-tokens") + 1] = "500"
    with subprocess.Popen(
        [sys.executable, "-m", "latentcore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read().decode()
        code = process.wait(30)
    # Python's last steps heed no handler: there the signal itself ends it, for a shell 130 too.
    assert code in (0, 130, -signal.SIGINT)
    assert "Traceback" not in error


AT_IMPORT = """
import signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
AT_THE_END = """
import atexit, signal
atexit.register(signal.raise_signal, signal.SIGINT)
"""


@pytest.mark.parametrize(
    "moment",
    [
        AT_IMPORT.format(name="latentcore.cli.app"),
        AT_IMPORT.format(name="numpy.dtypes"),
        AT_IMPORT.format(name="latentcore.models.runner"),
        AT_THE_END,
    ],
    ids=["imports", "a library's imports", "later imports", "end"],
)
def test_an_interrupt_where_nothing_can_catch_it_is_quiet(tiny_model: Path, moment: str) -> None:
    """Python shows what is raised in these places, and numpy makes another error of it."""
    arguments = ["latentcore", *generate(tiny_model, "--prompt", "Once")]
    done = run_code(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{moment}\n"
        f"sys.argv = {arguments!r}\n"
        "from latentcore.__main__ import program\n"
        "program()\n"
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(tiny_model: Path) -> None:
    arguments = generate(tiny_model, "--prompt", "Once")
    arguments[arguments.index("--max-tokens") + 1] = "400"
    with subprocess.Popen(
        [sys.executable, "-m", "latentcore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read().decode()
        process.wait(30)
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_bugs_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineDeadError("oh no")

    monkeypatch.setattr(session, "answer", fail)
    assert app.main(generate(tiny_model, "--prompt", "x")) == 1
    assert "error: EngineDeadError: oh no (unexpected" in capsys.readouterr().err


MEMORY_ERRORS = (
    (MemoryError(), "MemoryError"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
    (ImportError("libx.so: failed to map segment from shared object"), "libx.so"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes\nmore"), "12 bytes)"),
    (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
)


@pytest.mark.parametrize(("raised", "reason"), MEMORY_ERRORS)
def test_a_failed_allocation_is_the_users_matter(
    raised: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(session, "open_model", fail)
    line = bad(generate(tiny_model, "--prompt", "x"), capsys)
    assert line.startswith("error: not enough memory")
    assert reason in line


def test_a_limit_below_what_the_libraries_need_is_said() -> None:
    """There some of them abort, others end the process themselves."""
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (600_000_000, -1))\n"
        "from latentcore.cli.app import main\n"
        "sys.exit(main(['generate', '--prompt', 'x']))\n"
    )
    done = run_code(program)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr == (
        "error: not enough memory: the libraries alone need 750 MB of address space, this process "
        "is limited to 600 MB (ulimit -v)\n"
    )


def test_bandwidth_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from latentcore.engine import bandwidth
    from latentcore.ops import runtime

    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path / "new"))
    calls: list[float] = []

    def measure(seconds: float, most_bytes: int) -> float:
        calls.append(time.monotonic())
        return 5e9

    monkeypatch.setattr(runtime, "read_bandwidth", measure)
    assert bandwidth.machine_read_bandwidth() == bandwidth.machine_read_bandwidth() == 5e9
    assert len(calls) == 1
    (tmp_path / "new" / "bandwidth.json").write_text("rubbish")
    assert bandwidth.machine_read_bandwidth() == 5e9
    assert len(calls) == 2
