"""How a device is read fastest, found by reading a little of the very files that will be streamed.

Covers the choice between direct and buffered reads, their size and their number. The first candidate wins unless
another one is clearly faster, buffered ones most clearly: direct reads cost no copy by the processor that computes, and
no memory for the page cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SpanwiseError
from worker.stream.readers import Readers, ReadPlan, make_slots
from worker.stream.streamed_file import Extent, StreamedFile

_MIB = 1 << 20
CANDIDATES = (
    ReadPlan(is_direct=True, read_bytes=4 * _MIB, num_readers=4),
    ReadPlan(is_direct=True, read_bytes=4 * _MIB, num_readers=2),
    ReadPlan(is_direct=True, read_bytes=_MIB, num_readers=4),
    ReadPlan(is_direct=False, read_bytes=_MIB, num_readers=2),
    ReadPlan(is_direct=False, read_bytes=4 * _MIB, num_readers=4),
)
TRIAL_BYTES = 32 * _MIB  # by each candidate in each round
NUM_ROUNDS = 2
MAX_SECONDS = 1.0
DIRECT_GAIN, BUFFERED_GAIN = 1.1, 1.25  # that other reads than the first candidate's must bring


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe found; 0 bytes per second where there was too little to read."""

    plan: ReadPlan
    bytes_per_second: float


def probe(paths: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> ProbeResult:
    """Try the candidates in turn, never reading anything twice, for about a second at most.

    What lies in the page cache is dropped from it first: pages of this machine's memory would show any speed.
    Raises StorageError for files that cannot be read.
    """
    candidates = CANDIDATES if supports_direct(paths[0]) else tuple(c for c in CANDIDATES if not c.is_direct)
    trials = _trials(paths, NUM_ROUNDS * len(candidates))
    best = dict.fromkeys(candidates, 0.0)
    started = clock()
    for plan, (path, offset) in zip(candidates * NUM_ROUNDS, trials, strict=False):
        best[plan] = max(best[plan], _measure(plan, path, offset, clock))
        if clock() - started > MAX_SECONDS:
            break
    return choose(best)


def choose(rates: dict[ReadPlan, float]) -> ProbeResult:
    """Return the first plan, or the one that is faster than it by the most beyond its gain."""
    first = next(iter(rates))

    def worth(plan: ReadPlan) -> float:
        if plan is first:
            return rates[plan]
        return rates[plan] / (DIRECT_GAIN if plan.is_direct else BUFFERED_GAIN)

    plan = max(rates, key=worth)
    return ProbeResult(plan, rates[plan])


def supports_direct(path: Path) -> bool:
    """Tell whether a file can be read without the page cache: tmpfs and some network file systems cannot."""
    file = StreamedFile("probe", path, is_direct=True)
    slot = make_slots(1, 1)[0]
    try:
        file.read(slot.memory, 0)
    except SpanwiseError:
        return False
    finally:
        file.close()
    return True


def _trials(paths: Sequence[Path], num_trials: int) -> Iterator[tuple[Path, int]]:
    """Yield places of TRIAL_BYTES that do not overlap, from all over the files."""
    places = [
        (path, offset) for path in paths for offset in range(0, path.stat().st_size - TRIAL_BYTES + 1, TRIAL_BYTES)
    ]
    step = max(1, len(places) // num_trials)
    yield from places[::step]


def _measure(plan: ReadPlan, path: Path, offset: int, clock: Callable[[], float]) -> float:
    """Return bytes per second of one candidate at one place."""
    drop_cached(path, offset, TRIAL_BYTES)
    file = StreamedFile(path.name, path, is_direct=plan.is_direct)
    readers = Readers(plan, name="probe")
    slot = make_slots(1, TRIAL_BYTES)[0]
    slot.tensor.zero_()  # committing memory is not the disk's time
    try:
        started = clock()
        fill = readers.start(Extent(file, offset, TRIAL_BYTES, ()), slot)
        readers.wait((fill,))
        if fill.error is not None:
            raise fill.error
        return TRIAL_BYTES / (clock() - started)
    finally:
        readers.close()
        file.close()


def drop_cached(path: Path, offset: int, num_bytes: int) -> None:
    """Drop a part of a file from the page cache; what is not written yet is written first."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
