"""What a worker offers to others once it is told to load a span: downloaded files and converted parts.

Offers stay, since a worker that serves another model next still has its files. What it deletes meanwhile (discarded
downloads, pruned parts) it no longer lists: who was reading it asks elsewhere.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cluster.hub.download import HubAccess
from cluster.load_order import LoadOrder
from cluster.model_spec import HubSource
from worker.hub_download import cached_files, hub_collection
from worker.sharing.parts import parts_collection, whole_parts
from worker.sharing.shelf import Shelf
from worker.store.copied import locate_store


def offer(shelf: Shelf, order: LoadOrder) -> None:
    """Offer what this worker has, or will have, of an order's checkpoint."""
    source = order.source
    if isinstance(source, HubSource):
        folder = order.store.download_folder
        access = HubAccess(source.endpoint, cache_folder=Path(folder) if folder else None)
        shelf.offer(hub_collection(source), partial(cached_files, source, order.weight_files, access))
    shelf.offer(parts_collection(order), partial(whole_parts, locate_store(order)))
