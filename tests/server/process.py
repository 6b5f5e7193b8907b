"""A server in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai


class ServerProcess:
    """A running `latentcore serve`."""

    def __init__(self, process: subprocess.Popen[str], key: str | None) -> None:
        self.process = process
        self.key = key
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(60) or not self.url:
            process.kill()
            raise AssertionError("the server did not start:\n" + "\n".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.search(r"on (http://[^\"\s]+)", line)
            if found and not self.url:
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.key or "none",
            max_retries=0,
            timeout=60,
            **options,  # type: ignore[arg-type]
        )

    def http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, or one of them where `name` has labels."""
        text = httpx2.get(f"{self.url}/metrics").text
        values = re.findall(
            rf"^latentcore:{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE
        )
        assert values, text
        return sum(map(float, values))

    def wait_idle(self) -> None:
        """Waits until nothing runs, waits or holds a block."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(500):
            if not any(self.metric(name) for name in names):
                return
            time.sleep(0.02)
        raise AssertionError("the server is not idle: " + str({n: self.metric(n) for n in names}))

    def stop(self, one: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(one)
        return self.process.wait(timeout)


@contextmanager
def serving(
    model: Path | None, *options: str, key: str | None = None, cache: Path, **env: str
) -> Iterator[ServerProcess]:
    """Starts a server on a free port and stops it at the end."""
    command = [sys.executable, "-m", "latentcore", "serve", *([str(model)] if model else [])]
    command += ["--port", "0", "--threads", "1", *options]
    if key is not None:
        command += ["--api-key", key]
    environment = {**os.environ, "LATENTCORE_CACHE": str(cache), **env}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield ServerProcess(process, key)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
