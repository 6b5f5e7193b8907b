"""A process that compiles grammars, so that a bad one can take no other request down with it.

Compilers of schemas and expressions that strangers send may run for minutes, eat memory or crash.
Here that costs the one request: the process has limits of time and memory, and is started again.

Frames on its pipes are a length (4 bytes, little-endian) and that much JSON. The first one it
sends says that it is ready. The first one it is sent after that, and any later one with
"tokenizer", makes the tokenizer known under a number; every other one is a grammar to compile.
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

from latentcore.errors import RequestError

if TYPE_CHECKING:
    import xgrammar

START_SECONDS = 120.0
COMPILE_SECONDS = 10.0
"""Longest time that a grammar may take to compile."""

MAX_COMPILED_BYTES = 64 << 20
_MEMORY_BYTES = 4 << 30
_CACHE_BYTES = 64 << 20

Frame = dict[str, Any]


class GrammarWorker:
    """The process, seen from outside. Safe to use from several threads, which take turns."""

    def __init__(self, *, compile_seconds: float = COMPILE_SECONDS) -> None:
        self._compile_seconds = compile_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._known: set[int] = set()

    def start(self) -> None:
        """Starts the process if there is none, and does not wait until it is ready."""
        # Where it cannot be started, `compile` says so.
        with self._lock, contextlib.suppress(OSError):
            self._started()

    def compile(self, tokenizer: int, tokenizer_info: str, request: Frame) -> str:
        """Compiles a grammar; returns it as xgrammar's JSON text.

        `tokenizer` is a number that stands for `tokenizer_info` for as long as this process
        runs. Raises RequestError where the grammar cannot be compiled within the limits.
        """
        with self._lock:
            try:
                process = self._started()
                if not self._ready:
                    self._receive(process, START_SECONDS)
                    self._ready = True
                if tokenizer not in self._known:
                    self._send(process, {"tokenizer": tokenizer, "info": tokenizer_info})
                    self._known.add(tokenizer)
                self._send(process, {"use": tokenizer, **request})
                reply = self._receive(process, self._compile_seconds)
            except TimeoutError:
                self._stop()
                raise RequestError(
                    "structured_outputs: the grammar cannot be compiled (it takes longer than "
                    f"{self._compile_seconds:g} s)"
                ) from None
            except (EOFError, OSError):
                self._stop()
                raise RequestError(
                    "structured_outputs: the grammar cannot be compiled (the compiler crashed "
                    "over it or ran out of memory)"
                ) from None
            except BaseException:
                self._stop()
                raise
        if "error" in reply:
            raise RequestError(
                f"structured_outputs: the grammar cannot be compiled ({reply['error']})"
            )
        return str(reply["grammar"])

    def close(self) -> None:
        """Ends the process, whatever it does; the next grammar starts another."""
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it, with the lock, finds its pipe closed
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latentcore.engine.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Signals from the terminal are for the server, which then ends this process.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._ready = False
        self._known.clear()
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # What the pipe still holds has no reader any more.
                with contextlib.suppress(OSError, ValueError):
                    assert pipe is not None
                    pipe.close()

    @staticmethod
    def _send(process: subprocess.Popen[bytes], frame: Frame) -> None:
        assert process.stdin is not None
        _write(process.stdin, frame)

    @staticmethod
    def _receive(process: subprocess.Popen[bytes], seconds: float) -> Frame:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        deadline = time.monotonic() + seconds
        data = b""
        length: int | None = None
        while length is None or len(data) < length:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                raise EOFError
            data += piece
            if length is None and len(data) >= 4:
                length = 4 + struct.unpack("<I", data[:4])[0]
        found: Frame = json.loads(data[4:])
        return found


def _write(pipe: IO[bytes], frame: Frame) -> None:
    data = json.dumps(frame).encode()
    pipe.write(struct.pack("<I", len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Frame | None:
    head = pipe.read(4)
    if len(head) < 4:
        return None
    found: Frame = json.loads(pipe.read(struct.unpack("<I", head)[0]))
    return found


def main() -> None:
    """The process: reads frames from standard input until it ends."""
    inbox = sys.stdin.buffer
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import xgrammar

    _limit_memory()
    compilers: dict[int, tuple[xgrammar.GrammarCompiler, int]] = {}
    _write(outbox, {"ready": True})
    while (frame := _read(inbox)) is not None:
        if "tokenizer" in frame:
            info = xgrammar.TokenizerInfo.deserialize_json(frame["info"])
            compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
            compilers[frame["tokenizer"]] = (compiler, info.vocab_size)
            continue
        # Whoever waits gives up before this; without anybody waiting, nothing runs on for ever.
        signal.alarm(round(3 * COMPILE_SECONDS))
        try:
            reply = {"grammar": _compile(*compilers[frame["use"]], frame).serialize_json()}
        except (RuntimeError, ValueError, RecursionError, TypeError, MemoryError) as error:
            reply = {"error": _reason(error)}
        signal.alarm(0)
        _write(outbox, reply)


def _compile(
    compiler: "xgrammar.GrammarCompiler", vocab_size: int, frame: Frame
) -> "xgrammar.CompiledGrammar":
    import xgrammar

    kind, text = frame["kind"], frame["text"]
    if kind == "json":
        compiled = compiler.compile_json_schema(text, any_whitespace=False)
    elif kind == "regex":
        compiled = compiler.compile_regex(text)
    elif kind == "ebnf":
        compiled = compiler.compile_grammar(text)
    else:
        assert kind == "tool_calls"
        compiled = compiler.compile_grammar(_tool_calls(text))
    if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
        raise ValueError(f"compiled it takes more than {MAX_COMPILED_BYTES >> 20} MiB")
    mask = xgrammar.allocate_token_bitmask(1, vocab_size)
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask, 0)
    if not mask.any():
        raise ValueError("nothing satisfies it")
    return compiled


def _tool_calls(text: Frame) -> "xgrammar.Grammar":
    """Calls, each one of `options`, with `separator` between them, and `end` after them or not."""
    from xgrammar import Grammar

    tags = [
        {
            "type": "tag",
            "begin": option["before"],
            "content": {
                "type": "grammar",
                "grammar": str(Grammar.from_json_schema(option["schema"], any_whitespace=False)),
            },
            "end": option["after"],
        }
        for option in text["options"]
    ]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": text["separator"] or "",
        "at_least_one": True,
        "stop_after_first": text["separator"] is None,
    }
    end = {"type": "optional", "content": {"type": "const_string", "value": text["end"]}}
    whole = {"type": "sequence", "elements": [calls, end]}
    return Grammar.from_structural_tag(json.dumps({"type": "structural_tag", "format": whole}))


def quoted(text: str) -> str:
    """A string literal of xgrammar's EBNF."""
    escaped = "".join(
        character
        if character.isascii() and character.isprintable() and character not in '"\\'
        else f"\\U{ord(character):08x}"
        for character in text
    )
    return f'"{escaped}"'


def _reason(error: Exception) -> str:
    """xgrammar's message without the place in its own sources, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", text)[:300]


def _limit_memory() -> None:
    """Lets this process have so much more memory than it has now."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = size + _MEMORY_BYTES
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
