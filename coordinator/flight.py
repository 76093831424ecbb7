"""The steps in flight, as the shell sees them: when each was sent, how far it is, whether it is overdue.

Pure: time comes in as an argument. What a step contains is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.microbatch import StepId, StepProgress, StepResult
from cluster.span import Span


@dataclass(slots=True)
class Flight:
    """One step under way."""

    step_id: StepId
    sent: float  # seconds
    blocks_done: int = 0  # of the whole model


class FlightLog:
    """Steps in the order in which they were sent, which is that in which they finish."""

    def __init__(self, spans: Sequence[Span], timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._spans = tuple(spans)
        self._flights: dict[StepId, Flight] = {}
        self._moved = 0.0  # when any of them last passed a block or finished

    def __len__(self) -> int:
        return len(self._flights)

    def note_sent(self, step_id: StepId, now: float) -> None:
        """A step left for stage 0."""
        self._flights[step_id] = Flight(step_id, now)

    def note_progress(self, progress: StepProgress, now: float) -> None:
        """A stage told how many of its blocks a step has passed."""
        flight = self._flights.get(progress.step_id)
        blocks_done = self._spans[progress.stage].start + progress.blocks_done
        if flight is not None and blocks_done > flight.blocks_done:
            flight.blocks_done, self._moved = blocks_done, now

    def note_finished(self, result: StepResult, now: float) -> None:
        """The last stage reported."""
        self._flights.pop(result.step_id, None)
        self._moved = now

    def clear(self) -> None:
        """Their epoch was given up."""
        self._flights.clear()

    def overdue(self, now: float) -> Flight | None:
        """Return the oldest step if for longer than the timeout it has not passed a block, nor waited for a step before
        it that did: a pass over many blocks on a slow disk may take its time."""
        oldest = next(iter(self._flights.values()), None)
        if oldest is None:
            return None
        return oldest if now - max(oldest.sent, self._moved) > self.timeout_seconds else None

    def blocks_done(self, step_id: StepId | None) -> tuple[int, int]:
        """Return (blocks passed, all blocks) of a step; zero blocks when it is not in flight."""
        flight = self._flights.get(step_id) if step_id is not None else None
        return (flight.blocks_done if flight else 0), self._spans[-1].end
