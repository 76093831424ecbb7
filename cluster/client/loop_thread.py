"""An event loop on a thread of its own, for code without asyncio. Covers what lives on the loop, and its end: on
request, when whoever uses it is dropped, or with the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import Collection, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar

from cluster.errors import RequestCancelledError

Result = TypeVar("Result")

SETTLE_SECONDS = 1.0
CLOSE_SECONDS = 60.0


class LoopClosedError(RuntimeError):
    """Something was to run on a loop that has been closed."""


class LoopThread:
    """Runs coroutines for any thread, also one whose own event loop runs."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._contexts = AsyncExitStack()
        self._tasks: set[asyncio.Task[Any]] = set()  # that `run` has started
        self._ending: asyncio.Task[None] | None = None
        self._is_closing = False
        self._submitting = threading.Lock()  # what is submitted runs, or is refused
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run on the loop and wait; whatever interrupts the wait cancels the work.

        Raises LoopClosedError on a closed loop, RequestCancelledError where closing the loop ended the work.
        """
        future = self._submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RequestCancelledError("this request was ended: what it ran on was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def enter(self, context: AbstractAsyncContextManager[Result]) -> Result:
        """Enter a context, which is left when the loop closes."""
        return self.run(self._contexts.enter_async_context(context))

    def begin_close(self) -> None:
        """Begin to close, without waiting; from any thread, the loop's own included. Idempotent."""
        try:
            self._loop.call_soon_threadsafe(self._begin_end)
        except RuntimeError:
            return  # it has ended

    def close(self) -> None:
        """Cancel what runs, leave the contexts and end the thread. Idempotent, also from several threads at once.

        What does not end within CLOSE_SECONDS is left to the interpreter's end.
        """
        self.begin_close()
        self._thread.join(CLOSE_SECONDS)

    def _submit(self, coroutine: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        with self._submitting:
            if not self._is_closing:
                return asyncio.run_coroutine_threadsafe(self._track(coroutine), self._loop)
        coroutine.close()
        raise LoopClosedError("it is closed: make a new client, or load the model again")

    async def _track(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    def _live(self) -> None:
        self._loop.run_forever()
        self._loop.close()
        atexit.unregister(self.close)

    def _begin_end(self) -> None:
        if self._ending is None:
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        """Close what lives on the loop, and stop it whatever comes of that."""
        try:
            with self._submitting:
                self._is_closing = True
            for _ in range(2):
                await asyncio.sleep(0)  # what was submitted becomes a task, and the task starts
            await _cancel(self._tasks)
            await self._contexts.aclose()
            await self._loop.shutdown_asyncgens()
            await _settle([task for task in asyncio.all_tasks() if task is not self._ending])
        finally:
            self._loop.stop()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for them."""
    waited = list(tasks)
    for task in waited:
        task.cancel()
    await asyncio.gather(*waited, return_exceptions=True)


async def _settle(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Let tasks end that are about to: gRPC's, whose thread hands the outcome of a cancelled call to this loop."""
    if tasks:
        _, pending = await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
        await _cancel(pending)
