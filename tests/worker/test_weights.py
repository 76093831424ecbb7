from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import ConfigurationError
from cluster.hub.resolve import resolve
from cluster.load_order import LoadProgress
from tests.small_checkpoints import (
    order_for,
    shards_of_blocks,
    tensors_of_blocks,
    truncate,
    write_sharded,
    write_single,
)
from worker.weights import Checkpoint, fetch_checkpoint, open_checkpoint

SUFFIXES = ("safetensors", "bin")


def is_of_first_block(name: str) -> bool:
    return name.startswith("h.0.")


def is_any(_: str) -> bool:
    return True


def ignore(_: LoadProgress) -> None:
    """Report nothing."""


def fetch(folder: Path, is_needed: Callable[[str], bool] = is_any) -> Checkpoint:
    return fetch_checkpoint(order_for(resolve(str(folder))), is_needed, ignore)


def assert_holds(checkpoint: Checkpoint, names: set[str]) -> None:
    expected = tensors_of_blocks()
    assert checkpoint.names() == names
    for name in names:
        assert torch.equal(checkpoint.tensor(name), expected[name])
        assert checkpoint.tensor(name).dtype == expected[name].dtype
        assert checkpoint.size(name) == expected[name].nbytes


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_single_file_gives_the_needed_tensors(tmp_path: Path, name: str) -> None:
    with fetch(write_single(tmp_path, name), is_of_first_block) as checkpoint:
        assert_holds(checkpoint, {"h.0.weight", "h.0.bias"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shards_give_every_tensor(tmp_path: Path, suffix: str) -> None:
    with fetch(write_sharded(tmp_path, suffix)) as checkpoint:
        assert_holds(checkpoint, set(tensors_of_blocks()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shard_that_is_not_needed_is_not_opened(tmp_path: Path, suffix: str) -> None:
    write_sharded(tmp_path, suffix)
    (tmp_path / f"part-1.{suffix}").write_bytes(b"not a weight file at all")
    with fetch(tmp_path, is_of_first_block) as checkpoint:
        assert_holds(checkpoint, {"h.0.weight", "h.0.bias"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_outlive_their_checkpoint(tmp_path: Path, suffix: str) -> None:
    with fetch(write_sharded(tmp_path, suffix)) as checkpoint:
        tensor = checkpoint.tensor("wte")
    assert torch.equal(tensor, tensors_of_blocks()["wte"])


def test_aligned_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    with fetch(write_single(tmp_path)) as checkpoint:
        first, second = checkpoint.tensor("wte"), checkpoint.tensor("wte")
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path, suffix: str) -> None:
    write_sharded(tmp_path, suffix)
    before = (tmp_path / f"part-0.{suffix}").read_bytes()
    with fetch(tmp_path) as checkpoint:
        checkpoint.tensor("wte").zero_()
    assert (tmp_path / f"part-0.{suffix}").read_bytes() == before


def test_file_larger_than_memory_is_read(tmp_path: Path) -> None:
    write_single(tmp_path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + torch.tensor([2.5]).numpy().tobytes())
        file.truncate(4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # sparse
    with fetch(tmp_path) as checkpoint:
        assert checkpoint.tensor("w").item() == 2.5


def test_unaligned_and_empty_tensors_are_read(tmp_path: Path) -> None:
    write_single(tmp_path)
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "floats": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [11, 11]},
        "scalar": {"dtype": "I32", "shape": [], "data_offsets": [11, 15]},
    }
    text = json.dumps(header).encode()
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes() + (7).to_bytes(4, "little")
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with fetch(tmp_path) as checkpoint:
        assert checkpoint.tensor("floats").tolist() == [1.5, -2.0]
        assert checkpoint.tensor("odd").tolist() == [1, 2, 3]
        assert checkpoint.tensor("none").shape == (0, 4)
        assert checkpoint.tensor("scalar").item() == 7


def test_pickle_from_before_torch_1_6_is_read(tmp_path: Path) -> None:
    write_single(tmp_path, "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(tensors_of_blocks(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with fetch(tmp_path) as checkpoint:
        assert_holds(checkpoint, set(tensors_of_blocks()))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, is_zip: bool) -> None:
    write_single(tmp_path, "pytorch_model.bin")
    trap = tmp_path / "trap"
    torch.save({"wte": _Trap(trap)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin .* never runs code"):
        fetch(tmp_path)
    assert not trap.exists()


class _Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("num_bytes", [1, 20, 300])
def test_truncated_shard_is_named(tmp_path: Path, suffix: str, num_bytes: int) -> None:
    write_sharded(tmp_path, suffix)
    truncate(tmp_path / f"part-1.{suffix}", num_bytes)
    with pytest.raises(ConfigurationError, match=rf"part-1\.{suffix} is truncated.*fetch it again"):
        fetch(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x01", b"<html>Not found</html>", b"version https://git-lfs.github.com"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_file_that_is_no_weight_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_single(tmp_path, name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=name.replace(".", r"\.")):
        fetch(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        "nonsense",
    ],
)
def test_header_that_makes_no_sense_is_refused(tmp_path: Path, entry: object) -> None:
    write_single(tmp_path)
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigurationError, match="damaged header"):
        fetch(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path, suffix: str) -> None:
    write_sharded(tmp_path, suffix)
    tensors = shards_of_blocks(suffix=suffix)[f"part-1.{suffix}"]
    del tensors["h.3.bias"]
    path = tmp_path / f"part-1.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    with pytest.raises(ConfigurationError, match=rf"part-1\.{suffix} holds tensor h\.3\.bias"):
        fetch(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shard_that_vanished_is_named(tmp_path: Path, suffix: str) -> None:
    write_sharded(tmp_path, suffix)
    name = f"part-1.{suffix}"
    (tmp_path / name).unlink()
    with pytest.raises(ConfigurationError, match=rf"cannot read weight file .*part-1\.{suffix}: No such file"):
        open_checkpoint({name: tmp_path / name}, {}, is_any)


def test_folder_that_is_not_here_and_not_served_says_what_to_do(tmp_path: Path) -> None:
    order = order_for(resolve(str(write_single(tmp_path))))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="copy the folder here, or serve a hub model"):
        fetch_checkpoint(order, is_any, ignore)
