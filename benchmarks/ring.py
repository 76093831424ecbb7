"""Measures passes through the ring beside plain direct reads of the same file, size and depth, in the same run.

The file holds random slices as the block store writes them and is larger than the ring; computation is one look at each
slice, so that reading alone counts: on its own, and with checksums. The contenders take turns, and the page cache is
passed by or dropped. Prints GB/s of each and the ring's share of the plain loop.

    python benchmarks/ring.py [--folder /tmp] [--gigabytes 4] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measures import describe_machine
from worker.store.manifest import SLICE_BYTES
from worker.stream.probe import drop_cached, probe
from worker.stream.readers import Readers, ReadPlan, make_slots
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import Check, Extent, StreamedFile

NUM_SLOTS = 4


def write_file(path: Path, num_slices: int) -> list[str]:
    """Write random slices; return their checksums."""
    checksums = []
    with path.open("wb") as file:
        for _ in range(num_slices):
            data = os.urandom(SLICE_BYTES)
            checksums.append(xxhash.xxh3_128_hexdigest(data))
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return checksums


def read_plainly(path: Path, plan: ReadPlan, num_bytes: int) -> None:
    """Read the file once: each of the plan's readers takes the next piece, into a buffer of its own."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if plan.is_direct else 0))
    offsets = iter(range(0, num_bytes, plan.read_bytes))
    lock = threading.Lock()

    def read(memory: memoryview) -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(descriptor, [memory], offset)

    threads = [
        threading.Thread(target=read, args=(slot.memory,)) for slot in make_slots(plan.num_readers, plan.read_bytes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)


class Passes:
    """A ring over one file, at the beginning of a pass and with nothing read ahead."""

    def __init__(self, path: Path, plan: ReadPlan, checksums: list[str], *, is_checked: bool) -> None:
        self._file = StreamedFile("benchmark", path, is_direct=plan.is_direct)
        self._extents = [
            Extent(
                self._file,
                index * SLICE_BYTES,
                SLICE_BYTES,
                (Check(f"slice {index}", 0, SLICE_BYTES, checksum),) if is_checked else (),
            )
            for index, checksum in enumerate(checksums)
        ]
        self._readers = Readers(plan)
        self._ring = SliceRing(
            self._readers, ReadCounters(), ring_bytes=NUM_SLOTS * SLICE_BYTES, slot_bytes=SLICE_BYTES
        )
        self._ring.set_order(self._extents)
        self.run()
        self._ring.drain()

    def run(self) -> None:
        """Pass once, and read nothing ahead into the next pass."""
        for extent in self._extents:
            int(self._ring.take(extent)[0])
        self._ring.drain()

    def close(self) -> None:
        """End the threads."""
        self._readers.close()
        self._file.close()


def timed(action: Callable[[], None], path: Path, num_bytes: int) -> float:
    """Return the GB/s of an action that reads the file once."""
    drop_cached(path, 0, num_bytes)
    started = time.perf_counter()
    action()
    return num_bytes / (time.perf_counter() - started) / 1e9


def measure(path: Path, num_slices: int, num_rounds: int) -> dict[str, list[float]]:
    """Return the GB/s of each contender in each round."""
    checksums = write_file(path, num_slices)
    num_bytes = num_slices * SLICE_BYTES
    plan = probe([path]).plan
    print(f"plan: {plan}", file=sys.stderr)
    checked, unchecked = (Passes(path, plan, checksums, is_checked=c) for c in (True, False))
    contenders: dict[str, Callable[[], None]] = {
        "plain": lambda: read_plainly(path, plan, num_bytes),
        "ring": checked.run,
        "ring without checksums": unchecked.run,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(num_rounds):
        names = list(contenders)
        for name in names[number % 3 :] + names[: number % 3]:
            speeds[name].append(timed(contenders[name], path, num_bytes))
    checked.close()
    unchecked.close()
    return speeds


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    num_slices = max(NUM_SLOTS + 1, int(arguments.gigabytes * (1 << 30)) // SLICE_BYTES)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        speeds = measure(Path(folder, "slices"), num_slices, arguments.rounds)
    share = statistics.median(ring / plain for ring, plain in zip(speeds["ring"], speeds["plain"], strict=True))
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "gigabytes_per_second": speeds, "share": share}))
        return
    for name, values in speeds.items():
        print(f"{name:24} {statistics.median(values):6.2f} GB/s (best {max(values):.2f}, worst {min(values):.2f})")
    best = max(speeds["ring"]) / max(speeds["plain"])
    print(f"the ring reaches {share:.2f} of the plain loop (median of rounds), {best:.2f} at their best")


if __name__ == "__main__":
    main()
