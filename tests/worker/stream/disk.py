"""Parts on a real disk, and a disk that is slow or broken where a test says so."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cluster.model_spec import Precision
from worker.quantization.encode import encode
from worker.store.folder import BlockStore
from worker.store.layout import WeightSpec, plan_part
from worker.store.manifest import ALIGNMENT, PartManifest
from worker.store.writer import write_part
from worker.stream.readers import ReadPlan
from worker.stream.streamed_file import Extent, ReadAt, StreamedFile, slice_extents

PLAN = ReadPlan(is_direct=False, read_bytes=2 * ALIGNMENT, num_readers=2)


def write_weights(
    folder: Path, part: str, shapes: Sequence[tuple[int, int]], *, slice_bytes: int = 8 * ALIGNMENT, seed: int = 0
) -> PartManifest:
    """Write a part of int8 weights called "w0", "w1", …; its file is `part_path`."""
    torch.manual_seed(seed)
    specs = [WeightSpec(f"w{i}", Precision.INT8, shape) for i, shape in enumerate(shapes)]
    plan = plan_part(part, Precision.INT8, {}, specs, slice_bytes)
    weights = (encode(spec.name, torch.randn(spec.shape), Precision.INT8) for spec in specs)
    store = BlockStore(folder, "k")
    store.folder.mkdir(exist_ok=True)
    return write_part(store, plan, {}, weights)


def part_path(folder: Path, part: str) -> Path:
    """Return where `write_weights` puts a part's bytes."""
    return BlockStore(folder, "k").path(part)


def make_extents(
    folder: Path, sizes: Sequence[int] = (2, 3, 2, 4), part: str = "block-0003", read_at: ReadAt = os.preadv
) -> tuple[StreamedFile, tuple[Extent, ...]]:
    """Write a part of one slice per entry of `sizes`, so many times ALIGNMENT large; open it."""
    manifest = write_weights(folder, part, [(size, ALIGNMENT) for size in sizes], slice_bytes=max(sizes) * ALIGNMENT)
    file = StreamedFile(part, part_path(folder, part), is_direct=False, read_at=read_at)
    return file, slice_extents(manifest, file)


def flip_byte(path: Path, offset: int) -> None:
    """Change a byte of a file in place; doing it again repairs it."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


class Disk:
    """Reads that wait until they are let through, fail, or come short; they are noted in the order they begin."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.begun: list[int] = []  # offsets
        self.failing = False
        self._gate = threading.Condition()
        self._is_open, self._num_begun, self._num_allowed = is_open, 0, 0

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read like os.preadv."""
        with self._gate:
            self.begun.append(offset)
            self._num_begun += 1
            number = self._num_begun
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: self._is_open or self._num_allowed >= number, timeout=30)
        if self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    def allow(self, num_reads: int) -> None:
        """Let so many more reads through, in the order in which they began."""
        with self._gate:
            self._num_allowed += num_reads
            self._gate.notify_all()

    def open(self) -> None:
        """Let everything through."""
        with self._gate:
            self._is_open = True
            self._gate.notify_all()

    def until(self, predicate: Callable[[], bool]) -> None:
        """Wait for reads to begin."""
        with self._gate:
            assert self._gate.wait_for(predicate, timeout=30)
