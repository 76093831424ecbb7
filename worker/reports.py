"""What became of one epoch's steps, kept until the coordinator has read it. Covers the queue behind Watch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from cluster.microbatch import StepFailure, StepProgress, StepResult

Report = StepResult | StepFailure | StepProgress

MAX_KEPT = 1024
"""Reports kept while nobody reads them, the newest ones; far above the steps that a coordinator keeps in flight."""


class Reports:
    """A queue with one reader at a time: a new one takes over, so that a broken stream swallows nothing."""

    def __init__(self) -> None:
        self._kept: deque[Report] = deque(maxlen=MAX_KEPT)
        self._news = asyncio.Event()
        self._num_watches = 0
        self._is_closed = False

    def put(self, report: Report) -> None:
        """Keep a report. Of successive signs of progress that nobody has read only the last is kept."""
        if self._kept and isinstance(report, StepProgress) and isinstance(self._kept[-1], StepProgress):
            self._kept.pop()
        self._kept.append(report)
        self._news.set()

    def close(self) -> None:
        """End the watch once it has read what is kept."""
        self._is_closed = True
        self._news.set()

    async def watch(self) -> AsyncIterator[Report]:
        """Yield reports until closed or a newer watch begins. One is forgotten only when the next is asked for."""
        self._num_watches += 1
        number = self._num_watches
        self._news.set()  # an older watch ends
        while number == self._num_watches:
            if self._kept:
                report = self._kept[0]
                yield report
                self._forget(report)
            elif self._is_closed:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def _forget(self, report: Report) -> None:
        if self._kept and self._kept[0] is report:
            self._kept.popleft()
