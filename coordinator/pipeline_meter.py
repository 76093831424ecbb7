"""What each stage did with its time: busy, bubble, bytes received and read, and the hop from the stage before.

Pure: it reads only the timings that completed steps bring back. Covers totals since the epoch opened, of which a reader
takes differences; `coordinator.meters` has rates over the last seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from cluster.microbatch import StageTiming

NUM_RECENT_HOPS = 256


@dataclass(slots=True)
class StageTotals:
    """One stage since the epoch opened."""

    num_steps: int = 0
    busy_ns: int = 0
    bubble_ns: int = 0
    received_bytes: int = 0
    read_bytes: int = 0  # of weights, from disk
    stall_ns: int = 0  # that the stage waited for them
    resident_bytes: int = 0  # of weights, when the last step ended
    last_finished_ns: int = 0
    recent_hops_ns: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_HOPS))

    @property
    def hop_seconds(self) -> float | None:
        """Median time from the finish of the stage before to the start of this one, where this one was idle."""
        return median(self.recent_hops_ns) / 1e9 if self.recent_hops_ns else None


class PipelineMeter:
    """Totals of every stage. A hop is measured only between stages of one node, whose clocks can be compared."""

    def __init__(self, node_names: Sequence[str]) -> None:
        self.stages = [StageTotals() for _ in node_names]
        self._has_same_clock = [False] + [a == b for a, b in pairwise(node_names)]
        self._is_resting = True

    def rest(self) -> None:
        """There is nothing left to do: the time until the next step is no bubble."""
        self._is_resting = True

    def count(self, timings: Sequence[StageTiming]) -> None:
        """Count a completed step. Steps come in step order, their timings in stage order."""
        finished_before: int | None = None
        for timing in timings:
            self._count_stage(timing, finished_before)
            finished_before = timing.finished_ns
        self._is_resting = False

    def _count_stage(self, timing: StageTiming, finished_before: int | None) -> None:
        totals = self.stages[timing.stage]
        if finished_before is not None and self._was_idle(timing.stage, finished_before):
            totals.recent_hops_ns.append(timing.started_ns - finished_before)
        if totals.num_steps and not self._is_resting:
            totals.bubble_ns += timing.started_ns - totals.last_finished_ns
        totals.num_steps += 1
        totals.busy_ns += timing.finished_ns - timing.started_ns
        totals.received_bytes += timing.received_bytes
        totals.read_bytes += timing.read_bytes
        totals.stall_ns += timing.stall_ns
        totals.resident_bytes = timing.resident_bytes
        totals.last_finished_ns = timing.finished_ns

    def _was_idle(self, stage: int, moment_ns: int) -> bool:
        return self._has_same_clock[stage] and self.stages[stage].last_finished_ns <= moment_ns
