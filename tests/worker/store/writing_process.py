"""A process that converts a part as far as its first weight, says so, and goes on when a line comes in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]


@contextmanager
def half_written(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the process until it has written half of the part; it is killed at the end at the latest."""
    command = [sys.executable, "-m", "tests.worker.store.writing_process", str(root)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half written\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def main(root: Path) -> None:
    from cluster.model_spec import Precision
    from tests.worker.store.parts import PART, make_plan, make_small, make_store, make_weights
    from worker.store.writer import write_part
    from worker.stored_weight import MemoryWeight

    def weights() -> Iterator[MemoryWeight]:
        first, *rest = make_weights(Precision.INT8)
        yield first
        print("half written", flush=True)
        input()
        yield from rest

    store = make_store(root)
    with store.lock(PART):
        write_part(store, make_plan(Precision.INT8), make_small(), weights())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
