"""Compares what the disk holds with what was written, at the disk's speed: each thread reads a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.errors import ConfigurationError, StorageError
from worker.store.folder import BlockStore
from worker.store.part_bytes import READ_BYTES, PartBytes

NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """A part that is not as it was written. `message` names the tensor and the file."""

    part: str
    message: str


def verify_part(store: BlockStore, part: str, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Read a whole part; `on_bytes` counts what was read. Raises StorageError, naming the first tensor that differs.

    Raises ConfigurationError for a part of another version.
    """
    opened = PartBytes(store, part)
    try:
        opened.check(memoryview(bytearray(READ_BYTES)), on_bytes)
    finally:
        opened.close()


def verify_parts(store: BlockStore, parts: Sequence[str], on_bytes: Callable[[int], None]) -> list[Damage]:
    """Read parts, several at once; return the damaged ones in the order of `parts`. `on_bytes` is called in threads."""

    def examine(part: str) -> Damage | None:
        try:
            verify_part(store, part, on_bytes)
        except (StorageError, ConfigurationError) as error:  # the latter: of another version than the rest
            return Damage(part, error.message)
        return None

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify") as pool:
        try:
            return [damage for damage in pool.map(examine, parts) if damage is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
