"""How far a conversion is: bytes downloaded and bytes converted, from several threads. Covers counting only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Lock

from cluster.load_order import LoadProgress


class FillStoppedError(Exception):
    """Raised within a conversion whose sibling failed, at its next bytes."""


class FillMeter:
    """Counts for all parts together. What is reported of the converted bytes never exceeds the announced sizes."""

    def __init__(self, sizes: Mapping[str, int], on_progress: Callable[[LoadProgress], None]) -> None:
        """`sizes` are the parts' bytes in the store, roughly."""
        self._sizes, self._on_progress = dict(sizes), on_progress
        self._done = dict.fromkeys(sizes, 0)
        self._counting, self._one_download, self._stopped = Lock(), Lock(), Event()
        self.report()

    @contextmanager
    def downloading(self) -> Iterator[Callable[[LoadProgress], None]]:
        """Download within the block: one thread at a time, others convert meanwhile."""
        with self._one_download:
            yield self._pass_on
        self.report()

    def converting(self, part: str) -> Callable[[int], None]:
        """Return what counts a part's bytes as they are written."""

        def count(num_bytes: int) -> None:
            self._check()
            with self._counting:
                self._done[part] += num_bytes
            self.report()

        return count

    def finish(self, part: str) -> None:
        """Count a part as made, by whichever process."""
        with self._counting:
            self._done[part] = self._sizes[part]
        self.report()

    def report(self) -> None:
        """Say how far the conversion is, as a sign of life too."""
        done = sum(min(number, self._sizes[part]) for part, number in self._done.items())
        self._on_progress(LoadProgress("converting", done, sum(self._sizes.values())))

    def stop(self) -> None:
        """End what counts here, at its next bytes."""
        self._stopped.set()

    def _pass_on(self, progress: LoadProgress) -> None:
        self._check()
        self._on_progress(progress)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise FillStoppedError
