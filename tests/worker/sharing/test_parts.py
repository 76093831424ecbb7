from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.worker.sharing.test_sharing import LocalHolder
from tests.worker.store.converted import fill, stored_order
from worker.sharing.holders import Neighbours
from worker.sharing.parts import borrow_part, parts_collection, whole_parts
from worker.sharing.shelf import Shelf
from worker.store.copied import store_of
from worker.store.verify import verify_part

PART = "block-0000"


def test_a_part_that_was_cut_short_is_borrowed_anew(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    orders = [stored_order(folder, tmp_path / name) for name in ("here", "there")]
    for order in orders:
        fill(order)
    order, here, there = orders[0], *map(store_of, orders)
    os.truncate(here.path(PART), 100)
    theirs = Shelf()
    theirs.offer(parts_collection(order), partial(whole_parts, there))
    with Neighbours(Shelf(), {"10.0.0.1:1": LocalHolder(theirs)}) as neighbours, here.lock(PART):
        assert borrow_part(neighbours, order, here, PART)
    verify_part(here, PART)
