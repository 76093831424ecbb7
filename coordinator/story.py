"""What happened lately, for the message of an InvariantError. Covers remembering and telling, nothing else."""

from __future__ import annotations

from collections import deque

from cluster.errors import InvariantError
from cluster.request import SequenceId

NUM_REMEMBERED = 200


class Story:
    """The latest events, and which sequence each of them was about (None: the whole pipeline)."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, SequenceId | None, str]] = deque(maxlen=NUM_REMEMBERED)

    def note(self, now: float, text: str, sequence_id: SequenceId | None = None) -> None:
        """Remember what happened."""
        self._entries.append((now, sequence_id, text))

    def error(self, message: str, sequence_id: SequenceId | None = None) -> InvariantError:
        """Return the error to raise: the message, and what concerned the sequence and the pipeline before."""
        lines = [f"  {now:.6f} {text}" for now, about, text in self._entries if about in (None, sequence_id)]
        return InvariantError("\n".join([message, "what happened before:", *lines[-20:]]))
