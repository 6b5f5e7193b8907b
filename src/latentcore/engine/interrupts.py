"""^C between the steps of an engine, not within them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Entered around the use of an engine; `held` around what must not be left half done.

    A step moves sequences and blocks between queues. An exception in the midst of that, which an
    interrupt may raise anywhere, would leave queues that contradict each other: blocks that nobody
    gives back, sequences that nobody runs. Python's code sees signals in the main thread alone;
    elsewhere, and where interrupts are ignored, this does nothing.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._holding = False
        self._waiting = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            with self.held():
                signal.signal(signal.SIGINT, self._handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """An interrupt that comes within takes effect at the end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._waiting:
                self._waiting = False
                self._take(signal.SIGINT, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = True
        elif self._handler is not None:
            self._handler(number, frame)
