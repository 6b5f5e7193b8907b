"""What an interrupted program says and returns. Imports next to nothing: it is needed first."""

import sys

EXIT_INTERRUPTED = 130


def say_interrupted() -> None:
    """One line on stderr; on a terminal, under the ^C that stands there."""
    stream = sys.stderr
    if stream is not None:
        stream.write("\ninterrupted\n" if stream.isatty() else "interrupted\n")
        stream.flush()
