"""Writes a part: bytes and manifest to temporary files, synced, then renamed, the manifest last. Until then the part is
not there, or is the older one.

Covers one part whose lock the caller holds; which weights it has is the converter's business. Memory peaks at one
weight, or at a few MiB of a part that is copied. A full disk, or any other failure of it, leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ConfigurationError, InvariantError
from worker.store.disk import disk_errors, partial, write_all, write_partial
from worker.store.folder import BlockStore
from worker.store.manifest import PartManifest, PiecePlace, TensorPlace, WeightPlace, to_json
from worker.store.part_bytes import READ_BYTES
from worker.store.tensors import bytes_of, checksum, spec_of
from worker.stored_weight import MemoryWeight

_SYNC_BYTES = 64 << 20  # pages that are not on the disk yet count as a cgroup's memory, and cannot be taken from it


def write_part(
    store: BlockStore,
    plan: PartManifest,
    small: Mapping[str, Tensor],
    weights: Iterable[MemoryWeight],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> PartManifest:
    """Write a part as `plan` (of `worker.store.layout.plan_part`) says and return its manifest.

    `weights` come in the plan's order, each in one piece or several; a generator need not hold two at once. `on_bytes`
    is told how many bytes each write added. Raises ConfigurationError when the disk is full or fails.
    """
    with _whole_or_nothing(store, plan.part, plan.file_bytes):
        manifest = _write_bytes(store, plan, small, weights, on_bytes)
        write_partial(store.disk, store.manifest_path(plan.part), to_json(manifest))
    return manifest


def copy_part(
    store: BlockStore, part: str, files: tuple[Path, Path], num_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    """Write a part that exists elsewhere: its weights and its manifest, `num_bytes` together.

    `on_bytes` and errors are as of `write_part`; what is copied is not compared with its checksums.
    """
    with _whole_or_nothing(store, part, num_bytes):
        for source, target in zip(files, (store.path(part), store.manifest_path(part)), strict=True):
            _copy_file(store, source, partial(target), on_bytes)


@contextmanager
def _whole_or_nothing(store: BlockStore, part: str, num_bytes: int) -> Iterator[None]:
    """Make what is written within the block under partial names the part; remove it when that fails."""
    try:
        with disk_errors(f"{part} ({num_bytes:,} bytes)", store.folder):
            yield
            for path in (store.path(part), store.manifest_path(part)):
                store.disk.replace(partial(path), path)
    finally:
        store.remove_leftovers(part)


def _copy_file(store: BlockStore, source: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    file = store.disk.create(target)
    try:
        writer, offset = _Writer(store, file, on_bytes), 0
        for data in _read(source):
            writer.put(memoryview(data), offset)
            offset += len(data)
        store.disk.sync(file)
    finally:
        os.close(file)


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                yield data
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}): load the model again") from error


def _write_bytes(
    store: BlockStore,
    plan: PartManifest,
    small: Mapping[str, Tensor],
    weights: Iterable[MemoryWeight],
    on_bytes: Callable[[int], None],
) -> PartManifest:
    file = store.disk.create(partial(store.path(plan.part)))
    try:
        writer = _Writer(store, file, on_bytes)
        placed = writer.write_weights(plan, iter(weights))
        placed_small = {name: writer.write(place, small[name]) for name, place in plan.small.items()}
        os.ftruncate(file, plan.file_bytes)  # the last slice is padded
        store.disk.sync(file)
    finally:
        os.close(file)
    return replace(plan, small=placed_small, weights=placed)


class _Writer:
    """Puts tensors where the plan says, and bytes where the caller does."""

    def __init__(self, store: BlockStore, file: int, on_bytes: Callable[[int], None]) -> None:
        self._disk, self._file, self._on_bytes = store.disk, file, on_bytes
        self._unsynced = 0

    def write_weights(self, plan: PartManifest, weights: Iterator[MemoryWeight]) -> tuple[WeightPlace, ...]:
        """Hold one weight at a time, which `zip` would not: it keeps the last one while it asks for another."""
        placed = tuple(self._write_weight(place, next(weights, None)) for place in plan.weights)
        if next(weights, None) is not None:
            raise InvariantError(f"{plan.part} was given more weights than were planned")
        return placed

    def _write_weight(self, place: WeightPlace, weight: MemoryWeight | None) -> WeightPlace:
        if weight is None or (weight.name, weight.kind.value, weight.shape) != (place.name, place.kind, place.shape):
            raise InvariantError(f"{weight and weight.name} was to be written where the plan has {place.name}")
        shares = {role: _split(tensor, role, place) for role, tensor in join_pieces(weight).items()}
        pieces = tuple(
            self._write_piece(piece, {role: share[index] for role, share in shares.items()})
            for index, piece in enumerate(place.pieces)
        )
        small = {role: self.write(found, weight.small[role]) for role, found in place.small.items()}
        return replace(place, small=small, pieces=pieces)

    def write(self, place: TensorPlace, tensor: Tensor) -> TensorPlace:
        spec = spec_of(tensor)
        if (spec.dtype, spec.shape) != (place.dtype, place.shape):
            raise InvariantError(f"a tensor {spec} was to be written where the plan has {place}")
        data = bytes_of(tensor.contiguous())
        self.put(data, place.offset)
        return replace(place, checksum=checksum(data))

    def put(self, data: memoryview, offset: int) -> None:
        write_all(self._disk, self._file, data, offset)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            self._disk.sync(self._file)
            self._unsynced = 0
        self._on_bytes(len(data))

    def _write_piece(self, piece: PiecePlace, tensors: Mapping[str, Tensor]) -> PiecePlace:
        return replace(piece, tensors={role: self.write(piece.tensors[role], found) for role, found in tensors.items()})


def join_pieces(weight: MemoryWeight) -> dict[str, Tensor]:
    """Return a weight's large tensors by role, each of all rows; copies only a weight of several pieces."""
    if len(weight.held) == 1:
        return dict(weight.held[0].tensors)
    return {role: torch.cat([piece.tensors[role] for piece in weight.held]) for role in weight.held[0].tensors}


def _split(whole: Tensor, role: str, place: WeightPlace) -> tuple[Tensor, ...]:
    """Return the pieces' shares of a tensor of all rows."""
    return torch.split(whole, [piece.tensors[role].shape[0] for piece in place.pieces])
