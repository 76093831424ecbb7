"""Converted parts, from a worker that has them. Covers their names among workers, and checking what came."""

from __future__ import annotations

from pathlib import Path

from cluster.hub.layout import part_files
from cluster.load_order import LoadOrder
from worker.sharing.copying import Wanted
from worker.sharing.holders import Neighbours
from worker.sharing.shelf import OnBytes
from worker.store.disk import disk_errors, partial
from worker.store.folder import BlockStore
from worker.store.key import store_key
from worker.store.verify import verify_part


def parts_collection(order: LoadOrder) -> str:
    """Return what workers call the parts of an order's checkpoint, wherever each of them keeps its own."""
    return f"store/{store_key(order.source, order.precision)}"


def whole_parts(store: BlockStore) -> dict[str, Path]:
    """Return the files of the parts that a store has."""
    return {name: store.folder / name for part in store.parts() for name in part_files(part)}


def borrow_part(
    neighbours: Neighbours, order: LoadOrder, store: BlockStore, part: str, on_bytes: OnBytes = lambda _: None
) -> bool:
    """Copy a part from a worker that has it, and compare it with its checksums before it counts as there.

    False when no worker has it whole. The caller holds the part's lock. Raises ConfigurationError for a full disk.
    """
    arriving = _Arriving(store.root, store.key)
    wanted = Wanted(parts_collection(order), part_files(part), store.folder, lambda: verify_part(arriving, part))
    with disk_errors(part, store.folder):
        if not store.has(part):
            store.remove(part)  # what is damaged would count as copied already
        return neighbours.copy(wanted, on_bytes)


class _Arriving(BlockStore):
    """The parts that are being copied, under their temporary names, which the copy has locked."""

    def path(self, part: str) -> Path:
        return partial(super().path(part))

    def manifest_path(self, part: str) -> Path:
        return partial(super().manifest_path(part))

    def hold(self, file: int) -> None:
        """Hold nothing: nobody else touches these."""
