"""Stop strings: where an answer ends, without ever showing a part of what ends it."""

from collections.abc import Sequence


class StopStringFilter:
    """Lets text through as it comes, but for what may turn out to be the start of a stop string.

    The stop string that is complete first ends the text, the longer one of two that end at the
    same place; how the text was cut into pieces makes no difference.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool) -> None:
        self._stops = tuple(stop_strings)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Adds text; returns what may be shown, and the stop string that ended the text or None."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, stop = best
            self._held = ""
            return buffer[: end if self._include_stop else start], stop
        kept = self._suspicious(buffer)
        self._held = buffer[len(buffer) - kept :]
        return buffer[: len(buffer) - kept], None

    def flush(self) -> str:
        """What was held back, once it is certain that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _suspicious(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that a stop string starts with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
