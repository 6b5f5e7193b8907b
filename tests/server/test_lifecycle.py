"""Starting, filling up, draining, dying, and starting again."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from latentcore.cli import app
from latentcore.envs import parse_bytes
from latentcore.errors import UserError
from latentcore.models.synthetic import benchmark_config, make_synthetic
from latentcore.server.run import listen
from tests.server.process import ServerProcess, serving

TEXT = "/v1/completions"
ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True}


def test_sigterm_lets_running_answers_finish(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, cache=tmp_path) as server, server.http() as http:
        text = b""
        body = {**ENDLESS, "max_tokens": 1500, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.iter_bytes()
            text += next(pieces)
            server.process.send_signal(signal.SIGTERM)
            for piece in pieces:
                text += piece
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in text
        assert b'"finish_reason": "length"' in text
        assert server.process.wait(30) == 0
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/health")


@pytest.mark.parametrize(
    ("option", "signals"),
    [("1", [signal.SIGTERM]), ("300", [signal.SIGINT, signal.SIGINT])],
    ids=["late", "hurried"],
)
def test_draining_does_not_wait_for_ever(
    option: str, signals: list[signal.Signals], tiny_model: Path, tmp_path: Path
) -> None:
    """Who is not finished in time, or at a second Ctrl-C, is told so, whole and streamed."""
    options = ("--drain-timeout", option, "--max-num-seqs", "1")
    with serving(tiny_model, *options, cache=tmp_path) as server, server.http() as http:
        whole: list[httpx2.Response] = []
        body = {**ENDLESS, "n": 100}
        waiting = threading.Thread(
            target=lambda: whole.append(httpx2.post(server.url + TEXT, json=body, timeout=60))
        )
        with http.stream("POST", TEXT, json={**body, "stream": True}) as response:
            events = response.iter_text()
            text = next(events)
            waiting.start()
            while not server.metric("num_requests_waiting"):
                time.sleep(0.01)
            for number in signals:
                server.process.send_signal(number)
                time.sleep(0.3)
            text += "".join(events)
        waiting.join()
        assert server.process.wait(30) == 0
    assert "the engine is shutting down" in text
    assert text.endswith("data: [DONE]\n\n")
    assert (whole[0].status_code, "retry-after" in whole[0].headers) == (503, True)
    assert [line for line in server.lines if "Traceback" in line] == []


def test_an_end_while_grammars_are_being_compiled(tiny_model: Path, tmp_path: Path) -> None:
    """The process that compiles, even one that is just starting, does not hold the server up."""
    options = ("--drain-timeout", "0")
    with serving(tiny_model, *options, cache=tmp_path) as server, server.http() as http:
        children = psutil.Process(server.process.pid).children()
        assert not children, "started before anybody asks for a grammar"
        body = {"prompt": "x", "structured_outputs": {"regex": "a+"}}
        asking = threading.Thread(target=lambda: http.post(TEXT, json=body))
        asking.start()
        while not children:
            children = psutil.Process(server.process.pid).children()
            time.sleep(0.01)
        assert server.stop() == 0
        asking.join()
        _, alive = psutil.wait_procs(children, 10)
        assert not alive


def test_requests_have_a_time_limit(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--request-timeout", "0.3")
    body = {**ENDLESS, "n": 64}
    with serving(tiny_model, *options, cache=tmp_path) as server, server.http() as http:
        late = http.post("/v1/completions", json=body)
        assert (late.status_code, late.json()["error"]["type"]) == (408, "timeout")
        server.wait_idle()
        events = http.post("/v1/completions", json={**body, "stream": True}).text
        assert '"type": "timeout"' in events
        server.wait_idle()


def test_killed_and_started_again(tiny_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with serving(tiny_model, cache=tmp_path) as server:
            assert httpx2.get(f"{server.url}/ready").status_code == 200
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.slow
def test_killed_mid_answer_it_starts_again_from_the_packed_weights(tmp_path: Path) -> None:
    """Large enough for its packed weights to be kept; a kill leaves them as they are.

    How long that takes is measured by `benchmarks/load.py --parts restart`.
    """
    config = {**benchmark_config(dense=2048, vocab=8000), "num_hidden_layers": 2}
    make_synthetic(tmp_path / "model", config, "w8a8_int8", 3)
    options = ("--max-model-len", "2048", "--max-num-seqs", "8")
    generator = random.Random(3)
    prompts = [[generator.randrange(8000) for _ in range(90)] for _ in range(8)]
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 2}

    def answers(server: ServerProcess) -> Any:
        with server.http() as http:
            response = http.post("/v1/completions", json={**body, "prompt": prompts})
        return response.raise_for_status().json()["choices"]

    with serving(tmp_path / "model", *options, cache=tmp_path / "cache") as server:
        first = answers(server)
        (pack,) = (tmp_path / "cache").glob("**/*.pack")
        written = pack.stat().st_ino, pack.stat().st_size
        with server.http() as http:
            endless = {**body, "prompt": prompts, "max_tokens": 1900, "stream": True}
            with http.stream("POST", "/v1/completions", json=endless) as response:
                next(response.iter_bytes())
                assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with serving(tmp_path / "model", *options, cache=tmp_path / "cache") as server:
        assert httpx2.get(f"{server.url}/ready").status_code == 200
        assert answers(server) == first
        (pack,) = (tmp_path / "cache").glob("**/*.pack")
        assert (pack.stat().st_ino, pack.stat().st_size) == written, "packed again"
        assert server.stop() == 0


DYING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from latentcore.engine.async_engine import AsyncEngine
from latentcore.server.app import ServerOptions
from latentcore.server.run import configure_logging, listen, serve
from tests.engine.fakes import make_loaded

engine = AsyncEngine.from_loaded(make_loaded())
if sys.argv[2] == "fail":
    engine.loaded.runner.fail_next = RuntimeError("bad luck")
schedule = engine._engine.scheduler.schedule
def die():
    if len(engine._engine.scheduler.waiting) and sys.argv[2] == "die":
        raise RuntimeError("the bookkeeping is broken")
    return schedule()
engine._engine.scheduler.schedule = die
configure_logging("info")
sys.exit(serve(engine, ServerOptions(("fake",)), listen("127.0.0.1", 0), drain_timeout=5))
"""


@pytest.mark.parametrize(("how", "code"), [("die", 3), ("fail", 0), ("live", 0)])
def test_a_dead_engine_ends_the_process_and_a_failed_step_does_not(how: str, code: int) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", DYING, str(root), how]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        server = ServerProcess(process, None)
        body = {"prompt": "x", "max_tokens": 3}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body)
        if how == "die":
            assert answer.status_code == 503
            assert httpx2.get(f"{server.url}/ready").status_code == 503
            assert httpx2.get(f"{server.url}/health").status_code == 200
        else:
            if how == "fail":
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "step_failed")
                server.wait_idle()
                answer = httpx2.post(f"{server.url}/v1/completions", json=body)
                assert httpx2.get(f"{server.url}/ready").status_code == 200
            assert answer.status_code == 200
            process.terminate()
        assert process.wait(30) == code


def test_a_config_file_and_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(
        'max-num-seqs = 3\nserved_model_name = ["named"]\nlog_requests = true\n'
        "max-model-len = 100\n"
    )
    with serving(
        tiny_model,
        "--config",
        str(config),
        "--max-request-bytes",
        "10kB",
        cache=tmp_path,
        LATENTCORE_API_KEY="from-env and-another",
        LATENTCORE_MAX_MODEL_LEN="200",
    ) as server:
        assert httpx2.get(f"{server.url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="from-env", max_retries=0)
        (model,) = client.models.list()
        assert (model.id, model.max_model_len) == ("named", 200)  # type: ignore[attr-defined]
        assert client.with_options(api_key="and-another").models.list()
        client.completions.create(model="named", prompt="find me in the log", max_tokens=1)
        for _ in range(100):
            if any("find me in the log" in line for line in server.lines):
                break
            time.sleep(0.02)
        else:
            raise AssertionError("--log-requests logged no prompt")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--port", "70000"], "--port"),
        (["--kv-cache-memory", "lots"], "--kv-cache-memory: expected a size"),
        (["--max-num-seqs", "0"], "max_num_seqs: expected"),
        (["--max-num-batched-tokens", "5"], "at least max_num_seqs"),
        (["--config", "/nowhere.toml"], "cannot be read"),
        (["--config", "BAD"], "'nonsense' is not an option of serve"),
        (["--config", "BROKEN"], "not a TOML file"),
        (["--port", "TAKEN"], "cannot listen on 127.0.0.1"),
        (["--host", "300.1.1.1"], "cannot listen on 300.1.1.1"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    match: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.toml").write_text("nonsense = 1")
    (tmp_path / "broken.toml").write_text("= 1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {
            "BAD": str(tmp_path / "bad.toml"),
            "BROKEN": str(tmp_path / "broken.toml"),
            "TAKEN": str(taken.getsockname()[1]),
        }
        filled = [names.get(argument, argument) for argument in arguments]
        assert app.main(["serve", str(tiny_model), "--threads", "1", *filled]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert match in line
    assert "Traceback" not in streams.err


def test_small_answers_leave_at_once() -> None:
    """With Nagle's algorithm, each on a kept connection would wait for the client's system."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        server = await asyncio.start_server(on_client, sock=listen("127.0.0.1", 0))
        async with server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return await asyncio.wait_for(found, 20)

    assert asyncio.run(accepted()) != 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("100", 100), ("16MiB", 16 << 20), ("1.5 GB", 1_500_000_000), ("2kib", 2048)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes("--x", text) == value


@pytest.mark.parametrize("text", ["", "-1", "x", "1XB", "nan", "inf", "0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--x: expected a size"):
        parse_bytes("--x", text)


def test_logs_are_json_lines(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, cache=tmp_path) as server, server.http() as http:
        http.post("/v1/completions", json={"prompt": "my secret words", "max_tokens": 1})
        assert server.stop() == 0
        time.sleep(0.1)
        start = next(i for i, line in enumerate(server.lines) if re.search("serving", line))
        parsed = [json.loads(line) for line in server.lines[start:]]
        assert all({"time", "level", "message"} <= set(line) for line in parsed)
        assert any(line.get("path") == "/v1/completions" for line in parsed)
        assert "my secret words" not in "\n".join(server.lines)
