"""Parts of a checkpoint that comes converted reach the store whole or not at all, within its limits, and nothing that
was downloaded before is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import LoadOrder, StoreOptions
from cluster.model_spec import CheckpointFile
from tests.worker.store.converted import converted_folder, order_of_converted, parts_of
from tests.worker.store.parts import FailingDisk, flip_bit, names
from tests.worker.test_span_download import FolderReader
from worker.sharing.holders import Neighbours
from worker.store.copied import CopiedStore, store_of
from worker.store.folder import BlockStore
from worker.weights import CheckpointSource

PARTS = ("embedding", "block-0000")  # of the first of two stages
FILES = {f"{part}{suffix}" for part in PARTS for suffix in (".json", ".weights")}


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A converted folder on another machine."""
    _, converted = converted_folder(tmp_path)
    return converted.rename(tmp_path / "moved")


def make_order(head: Path, **options: int) -> LoadOrder:
    store = StoreOptions(str(head.parent / "store"), str(head.parent / "cache"), **options)  # type: ignore[arg-type]
    folder = head.rename(head.with_name("here"))
    order = order_of_converted(folder, 0, checkpoint_service="head:7000", store=store)
    folder.rename(head)
    return order


def source_of(order: LoadOrder, head: Path) -> CheckpointSource:
    return CheckpointSource(order, connect=lambda _: FolderReader(head))


def make_filler(
    order: LoadOrder,
    head: Path,
    *,
    store: BlockStore | None = None,
    source: CheckpointSource | None = None,
    free_bytes: Callable[[Path], int] = lambda _: 1 << 40,
) -> CopiedStore:
    opened = source or source_of(order, head)
    return CopiedStore(
        order, 3, store or store_of(order), lambda: opened, lambda _: None, Neighbours.none(), free_bytes
    )


def downloads(head: Path) -> set[str]:
    return {path.name for path in (head.parent / "cache").rglob("*") if path.name in FILES}


def sizes(order: LoadOrder) -> dict[str, int]:
    return {file.name: file.size_bytes for file in order.weight_files if file.name in FILES}


def test_what_was_downloaded_stays_unless_discarding_is_asked_for(head: Path) -> None:
    order = make_order(head)
    make_filler(order, head).fill(parts_of(order))
    assert names(store_of(order)) == FILES | {"model.json"}
    assert downloads(head) == FILES
    order = make_order(head, is_source_discarded=True)
    store_of(order).remove("block-0000")
    make_filler(order, head).fill(parts_of(order))
    assert downloads(head) == {"embedding.json", "embedding.weights"}


@pytest.mark.parametrize(("limit", "message"), [("quota_bytes", "--store-quota"), ("reserve_bytes", "--disk-reserve")])
def test_quota_and_reserve_are_asked_before_anything_is_written(head: Path, limit: str, message: str) -> None:
    order = make_order(head, **{limit: 1000 if limit == "quota_bytes" else 1 << 50})
    with pytest.raises(ConfigurationError, match=message):
        make_filler(order, head).fill(parts_of(order))
    assert not store_of(order).folder.exists()
    assert downloads(head) == set()


def test_a_disk_must_hold_both_the_download_and_the_copy(head: Path) -> None:
    order = make_order(head)
    needed = 2 * sum(sizes(order).values())
    with pytest.raises(ConfigurationError, match="checkpoint to be downloaded"):
        make_filler(order, head, free_bytes=lambda _: needed - 1).fill(parts_of(order))
    make_filler(order, head, free_bytes=lambda _: needed).fill(parts_of(order))


def test_with_discarding_a_disk_must_hold_the_copy_and_one_part_of_the_download(head: Path) -> None:
    order = make_order(head, is_source_discarded=True)
    size = sizes(order)
    part_sizes = [size[f"{part}.weights"] + size[f"{part}.json"] for part in PARTS]
    needed = sum(part_sizes) + max(part_sizes)
    with pytest.raises(ConfigurationError, match="checkpoint to be downloaded"):
        make_filler(order, head, free_bytes=lambda _: needed - 1).fill(parts_of(order))
    make_filler(order, head, free_bytes=lambda _: needed).fill(parts_of(order))


def test_a_disk_that_fails_at_any_call_leaves_no_part_of_a_part(head: Path) -> None:
    order = make_order(head)
    whole = store_of(order)
    num_failures = 0
    for fail_at in range(100):
        store = BlockStore(whole.root, whole.key, FailingDisk(fail_at))
        with contextlib.suppress(ConfigurationError):
            make_filler(order, head, store=store).fill(parts_of(order))
            break
        num_failures += 1
        assert names(whole) <= FILES | {"model.json"}
        for part in whole.parts():
            assert whole.path(part).read_bytes() == (head / f"{part}.weights").read_bytes()
            whole.remove(part)
    assert num_failures > 10
    assert set(whole.parts()) == set(PARTS)


def test_a_download_is_held_until_it_is_copied(head: Path) -> None:
    order = make_order(head)
    other = source_of(order, head)

    class Contested(CheckpointSource):
        def bring_files(self, files: Sequence[CheckpointFile], on_progress: object) -> dict[str, Path]:
            found = super().bring_files(files, on_progress)  # type: ignore[arg-type]
            for file in files:
                other.discard(file.name)  # as another worker does whose block store lies elsewhere
            return dict(found)

    source = Contested(order, connect=lambda _: FolderReader(head))
    make_filler(order, head, source=source).fill(parts_of(order))
    assert set(store_of(order).parts()) == set(PARTS)


def test_a_damaged_download_is_named_instead_of_copied_for_ever(head: Path) -> None:
    order = make_order(head)
    filler, store = make_filler(order, head), store_of(order)
    filler.fill(parts_of(order))
    offset = store.manifest("block-0000").weights[0].pieces[0].tensors["weight"].offset
    (copy,) = (head.parent / "cache").rglob("block-0000.weights")
    flip_bit(store.path("block-0000"), offset)
    (block,) = (part for part in parts_of(order) if part.name == "block-0000")
    filler.rebuild(block, StorageError("damaged"))
    flip_bit(store.path("block-0000"), offset)
    flip_bit(copy, offset)
    with pytest.raises(StorageError, match=rf"delete {copy} and .*block-0000\.json, and load the model again"):
        filler.rebuild(block, StorageError("damaged"))
    assert copy.exists()


def test_a_download_that_cannot_be_read_is_not_told_as_a_store_that_cannot_be_written(head: Path) -> None:
    order = make_order(head)

    class Vanishing(CheckpointSource):
        def bring_files(self, files: Sequence[CheckpointFile], on_progress: object) -> dict[str, Path]:
            found = super().bring_files(files, on_progress)  # type: ignore[arg-type]
            for path in found.values():
                path.unlink()
            return dict(found)

    source = Vanishing(order, connect=lambda _: FolderReader(head))
    with pytest.raises(ConfigurationError, match=r"embedding\.weights cannot be read \(No such file"):
        make_filler(order, head, source=source).fill(parts_of(order))
