"""Whether reading hides behind computing: passes of a stage whose blocks come from a disk that is slowed down.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype bf16
    python benchmarks/slow_disk.py /tmp/tinyllama --streamed 23 --ring-bytes 268435456

Each read waits until its bytes would have come at the speed given; those beyond the disk's own mean nothing. Beside the
seconds of a decode pass stand those of reading alone (bytes over speed), of computing alone (the fastest pass at full
speed, less the stalls of a pass), the greater of the two, which is what a pass should take, and their sum, which it
would take without reading ahead. Medians over the passes.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import resolve
from measures import Round, Workload, describe_machine
from stage import add_arguments, open_stage
from worker.stream import opening
from worker.stream.streamed_file import StreamedFile


class SlowDisk:
    """Reads like os.preadv, at `bytes_per_second` over all threads; 0 is as fast as the disk is."""

    def __init__(self) -> None:
        self.bytes_per_second = 0.0
        self._lock = threading.Lock()
        self._free_at = 0.0  # when what was asked for so far has come

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read and wait."""
        count = os.preadv(descriptor, buffers, offset)
        if self.bytes_per_second:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + count / self.bytes_per_second
                wait = self._free_at - time.monotonic()
            time.sleep(max(0.0, wait))
        return count


def decode_seconds(found: Round, workload: Workload) -> float:
    """Return the median seconds of a decode pass."""
    return median(found.inter_token_seconds[:: workload.concurrency])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--shares", default="8,4,2,1", help="seconds of reading per second of computing")
    arguments = parser.parse_args()
    disk = SlowDisk()
    spec = resolve(arguments.model)
    with patch.object(opening, "StreamedFile", partial(StreamedFile, read_at=disk.read_at)):
        about, run = open_stage(arguments)
    workload = Workload(arguments.sequences, 8, arguments.passes, spec.vocab_size)
    run(workload)
    fast = run(workload)
    computing = min(fast.inter_token_seconds) - fast.stall_seconds / fast.num_passes
    table = Table("MB/s", "reading", "computing", "max", "sum", "pass", "pass / max", title="Seconds of a decode pass")
    for share in map(float, arguments.shares.split(",")):
        reading = computing * share
        disk.bytes_per_second = about["streamed_bytes"] / reading
        run(replace(workload, num_output_tokens=2))
        took = decode_seconds(run(workload), workload)
        cells = (reading, computing, max(reading, computing), reading + computing, took)
        ratio = f"{took / max(reading, computing):.2f}"
        table.add_row(f"{disk.bytes_per_second / 1e6:.0f}", *[f"{seconds:.3f}" for seconds in cells], ratio)
    Console(width=120).print(describe_machine(), table)


if __name__ == "__main__":
    main()
