"""The one thread of a worker that computes. The asyncio loop only moves messages."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class ComputeThread:
    """Runs jobs one at a time, in the order in which they were submitted."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        """`prepare` runs first in the thread: it sets what torch keeps per thread."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(prepare,), name=name)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job that reports its own outcome and never raises."""
        self._jobs.put(job)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Queue `function` and await what it returns or raises."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: Exception | None) -> None:
            if outcome.done():
                return  # whoever waited has gone
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            try:
                result = function()
            except Exception as error:  # handed to the waiting coroutine as it is
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self._jobs.put(job)
        return await outcome

    async def stop(self, timeout_seconds: float) -> None:
        """Let queued jobs finish and join the thread, but leave it behind after `timeout_seconds`."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.run(_do_nothing)
        except TimeoutError:
            self._jobs.put(None)
        else:
            self._jobs.put(None)
            self._thread.join()

    def _run(self, prepare: Callable[[], None]) -> None:
        prepare()
        while (job := self._jobs.get()) is not None:
            job()
            del job  # while the thread waits it keeps no tensors and no replaced span alive


def _do_nothing() -> None:
    """Run after every job that was queued before."""
