"""The tensors that a span needs, wherever the checkpoint is: fetched if they must be, then memory-mapped.

Covers which files hold them and opening those; `worker.hub_download` and `worker.folder_download` fetch,
`worker.safetensors_file` and `worker.pickled_file` read. Not what the tensors mean, nor their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from cluster.errors import ConfigurationError
from cluster.model_spec import FolderSource
from worker.executor import LoadOrder, LoadProgress
from worker.pickled_file import PickledFile
from worker.safetensors_file import SafetensorsFile


class TensorFile(Protocol):
    """An open file of tensors."""

    def names(self) -> frozenset[str]: ...

    def size(self, name: str) -> int: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class Checkpoint:
    """The needed tensors of a checkpoint, by their names in it. Close it when they are copied; views stay valid."""

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files  # tensor → the file that holds it

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> frozenset[str]:
        """Return the names that `is_needed` accepted."""
        return frozenset(self._files)

    def size(self, name: str) -> int:
        """Return the tensor's bytes in the checkpoint."""
        return self._files[name].size(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU as stored: a view of the file where its format and alignment allow."""
        return self._files[name].tensor(name)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def fetch_checkpoint(
    order: LoadOrder, is_needed: Callable[[str], bool], on_progress: Callable[[LoadProgress], None]
) -> Checkpoint:
    """Fetch and open the tensors of the checkpoint whose names `is_needed` accepts, and as little else as possible."""
    assert isinstance(order.source, FolderSource)
    needed = needed_files(order, is_needed)
    paths = {name: Path(order.source.path, name) for name in needed}
    return open_checkpoint(paths, order.weight_map, is_needed)


def needed_files(order: LoadOrder, is_needed: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the names of the weight files that hold needed tensors; without an index that is every file."""
    if not order.weight_map:
        return tuple(file.name for file in order.weight_files)
    return tuple(sorted({file for name, file in order.weight_map.items() if is_needed(name)}))


def open_checkpoint(
    paths: Mapping[str, Path], weight_map: Mapping[str, str], is_needed: Callable[[str], bool]
) -> Checkpoint:
    """Open files (name in the checkpoint → where it is). Raises ConfigurationError naming a bad file or tensor."""
    opened = {name: _open(path) for name, path in paths.items()}
    promised = weight_map or {name: shard for shard, file in opened.items() for name in file.names()}
    files: dict[str, TensorFile] = {}
    for name, shard in promised.items():
        if not is_needed(name):
            continue
        if name not in opened[shard].names():
            raise ConfigurationError(
                f"the checkpoint's index says that {shard} holds tensor {name}, but {paths[shard]} does not: "
                f"index and files belong to different checkpoints; fetch the checkpoint again"
            )
        files[name] = opened[shard]
    return Checkpoint(files)


def _open(path: Path) -> TensorFile:
    try:
        return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read weight file {path}: {error.strerror or error}") from error
