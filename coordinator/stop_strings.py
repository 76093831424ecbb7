"""Ends a text before a stop string, wherever the borders of the pieces fall.

The stop string that is complete first wins; of several that are complete at the same character, the longest. So the
result depends on the text alone, not on how it is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidRequestError

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024


class StopStrings:
    """Watches one text for stop strings. Text that may be the beginning of one is held back."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text; nothing follows it."""

    def push(self, text: str) -> str:
        """Return the text that is certain now: none of it belongs to a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return what is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def validate_stop_strings(stop_strings: Sequence[str]) -> None:
    """Raise InvalidRequestError for an empty stop string, and for too many or too long ones."""
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"a request may have at most {MAX_STOP_STRINGS} stop strings, not {len(stop_strings)}"
        )
    for stop in stop_strings:
        if not stop:
            raise InvalidRequestError("a stop string must not be empty")
        if len(stop) > MAX_STOP_STRING_LENGTH:
            raise InvalidRequestError(
                f"a stop string may have at most {MAX_STOP_STRING_LENGTH} characters, not {len(stop)}"
            )


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
