"""The engine on a thread of its own: streams, cancellation, limits, failures, shutdown."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from latentcore.engine.async_engine import (
    AsyncEngine,
    EngineClosedError,
    EngineDeadError,
    QueueFullError,
)
from latentcore.engine.engine import Engine, StepFailedError, StepStats
from latentcore.engine.outputs import RequestOutput, StepOutputs
from latentcore.engine.sampling_params import RequestOutputKind, SamplingParams
from latentcore.errors import RequestError
from tests.engine.fakes import FakeRunner, make_engine, make_loaded
from tests.engine.test_engine import answers, random_work

PARAMS = SamplingParams(seed=1, max_tokens=6, ignore_eos=True)


class SlowRunner(FakeRunner):
    """Steps that take as long as the test says."""

    def __init__(self, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def forward(self, chunks: Any) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(10)
        return super().forward(chunks)


@asynccontextmanager
async def engine_on(runner: FakeRunner, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine.from_loaded(make_loaded(runner, max_num_seqs=2), **options)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    outputs = [output async for output in stream]
    assert [output.finished for output in outputs].index(True) == len(outputs) - 1
    return outputs[-1]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(limited())


def test_many_streams_at_once_give_what_each_gives_alone() -> None:
    work = random_work(5, 20)

    async def test() -> None:
        runner = FakeRunner(num_blocks=12)
        engine = AsyncEngine.from_loaded(make_loaded(runner, enable_prefix_caching=False))
        try:
            outputs = await asyncio.gather(
                *(last(engine.generate(prompt, params)) for prompt, params in work)
            )
        finally:
            await asyncio.to_thread(engine.close)
        assert runner.closed
        for output, (prompt, params) in zip(outputs, work, strict=True):
            alone, preparer = make_engine(enable_prefix_caching=False)
            alone.add_request("x", preparer.prepare(prompt, params))
            while alone.has_unfinished:
                (*_, expected) = alone.step().outputs or [None]
            assert expected is not None
            assert answers(output) == answers(expected)

    run(test)


def test_outputs_come_as_they_are_made() -> None:
    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            delta = PARAMS.replace(output_kind=RequestOutputKind.DELTA)
            counts = [
                len(output.outputs[0].token_ids) async for output in engine.generate("a", delta)
            ]
            assert counts == [1] * 6

    run(test)


def test_leaving_a_stream_frees_its_blocks_within_a_step() -> None:
    async def test() -> None:
        runner = SlowRunner()
        async with engine_on(runner) as engine:
            endless = PARAMS.replace(max_tokens=900)
            stream = engine.submit(engine.preparer.prepare("a" * 100, endless))
            await anext(stream)
            runner.gate.clear()
            runner.entered.clear()
            await asyncio.to_thread(runner.entered.wait)
            steps = len(runner.steps)
            await stream.aclose()
            runner.gate.set()
            await until(lambda: engine.snapshot().num_running == 0)
            assert engine.snapshot().cache_usage == 0
            assert len(runner.steps) <= steps + 1
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test)


def test_cancelling_the_task_aborts_the_request() -> None:
    async def test() -> None:
        runner = FakeRunner()
        async with engine_on(runner) as engine:
            endless = PARAMS.replace(max_tokens=900)
            task = asyncio.create_task(last(engine.generate("a", endless)))
            await until(lambda: engine.snapshot().num_running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: engine.snapshot().num_running == 0)
            assert engine.num_unfinished == 0

    run(test)


def test_clients_that_come_and_go_leave_nothing_behind() -> None:
    work = random_work(9, 60)
    generator = random.Random(1)
    patience = [generator.choice([None, 1, 3, 10]) for _ in work]

    async def visit(engine: AsyncEngine, number: int) -> RequestOutput | None:
        prompt, params = work[number]
        await asyncio.sleep(number * 0.002)
        seen = 0
        stream = engine.generate(prompt, params)
        try:
            async for output in stream:
                seen += 1
                if output.finished:
                    return output
                if patience[number] == seen:
                    return None
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        return None

    async def test() -> None:
        runner = FakeRunner(num_blocks=10)
        engine = AsyncEngine.from_loaded(make_loaded(runner, enable_prefix_caching=False))
        outputs = await asyncio.gather(*(visit(engine, number) for number in range(len(work))))
        await until(lambda: engine.snapshot().num_running == engine.snapshot().num_waiting == 0)
        assert engine.snapshot().cache_usage == 0
        finished = 0
        for output, (prompt, params) in zip(outputs, work, strict=True):
            if output is None:
                continue
            finished += 1
            alone, preparer = make_engine(enable_prefix_caching=False)
            alone.add_request("x", preparer.prepare(prompt, params))
            while alone.has_unfinished:
                (*_, expected) = alone.step().outputs or [None]
            assert expected is not None
            assert answers(output) == answers(expected)
        assert finished > 10
        await asyncio.to_thread(engine.close)

    run(test)


def test_bad_requests_are_refused_before_they_queue() -> None:
    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            with pytest.raises(RequestError, match="max_model_len is 1024"):
                await last(engine.generate("a" * 2000, PARAMS))
            assert engine.num_unfinished == 0

    run(test)


def test_a_full_queue_refuses_at_once() -> None:
    async def test() -> None:
        runner = SlowRunner()
        runner.gate.clear()
        async with engine_on(runner, max_waiting=3) as engine:
            prepared = engine.preparer.prepare("a", PARAMS)
            streams = [engine.submit(prepared) for _ in range(5)]
            with pytest.raises(QueueFullError, match="at most 3 may wait"):
                engine.submit(prepared)
            runner.gate.set()
            for stream in streams:
                await last(stream)
            await last(engine.submit(prepared))

    run(test)


def test_a_failing_step_fails_its_requests_only() -> None:
    async def test() -> None:
        runner = SlowRunner()
        async with engine_on(runner) as engine:
            prepared = engine.preparer.prepare("a", PARAMS)
            runner.gate.clear()
            runner.fail_next = RuntimeError("bad luck")
            doomed = engine.submit(prepared)
            await asyncio.to_thread(runner.entered.wait)
            fine = engine.submit(prepared)
            runner.gate.set()
            with pytest.raises(StepFailedError, match="bad luck"):
                await last(doomed)
            await last(fine)
            assert engine.dead is None

    run(test)


def test_a_request_that_cannot_be_taken_in_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    add_request = Engine.add_request

    def failing(engine: Engine, request_id: str, *args: Any, **options: Any) -> None:
        if request_id == "doomed":
            raise ValueError("bad luck")
        add_request(engine, request_id, *args, **options)

    monkeypatch.setattr(Engine, "add_request", failing)

    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            with pytest.raises(StepFailedError, match="took this request in: bad luck"):
                await last(engine.generate("a", PARAMS, "doomed"))
            await last(engine.generate("a", PARAMS))
            assert engine.dead is None
            assert engine.num_unfinished == 0

    run(test)


def test_observers_are_told_of_every_request_that_ends() -> None:
    """What they keep of a request can be dropped, however it ends."""

    async def test() -> None:
        runner = SlowRunner()
        known: set[str] = set()

        def observer(stats: StepStats, step: StepOutputs) -> None:
            known.update(output.request_id for output in step.outputs)
            ended = {output.request_id for output in step.outputs if output.finished}
            known.difference_update(ended, step.failures, step.aborted)

        async with engine_on(runner) as engine:
            engine.observe(observer)
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            stream = engine.generate("a", params, "gone")
            async for _ in stream:
                break
            while not known:  # its first output is delivered before the observer is told
                await asyncio.sleep(0.001)
            assert known == {"gone"}
            await stream.aclose()  # type: ignore[attr-defined]
            await last(engine.generate("a", PARAMS, "served"))
            await until(lambda: not known)

    run(test)


def test_a_dead_engine_tells_everyone() -> None:
    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            engine.observe(_die)
            with pytest.raises(EngineDeadError, match="the observer broke"):
                await last(engine.generate("a", PARAMS))
            await until(lambda: engine.dead is not None)
            assert not engine.accepting
            with pytest.raises(EngineDeadError):
                await last(engine.generate("a", PARAMS))

    run(test)


def _die(*_: object) -> None:
    raise RuntimeError("the observer broke")


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async def test() -> None:
        runner = SlowRunner()
        async with engine_on(runner) as engine:
            stream = engine.submit(engine.preparer.prepare("a", PARAMS))
            runner.gate.clear()
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0.02)
            assert not engine.accepting
            with pytest.raises(EngineClosedError):
                engine.submit(engine.preparer.prepare("a", PARAMS))
            runner.gate.set()
            await last(stream)
            assert await draining

    run(test)


def test_draining_gives_up_in_time() -> None:
    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            stream = engine.submit(engine.preparer.prepare("a", PARAMS.replace(max_tokens=1000)))
            assert not await engine.drain(0.0)
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineClosedError):
                await last(stream)

    run(test)


def test_an_idle_engine_uses_no_processor_time() -> None:
    async def test() -> None:
        async with engine_on(FakeRunner()) as engine:
            await last(engine.generate("a", PARAMS))
            before = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - before < 0.05

    run(test)


def test_a_request_id_in_use_is_refused() -> None:
    async def test() -> None:
        runner = SlowRunner()
        runner.gate.clear()
        async with engine_on(runner) as engine:
            prepared = engine.preparer.prepare("a", PARAMS)
            stream = engine.submit(prepared, "mine")
            with pytest.raises(Exception, match="'mine' is in use"):
                engine.submit(prepared, "mine")
            runner.gate.set()
            await last(stream)

    run(test)
