"""Writes a part: bytes to a temporary file, synced, renamed, then the manifest likewise. Until the last rename the part
is not there, or is the older one whole.

Covers one part whose lock the caller holds; which weights it has is the converter's business. Peak memory is one
weight. A full disk, or any other failure of it, leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from cluster.errors import ConfigurationError, InvariantError
from worker.store.disk import write_all
from worker.store.folder import PARTIAL, BlockStore, replace_file
from worker.store.manifest import PartManifest, PiecePlace, TensorPlace, WeightPlace, to_json
from worker.store.tensors import bytes_of, checksum, spec_of
from worker.stored_weight import MemoryWeight

_SYNC_BYTES = 256 << 20  # written at most before the disk must have them: unwritten pages count as a cgroup's memory
_FULL = (errno.ENOSPC, errno.EDQUOT)


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
    with part_file(store, plan) as file:
        writer = _Writer(store, file, on_bytes)
        placed = tuple(writer.write_weight(place, weight) for place, weight in zip(plan.weights, weights, strict=True))
        small_places = {name: writer.write(place, small[name]) for name, place in plan.small.items()}
        manifest = replace(plan, small=small_places, weights=placed)
        writer.pad(plan.file_bytes)
        commit_part(store, file, manifest)
    return manifest


@contextmanager
def part_file(store: BlockStore, plan: PartManifest) -> Iterator[int]:
    """Open a part's temporary file for writing; `commit_part` makes it the part, anything else removes it."""
    partial = store.path(plan.part).with_name(store.path(plan.part).name + PARTIAL)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        file = store.disk.create(partial)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise _failure(store, plan, error) from error
    finally:
        for leftover in store.leftovers(plan.part):
            leftover.unlink()


def commit_part(store: BlockStore, file: int, manifest: PartManifest) -> None:
    """Make the file of `part_file` the part that `manifest` describes. Raises OSError.

    An older part is gone from the moment that its bytes are replaced, and the new one is there with its manifest.
    """
    store.disk.sync(file)
    target = store.path(manifest.part)
    store.manifest_path(manifest.part).unlink(missing_ok=True)
    store.disk.replace(target.with_name(target.name + PARTIAL), target)
    replace_file(store.disk, store.manifest_path(manifest.part), to_json(manifest))


class _Writer:
    """Puts tensors where the plan says."""

    def __init__(self, store: BlockStore, file: int, on_bytes: Callable[[int], None]) -> None:
        self._disk, self._file, self._on_bytes = store.disk, file, on_bytes
        self._unsynced = 0

    def write_weight(self, place: WeightPlace, weight: MemoryWeight) -> WeightPlace:
        if (weight.name, weight.kind.value, weight.shape) != (place.name, place.kind, place.shape):
            raise InvariantError(f"{weight.name} was to be written where the plan has {place.name}")
        shares = {role: _split(tensor, role, place) for role, tensor in join_pieces(weight).items()}
        pieces = tuple(
            self._write_piece(piece, {role: split[index] for role, split in shares.items()})
            for index, piece in enumerate(place.pieces)
        )
        small = {role: self.write(found, weight.small[role]) for role, found in place.small.items()}
        return replace(place, small=small, pieces=pieces)

    def write(self, place: TensorPlace, tensor: Tensor) -> TensorPlace:
        spec = spec_of(tensor)
        if (spec.dtype, spec.shape) != (place.dtype, place.shape):
            raise InvariantError(f"a tensor {spec} was to be written where the plan has {place}")
        data = bytes_of(tensor)
        write_all(self._disk, self._file, data, place.offset)
        self._count(len(data))
        return replace(place, checksum=checksum(data))

    def pad(self, file_bytes: int) -> None:
        """Give the file its length: the last slice is padded."""
        os.truncate(self._file, file_bytes)

    def _write_piece(self, piece: PiecePlace, tensors: Mapping[str, Tensor]) -> PiecePlace:
        return replace(piece, tensors={role: self.write(piece.tensors[role], found) for role, found in tensors.items()})

    def _count(self, num_bytes: int) -> None:
        self._unsynced += num_bytes
        if self._unsynced >= _SYNC_BYTES:
            self._disk.sync(self._file)
            self._unsynced = 0
        self._on_bytes(num_bytes)


def join_pieces(weight: MemoryWeight) -> dict[str, Tensor]:
    """Return a weight's large tensors by role, each of all rows; copies only a weight of several pieces."""
    if len(weight.held) == 1:
        return dict(weight.held[0].tensors)
    roles = weight.held[0].tensors
    return {role: torch.cat([piece.tensors[role] for piece in weight.held]) for role in roles}


def _split(whole: Tensor, role: str, place: WeightPlace) -> tuple[Tensor, ...]:
    """Return the pieces' shares of a tensor of all rows."""
    return torch.split(whole, [piece.tensors[role].shape[0] for piece in place.pieces])


def _failure(store: BlockStore, plan: PartManifest, error: OSError) -> ConfigurationError:
    needed = f"{plan.part} takes {plan.file_bytes / 2**30:.2f} GiB in {store.folder}"
    if error.errno in _FULL:
        return ConfigurationError(
            f"the disk is full: {needed}, and nothing of it was kept: make room (`cluster store prune` removes what "
            "other models took), or choose a larger disk with --store-dir"
        )
    return ConfigurationError(
        f"{needed}, which cannot be written ({error.strerror}): make the folder writable, or choose another one with "
        "--store-dir"
    )
