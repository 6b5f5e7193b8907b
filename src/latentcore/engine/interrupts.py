"""^C where it may take effect, and nowhere else."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Entered around the whole; `held` around what must not be left half done.

    A step of an engine moves sequences and blocks between queues. An exception in the midst of
    that, which an interrupt may raise anywhere, would leave queues that contradict each other:
    blocks that nobody gives back, sequences that nobody runs. Where it is the other way round, and
    a few places alone may be left (a conversation: while it waits for a line, and while it
    answers), these are `allowed` within `held`. Python's code sees signals in the main thread
    alone; elsewhere, and where interrupts are ignored, this does nothing.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._within_held = False
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
        """An interrupt that comes within takes effect at the end. Not to be nested."""
        self._holding = self._within_held = True
        try:
            yield
        finally:
            self._within_held = self._holding = False
            self._take_waiting()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within `held`: one interrupt takes effect here, be it one that came before.

        The next is held again, wherever it comes: whoever catches the first is not interrupted.
        """
        try:
            self._holding = False
            self._take_waiting()
            yield
        finally:
            self._holding = self._within_held

    def _take_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._take(signal.SIGINT, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = True
        elif self._handler is not None:
            self._holding = self._within_held
            self._handler(number, frame)
