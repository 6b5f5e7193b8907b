"""The `latentcore` command, which is `python -m latentcore` too.

An interrupt becomes a KeyboardInterrupt, which leaves things in order, only while the program
itself runs. While modules are imported there is nothing to put in order, and some libraries turn
the exception into another one; while Python shuts down it would show as a traceback. There the
process ends at once.
"""

import os
import signal
import sys
from types import FrameType

from latentcore.cli.interrupted import EXIT_INTERRUPTED, say_interrupted


def program() -> None:
    """The entry point of the installed command."""
    running = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        if running and not _imports(frame):
            raise KeyboardInterrupt
        try:
            say_interrupted()
        finally:  # which fails where stderr is closed
            os._exit(EXIT_INTERRUPTED)

    # Where it is ignored (a shell's background jobs) it stays so.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, interrupt)
    from latentcore.cli.app import main

    try:
        running = True
        code = main()
        running = False
    except KeyboardInterrupt:  # as `main` began, or while it ended
        running = False
        say_interrupted()
        code = EXIT_INTERRUPTED
    if heeded:
        signal.signal(signal.SIGINT, interrupt)  # an event loop resets it
    sys.exit(code)


def _imports(frame: FrameType | None) -> bool:
    """Whether this frame runs within an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    program()
