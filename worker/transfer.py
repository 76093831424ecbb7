"""Several transfers at once, with a sign of life every second. Covers threads and counting, not what is transferred."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event, Lock

from cluster.load_order import LoadProgress

MAX_PARALLEL = 4
REPORT_SECONDS = 0.5


class TransferStoppedError(Exception):
    """Raised within a transfer whose sibling failed: nothing that it fetches will be used."""


class ByteCounter:
    """Bytes that have arrived, counted from any thread."""

    def __init__(self, bytes_done: int) -> None:
        self.bytes_done = bytes_done
        self._lock = Lock()
        self._stopped = Event()

    def add(self, count: int) -> None:
        """Count bytes. Raises TransferStoppedError after `stop`."""
        if self._stopped.is_set():
            raise TransferStoppedError
        with self._lock:
            self.bytes_done += count

    def stop(self) -> None:
        """End the transfers that count here, at their next bytes."""
        self._stopped.set()


def run_transfers(
    transfers: Iterable[Callable[[], object]],
    counter: ByteCounter,
    bytes_total: int,
    on_progress: Callable[[LoadProgress], None],
) -> None:
    """Run all transfers, a few at a time, and report from the calling thread. Raises what the first failure raised.

    Returns, or raises, only when no transfer runs any more.
    """
    with ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="transfer") as pool:
        pending = {pool.submit(transfer) for transfer in transfers}
        try:
            while pending:
                done, pending = wait(pending, REPORT_SECONDS, return_when=FIRST_EXCEPTION)
                on_progress(LoadProgress("downloading", counter.bytes_done, bytes_total))
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first: a transfer that stops makes room for the next
            counter.stop()
            raise
