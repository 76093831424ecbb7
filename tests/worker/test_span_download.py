from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigurationError, StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.load_order import LoadOrder, LoadProgress
from tests.small_checkpoints import order_for, tensors_of_blocks, truncate, write_sharded, write_single
from worker.span_download import RANGE_BYTES
from worker.weights import Checkpoint, fetch_checkpoint


class FolderReader:
    """A CheckpointReader over a folder that remembers which bytes were read, and can fail after some of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: list[tuple[str, int, int]] = []
        self.reads_left = 1_000_000
        self.is_closed = False

    def read(self, file: str, start: int, end: int) -> Iterator[bytes]:
        if self.reads_left == 0:
            raise StageUnavailableError("the coordinator went away")
        self.reads_left -= 1
        self.ranges.append((file, start, end))
        data = (self.folder / file).read_bytes()[start:end]
        middle = len(data) // 2
        yield data[:middle]
        yield data[middle:]

    def close(self) -> None:
        self.is_closed = True

    def num_bytes(self, file: str) -> int:
        return sum(end - start for name, start, end in self.ranges if name == file)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """The folder on the head, as the coordinator reads it."""
    return write_sharded(tmp_path / "head")


def order_from(head: Path) -> LoadOrder:
    """Return the order as a worker on another machine gets it: the folder is not there under its name."""
    spec = resolve(str(head))
    head.rename(head.with_name("moved"))
    return order_for(spec, checkpoint_service="head:7000")


def fetch(
    order: LoadOrder,
    reader: FolderReader,
    cache: Path,
    is_needed: Callable[[str], bool],
    on_progress: Callable[[LoadProgress], None] = lambda _: None,
) -> Checkpoint:
    return fetch_checkpoint(order, is_needed, on_progress, connect=lambda _: reader, cache_folder=cache)


def is_of_block_2(name: str) -> bool:
    return name.startswith("h.2.")


def assert_has_block_2(checkpoint: Checkpoint) -> None:
    assert checkpoint.names() == {"h.2.weight", "h.2.bias"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), tensors_of_blocks()[name])


def test_only_the_bytes_of_needed_tensors_are_read(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    with fetch(order, reader, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    whole = (tmp_path / "moved" / "part-1.safetensors").stat().st_size
    tensors = tensors_of_blocks()
    unneeded = tensors["h.3.weight"].nbytes + tensors["h.3.bias"].nbytes
    assert reader.num_bytes("part-1.safetensors") == whole - unneeded
    assert reader.num_bytes("part-0.safetensors") == 0
    assert reader.is_closed


def test_folder_on_this_machine_is_read_in_place(head: Path, tmp_path: Path) -> None:
    order, reader = order_for(resolve(str(head)), checkpoint_service="head:7000"), FolderReader(head)
    with fetch(order, reader, tmp_path / "cache", is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    assert reader.ranges == []
    assert not (tmp_path / "cache").exists()


def test_folder_of_the_same_name_with_other_files_is_not_mistaken(head: Path, tmp_path: Path) -> None:
    order = order_from(head)
    write_single(head)
    reader = FolderReader(tmp_path / "moved")
    with fetch(order, reader, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    assert reader.ranges


def test_second_load_reads_nothing(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    fetch(order, reader, tmp_path, is_of_block_2).close()
    reader.ranges.clear()
    with fetch(order, reader, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    assert reader.ranges == []


def test_another_span_adds_to_what_is_there(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    fetch(order, reader, tmp_path, is_of_block_2).close()
    reader.ranges.clear()
    with fetch(order, reader, tmp_path, lambda name: name.startswith(("h.2.", "h.3."))) as checkpoint:
        assert torch.equal(checkpoint.tensor("h.3.weight"), tensors_of_blocks()["h.3.weight"])
        assert torch.equal(checkpoint.tensor("h.2.weight"), tensors_of_blocks()["h.2.weight"])
    tensors = tensors_of_blocks()
    assert reader.num_bytes("part-1.safetensors") == tensors["h.3.weight"].nbytes + tensors["h.3.bias"].nbytes


def test_lost_coordinator_costs_only_what_was_under_way(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.transfer.MAX_PARALLEL", 1)  # or the failure may find the other tensor under way too
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    reader.reads_left = 3  # length, header, one tensor
    with pytest.raises(StageUnavailableError, match="went away"):
        fetch(order, reader, tmp_path, is_of_block_2)
    assert reader.is_closed
    again = FolderReader(tmp_path / "moved")
    with fetch(order, again, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    assert len(again.ranges) == 1


def test_line_cut_off_by_a_crash_is_fetched_again(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    fetch(order, reader, tmp_path, is_of_block_2).close()
    (sidecar,) = tmp_path.rglob("part-1.safetensors.ranges")
    lines = sidecar.read_text()
    sidecar.write_text(lines[:-1])
    reader.ranges.clear()
    fetch(order, reader, tmp_path, is_of_block_2).close()
    assert len(reader.ranges) == 1


def test_pickled_shard_is_fetched_whole(tmp_path: Path) -> None:
    order, reader = order_from(write_sharded(tmp_path / "head", "bin")), FolderReader(tmp_path / "moved")
    with fetch(order, reader, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    assert {name for name, _, _ in reader.ranges} == {"part-1.bin"}


def test_long_tensors_are_fetched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.span_download.RANGE_BYTES", 50)
    assert RANGE_BYTES > 50
    order, reader = order_from(write_single(tmp_path / "head")), FolderReader(tmp_path / "moved")
    with fetch(order, reader, tmp_path, is_of_block_2) as checkpoint:
        assert_has_block_2(checkpoint)
    lengths = [end - start for _, start, end in reader.ranges]
    assert max(lengths[2:]) == 50


def test_progress_reaches_the_total(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    reports: list[LoadProgress] = []
    fetch(order, reader, tmp_path, is_of_block_2, reports.append).close()
    tensors = tensors_of_blocks()
    total = tensors["h.2.weight"].nbytes + tensors["h.2.bias"].nbytes
    assert reports[-1] == LoadProgress("downloading", total, total)


def test_truncated_file_on_the_head_is_named(head: Path, tmp_path: Path) -> None:
    truncate(head / "part-1.safetensors", 20)
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match=r"part-1\.safetensors is truncated: .* tensor h\.\d\.\w+ ends"):
        fetch(order, reader, tmp_path, is_of_block_2)


@pytest.mark.parametrize("content", [b"", b"123", b"<html>not found</html>"])
def test_file_on_the_head_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    head = write_single(tmp_path / "head")
    (head / "model.safetensors").write_bytes(content)
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is truncated or not a safetensors file"):
        fetch(order, reader, tmp_path, is_of_block_2)


def test_full_disk_is_told_before_tensors_are_read(head: Path, tmp_path: Path) -> None:
    order, reader = order_from(head), FolderReader(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match="set --download-dir"):
        fetch_checkpoint(
            order,
            is_of_block_2,
            lambda _: None,
            connect=lambda _: reader,
            cache_folder=tmp_path,
            measure=lambda _: 10,
        )
    assert len(reader.ranges) == 2  # the header's length and the header
