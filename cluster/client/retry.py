"""When a call that found nobody is tried again. Pure; the client sleeps."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Full-jitter exponential backoff: before try k + 1 wait between half and all of min(longest, first * 2**(k-1)).

    Only UNAVAILABLE is tried again, and a generation only before its first message, so nothing is done twice that
    anyone has seen.
    """

    max_attempts: int = 4
    first_delay_seconds: float = 0.2
    longest_delay_seconds: float = 3.0

    def delay_seconds(self, num_failed: int, source: random.Random) -> float | None:
        """Return how long to wait after this many failed attempts; None: give up."""
        if num_failed >= self.max_attempts:
            return None
        ceiling = min(self.longest_delay_seconds, self.first_delay_seconds * 2.0 ** (num_failed - 1))
        return ceiling * source.uniform(0.5, 1.0)
