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
import json
import os
import shlex
import sys
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
from command_line import Parser, run_script
from measures import Round, Workload, describe_machine
from peers.process import Run
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


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return the figures at each speed; times are seconds of a decode pass."""
    disk = SlowDisk()
    spec = resolve(arguments.model)
    with patch.object(opening, "StreamedFile", partial(StreamedFile, read_at=disk.read_at)):
        about, run = open_stage(arguments)
    workload = Workload(arguments.sequences, 8, arguments.passes, spec.vocab_size)
    run(workload)
    fast = run(workload)
    computing = min(fast.inter_token_seconds) - fast.stall_seconds / fast.num_passes
    return [measure_at(disk, run, workload, computing, about["streamed_bytes"], share) for share in arguments.shares]


def measure_at(
    disk: SlowDisk, run: Run, workload: Workload, computing: float, num_bytes: int, share: float
) -> dict[str, float]:
    """Return the figures where reading takes `share` times as long as computing."""
    reading = computing * share
    disk.bytes_per_second = num_bytes / reading
    run(replace(workload, num_output_tokens=2))
    times = {"reading": reading, "computing": computing, "max": max(reading, computing), "sum": reading + computing}
    return {"bytes_per_second": disk.bytes_per_second, **times, "pass": decode_seconds(run(workload), workload)}


def make_table(rows: Sequence[dict[str, float]]) -> Table:
    """Return the figures for people."""
    columns = ("reading", "computing", "max", "sum", "pass")
    table = Table("MB/s", *columns, "pass / max", title="Seconds of a decode pass")
    for row in rows:
        seconds = [f"{row[name]:.3f}" for name in columns]
        table.add_row(f"{row['bytes_per_second'] / 1e6:.0f}", *seconds, f"{row['pass'] / row['max']:.2f}")
    return table


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--sequences", type=int, default=16, help="that decode at once")
    parser.add_argument("--passes", type=int, default=6, help="of decoding at each speed, the prompts' included")
    parser.add_argument("--shares", type=_floats, default="8,4,2,1", help="seconds of reading per second of computing")
    arguments = parser.parse_measurement(quick="--sequences 4 --passes 3 --shares 1")
    if not arguments.streamed:
        parser.error("--streamed must name at least one block: otherwise nothing is read")
    return arguments


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"machine": machine, "benchmark": shlex.join(sys.argv), "rows": rows}, indent=1))
    else:
        Console(width=120).print(machine, make_table(rows))


if __name__ == "__main__":
    run_script(main)
