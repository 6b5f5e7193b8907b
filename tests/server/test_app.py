"""The application in this process, over a fake model whose steps wait for the test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from latentcore.engine.async_engine import AsyncEngine
from latentcore.server.app import ServerOptions, create_app
from tests.engine.fakes import FakeRunner, make_loaded
from tests.engine.test_async_engine import SlowRunner, until
from tests.server.template import CHAT_TEMPLATE

BODY = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}


@asynccontextmanager
async def serving(
    runner: FakeRunner, *, max_waiting: int | None = None, **options: Any
) -> AsyncIterator[tuple[AsyncEngine, httpx2.AsyncClient]]:
    loaded = make_loaded(runner, template=CHAT_TEMPLATE, max_num_seqs=1)
    engine = AsyncEngine.from_loaded(loaded, max_waiting=max_waiting)
    app = create_app(engine, ServerOptions(("fake",), **options))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        try:
            yield engine, client
        finally:
            await asyncio.to_thread(engine.close)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(limited())


def test_a_full_queue_is_429_with_retry_after() -> None:
    async def test() -> None:
        runner = SlowRunner()
        runner.gate.clear()
        async with serving(runner, max_waiting=1) as (engine, client):
            running = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(runner.entered.is_set)
            waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: engine.snapshot().num_waiting == 1)
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            several = await client.post("/v1/completions", json={**BODY, "prompt": ["a", "b"]})
            assert several.status_code == 429
            runner.gate.set()
            assert (await running).status_code == (await waiting).status_code == 200
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    run(test)


def test_a_failing_step_is_500_for_its_requests_only() -> None:
    async def test() -> None:
        runner = FakeRunner()
        async with serving(runner) as (engine, client):
            runner.fail_next = RuntimeError("bad luck")
            lost = await client.post("/v1/completions", json=BODY)
            assert (lost.status_code, lost.json()["error"]["code"]) == (500, "step_failed")
            runner.fail_next = RuntimeError("bad luck")
            events = (await client.post("/v1/completions", json={**BODY, "stream": True})).text
            assert '"step_failed"' in events
            assert events.endswith("data: [DONE]\n\n")
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            assert engine.dead is None
            metrics = (await client.get("/metrics")).text
            assert 'latentcore:request_failure_total{engine="0",model_name="fake"} 2.0' in metrics

    run(test)


def test_shutting_down_is_503() -> None:
    async def test() -> None:
        async with serving(FakeRunner()) as (engine, client):
            assert (await client.get("/ready")).status_code == 200
            assert await engine.drain(1)
            assert (await client.get("/ready")).status_code == 503
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers

    run(test)


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    async def test() -> None:
        engine = AsyncEngine.from_loaded(make_loaded(tokenizer=None, template=None))
        app = create_app(engine, ServerOptions(("fake",)))
        transport = httpx2.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {**BODY, "prompt": [1, 2, 3], "logprobs": 1, "echo": True}
            found = (await client.post("/v1/completions", json=body)).json()
            assert found["choices"][0]["logprobs"]["tokens"][:3] == [
                "token_id:1",
                "token_id:2",
                "token_id:3",
            ]
            assert (await client.post("/v1/completions", json=BODY)).status_code == 400
            chat = {"messages": [{"role": "user", "content": "Hi"}]}
            refused = await client.post("/v1/chat/completions", json=chat)
            assert refused.status_code == 400
            assert "no chat template" in refused.json()["error"]["message"]
        await asyncio.to_thread(engine.close)

    run(test)
