"""Rates over a sliding window, in one-second buckets. Pure: time comes in as an argument, in seconds."""

from __future__ import annotations


class RateMeter:
    """Sums amounts over the last `window_seconds` whole seconds."""

    def __init__(self, window_seconds: int) -> None:
        self._amounts = [0.0] * window_seconds
        self._seconds = [-1] * window_seconds
        self._first: float | None = None

    def add(self, amount: float, now: float) -> None:
        """Count `amount` at time `now`."""
        if self._first is None:
            self._first = now
        second = int(now)
        slot = second % len(self._amounts)
        if self._seconds[slot] != second:
            self._seconds[slot], self._amounts[slot] = second, 0.0
        self._amounts[slot] += amount

    def per_second(self, now: float) -> float:
        """Return the mean rate over the window, or over the time since the first amount if that is shorter."""
        if self._first is None:
            return 0.0
        window = len(self._amounts)
        oldest = int(now) - window
        total = sum(a for a, s in zip(self._amounts, self._seconds, strict=True) if s > oldest)
        return total / min(float(window), max(1.0, now - self._first))
