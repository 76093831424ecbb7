"""A small part, its tensors, and disks that fail, for the tests of the block store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cluster.model_spec import HubSource, Precision
from worker.quantization.encode import encode
from worker.store.disk import SystemDisk
from worker.store.folder import BlockStore, describe_source
from worker.store.key import store_key
from worker.store.layout import WeightSpec, plan_part
from worker.store.manifest import PartManifest
from worker.store.reader import PartFile
from worker.store.tensors import spec_of
from worker.store.writer import write_part
from worker.stored_weight import MemoryWeight

SOURCE = HubSource("owner/model", "c0ffee" * 6 + "1234", "https://hub.example")
SHAPES = {"attention.q": (200, 128), "attention.o": (64, 72), "mlp.down": (77, 100)}
SLICE_BYTES = 16384
PART = "block-0000"


def make_weights(precision: Precision, seed: int = 0) -> list[MemoryWeight]:
    """Return encoded weights that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return [encode(name, torch.randn(shape, generator=generator), precision) for name, shape in SHAPES.items()]


def make_small() -> dict[str, Tensor]:
    return {"norm.weight": torch.linspace(0, 1, 13), "attention.q.bias": torch.arange(5.0).bfloat16()}


def make_plan(precision: Precision, part: str = PART) -> PartManifest:
    specs = [WeightSpec(name, precision, shape) for name, shape in SHAPES.items()]
    small = {name: spec_of(tensor) for name, tensor in make_small().items()}
    return plan_part(part, precision, small, specs, SLICE_BYTES)


def make_store(root: Path, precision: Precision = Precision.INT8, disk: SystemDisk | None = None) -> BlockStore:
    return BlockStore(root, store_key(SOURCE, precision), disk)


def write(store: BlockStore, part: str = PART, precision: Precision = Precision.INT8, seed: int = 0) -> PartManifest:
    """Write a described part as a conversion does."""
    store.describe(describe_source(SOURCE, precision, num_blocks=2))
    with store.lock(part):
        return write_part(store, make_plan(precision, part), make_small(), iter(make_weights(precision, seed)))


def names(store: BlockStore) -> set[str]:
    """Return the files of a store's folder, locks aside."""
    return {path.name for path in store.folder.iterdir() if path.suffix != ".lock"}


def read_small(part: PartFile) -> dict[str, Tensor]:
    return {name: part.read_tensor(name, place) for name, place in part.manifest.small.items()}


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


class FailingDisk(SystemDisk):
    """Fails at the `fail_at`th call, counted from 0 over all of its calls; a write stops halfway first."""

    def __init__(self, fail_at: int, number: int = errno.ENOSPC) -> None:
        self.num_calls, self._fail_at, self._number = 0, fail_at, number

    def create(self, path: Path) -> int:
        self._count(lambda: None)
        return super().create(path)

    def write(self, file: int, data: memoryview, offset: int) -> int:
        self._count(lambda: os.pwrite(file, data[: len(data) // 2], offset))
        return super().write(file, data, offset)

    def sync(self, file: int) -> None:
        self._count(lambda: None)
        super().sync(file)

    def replace(self, source: Path, target: Path) -> None:
        self._count(lambda: None)
        super().replace(source, target)

    def _count(self, before_failing: Callable[[], object]) -> None:
        self.num_calls += 1
        if self.num_calls == self._fail_at + 1:
            before_failing()
            raise OSError(self._number, os.strerror(self._number))
