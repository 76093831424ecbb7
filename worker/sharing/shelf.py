"""What this worker holds for others, and what it is about to fetch.

A collection is a converted checkpoint of the block store or a commit of a hub repository; its files are immutable once
they are whole. Covers the account; usable from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NotReadyError

Listing = Callable[[], Mapping[str, Path]]
"""Returns the whole files of a collection that are here now, by name."""

OnBytes = Callable[[int], None]
"""Counts bytes that arrived; a negative number takes some back."""


@dataclass(slots=True)
class Claim:
    """The intention to bring a file. `has_begun`: it is being fetched or converted, nobody else should."""

    has_begun: bool = False
    bytes_done: int = 0

    def count(self, num_bytes: int) -> None:
        """Count bytes that arrived: a sign of life for those who wait."""
        self.bytes_done += num_bytes


class Shelf:
    """One worker's. `address` is its stage service's, by which claims are ranked."""

    def __init__(self) -> None:
        self.address = ""
        self._listings: dict[str, Listing] = {}
        self._claims: dict[tuple[str, str], Claim] = {}
        self._lock = threading.Lock()

    def offer(self, collection: str, listing: Listing) -> None:
        """Let others read what `listing` returns, whenever they ask."""
        with self._lock:
            self._listings[collection] = listing

    def files(self, collection: str) -> Mapping[str, Path]:
        """Return the files of a collection that are here. Raises NotReadyError when it is not offered, or not yet."""
        with self._lock:
            listing = self._listings.get(collection)
        if listing is None:
            raise NotReadyError(f"{collection} is not offered here")
        return listing()

    def claims(self, collection: str) -> dict[str, Claim]:
        """Return this worker's own claims, by file."""
        with self._lock:
            return {name: claim for (among, name), claim in self._claims.items() if among == collection}

    @contextmanager
    def claim(self, collection: str, name: str) -> Iterator[Claim]:
        """Claim a file for the time of the block."""
        claim = Claim()
        with self._lock:
            self._claims[collection, name] = claim
        try:
            yield claim
        finally:
            with self._lock:
                self._claims.pop((collection, name), None)
