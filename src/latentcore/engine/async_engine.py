"""The engine for servers and other asyncio programs: a thread of its own, streams of outputs."""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from latentcore.config import EngineConfig
from latentcore.engine.engine import Engine, StepFailedError, StepStats
from latentcore.engine.loading import LoadedModel, Progress, load_model
from latentcore.engine.outputs import RequestOutput, StepOutputs
from latentcore.engine.request import PreparedRequest, Prompt, RequestPreparer
from latentcore.engine.sampling_params import SamplingParams
from latentcore.errors import LatentcoreError

logger = logging.getLogger("latentcore.engine")


class QueueFullError(LatentcoreError):
    """As many requests wait as may; try again later."""


class EngineDeadError(LatentcoreError):
    """The engine's thread ended on an error; only a new process helps."""


class EngineClosedError(LatentcoreError):
    """The engine is shut down, or shutting down and taking nothing new."""


class _Stream:
    """One request's outputs on their way to the coroutine that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's state at this moment, for metrics. Counters only ever grow."""

    num_running: int
    num_waiting: int
    cache_usage: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    num_preemptions: int


StepObserver = Callable[[StepStats, StepOutputs], None]
"""Called on the engine's thread after every step; must be quick."""


class AsyncEngine:
    """Runs a model on a thread of its own; any event loop may submit and stream requests."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine_config: EngineConfig | None = None,
        max_waiting: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Loads `model` (see `LLM`) and starts the thread.

        max_waiting: requests that may wait while as many run as can; None is no limit.
        """
        self._start(load_model(model, engine_config or EngineConfig(), progress), max_waiting)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, *, max_waiting: int | None = None) -> "AsyncEngine":
        """Runs a model that is loaded already, and owns it from then on."""
        self = cls.__new__(cls)
        self._start(loaded, max_waiting)
        return self

    def _start(self, loaded: LoadedModel, max_waiting: int | None) -> None:
        self.loaded = loaded
        self._engine: Engine
        self.preparer: RequestPreparer
        self._engine, self.preparer = loaded.engine()
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._submitted = 0
        self._taken = 0
        self._streams: dict[str, _Stream] = {}
        self._observer: StepObserver | None = None
        self._death: BaseException | None = None
        self._draining = False
        self._closed = False
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="latentcore-engine", daemon=True)
        self._thread.start()

    # -- for callers -------------------------------------------------------------------------------

    @property
    def dead(self) -> BaseException | None:
        """What the engine's thread ended on, None while it is well."""
        return self._death

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken."""
        return self._death is None and not self._draining and not self._closed

    @property
    def num_unfinished(self) -> int:
        """Requests that are submitted and not finished."""
        return len(self._streams)

    def observe(self, observer: StepObserver) -> None:
        """Sets the function that is told of every step."""
        self._observer = observer

    def snapshot(self) -> EngineSnapshot:
        scheduler = self._engine.scheduler
        return EngineSnapshot(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self._submitted - self._taken,
            cache_usage=scheduler.blocks.usage,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
        )

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Streams a request's outputs; leaving the iterator early frees its blocks within a step.

        Raises RequestError, QueueFullError, EngineClosedError, EngineDeadError or, where the
        request's own step fails, StepFailedError.
        """
        prepared = await asyncio.to_thread(self.preparer.prepare, prompt, sampling_params)
        stream = self.submit(prepared, request_id, priority=priority)
        async with contextlib.aclosing(stream):
            async for output in stream:
                yield output

    def submit(
        self, prepared: PreparedRequest, request_id: str | None = None, *, priority: int = 0
    ) -> "OutputStream":
        """Queues a prepared request at once and returns its stream. Call it in an event loop."""
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        with self._lock:
            self._check_accepting()
            self._check_room()
            if request_id in self._streams:
                raise LatentcoreError(f"request id {request_id!r} is in use")
            stream = _Stream(asyncio.get_running_loop())
            self._streams[request_id] = stream
            self._submitted += 1
            self._inbox.put(lambda: self._take(request_id, prepared, priority))
        return OutputStream(self, request_id, stream)

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its stream gets nothing more."""
        with self._lock:  # a request that takes over the id must come after this in the inbox
            if self._streams.pop(request_id, None) is not None:
                self._inbox.put(lambda: self._engine.abort(request_id))

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits for what runs; False where the time did not suffice."""
        self._draining = True
        deadline = time.monotonic() + timeout
        while self._streams and self._death is None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def end_unfinished(self) -> int:
        """Takes nothing new and ends what runs: its streams raise EngineClosedError.

        Returns how many requests that were.
        """
        with self._lock:
            self._draining = True
            unfinished = list(self._streams)
            for request_id in unfinished:
                self._inbox.put(functools.partial(self._engine.abort, request_id))
        self._fail_all(EngineClosedError("the engine is shutting down"))
        return len(unfinished)

    def close(self) -> None:
        """Stops the thread after its current step and gives the model back. Safe to repeat."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._inbox.put(None)
        self._thread.join()
        self._fail_all(EngineClosedError("the engine was shut down"))

    # -- on the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._handle_inbox():
                if self._engine.has_unfinished or self._engine.has_aborted:
                    step = self._engine.step()
                    self._deliver(step)
                    if self._observer is not None:
                        self._observer(self._engine.last_step, step)
        except BaseException as error:
            logger.exception("the engine died")
            self._death = error
            self._fail_all(EngineDeadError(f"the engine died: {error}"))
        finally:
            try:
                self._engine.close()
            except BaseException:
                logger.exception("closing the engine failed")

    def _handle_inbox(self) -> bool:
        """Runs what callers sent, waiting for something if there is no work; False to stop."""
        wait = not self._engine.has_unfinished
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _take(self, request_id: str, prepared: PreparedRequest, priority: int) -> None:
        self._taken += 1
        if request_id not in self._streams:
            return
        try:
            self._engine.add_request(request_id, prepared, priority=priority)
        except Exception as error:
            logger.exception("a request could not be taken in")
            failure = StepFailedError(f"the engine failed while it took this request in: {error}")
            failure.__cause__ = error
            self._deliver(StepOutputs(failures={request_id: failure}))

    def _deliver(self, step: StepOutputs) -> None:
        by_loop: dict[
            asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | BaseException]]
        ] = {}
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
                if output.finished:
                    self._streams.pop(output.request_id, None)
        for request_id, failure in step.failures.items():
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, failure))
        for loop, items in by_loop.items():
            _send(loop, items)

    # -- inside ------------------------------------------------------------------------------------

    def _check_accepting(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine died: {self._death}")
        if self._draining or self._closed:
            raise EngineClosedError("the engine is shutting down")

    def _check_room(self) -> None:
        if self._max_waiting is None:
            return
        snapshot = self.snapshot()
        places = self._engine.max_num_seqs - snapshot.num_running
        waiting = snapshot.num_waiting - max(places, 0)
        if waiting >= self._max_waiting:
            raise QueueFullError(
                f"{snapshot.num_running} requests are running and {snapshot.num_waiting} waiting, "
                f"at most {self._max_waiting} may wait; try again later"
            )

    def _fail_all(self, error: BaseException) -> None:
        while self._streams:
            with contextlib.suppress(KeyError):
                _, stream = self._streams.popitem()
                _send(stream.loop, [(stream, error)])


class OutputStream:
    """The outputs of one request as they come; an asynchronous iterator.

    `aclose`, or the end of `async with contextlib.aclosing(stream)`, aborts what is unfinished.
    """

    def __init__(self, engine: AsyncEngine, request_id: str, stream: _Stream) -> None:
        self.request_id = request_id
        self._engine = engine
        self._stream = stream
        self._done = False

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        try:
            item = await self._stream.items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, BaseException):
            self._done = True
            raise item
        if item.finished:
            self._done = True
        return item

    async def aclose(self) -> None:
        """Aborts the request if it is unfinished. Safe to repeat."""
        if not self._done:
            self._done = True
            self._engine.abort(self.request_id)


def _send(
    loop: asyncio.AbstractEventLoop,
    items: list[tuple[_Stream, RequestOutput | BaseException]],
) -> None:
    # A loop that was closed has nobody waiting any more.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[_Stream, RequestOutput | BaseException]]) -> None:
    for stream, item in items:
        stream.items.put_nowait(item)
