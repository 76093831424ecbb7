"""The tensors that a span needs, wherever the checkpoint is: fetched if they must be, then memory-mapped.

Covers which files hold them and opening those; `worker.hub_download` and `worker.span_download` fetch,
`worker.safetensors_file` and `worker.pickled_file` read. Not what the tensors mean, nor their precision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch

from cluster.errors import ConfigurationError
from cluster.hub.download import HubAccess
from cluster.hub.folder import folder_digest
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import CheckpointFile, FolderSource, HubSource
from worker.checkpoint_client import CheckpointReader
from worker.checkpoint_client import connect as connect_checkpoint
from worker.free_space import FreeBytes, free_bytes
from worker.hub_download import download_files
from worker.pickled_file import PickledFile
from worker.safetensors_file import SafetensorsFile
from worker.span_download import download_span


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
    order: LoadOrder,
    is_needed: Callable[[str], bool],
    on_progress: Callable[[LoadProgress], None],
    *,
    connect: Callable[[str], CheckpointReader] = connect_checkpoint,
    cache_folder: Path | None = None,
    measure: FreeBytes = free_bytes,
) -> Checkpoint:
    """Fetch and open the tensors of the checkpoint whose names `is_needed` accepts, and as little else as possible.

    `connect` opens the coordinator's checkpoint service, for a folder that only the head has. `cache_folder` is where
    fetched files are kept: by default the hub's own cache, or `spanwise` in XDG_CACHE_HOME for folders.
    Raises ConfigurationError naming file and tensor for anything missing, truncated or damaged; errors of access and
    network as `cluster.hub.errors` and `cluster.wire.status` tell them.
    """
    files = needed_files(order, is_needed)
    if isinstance(order.source, HubSource):
        access = HubAccess(order.source.endpoint, order.token or None, cache_folder)
        paths = download_files(order.source, files, access, on_progress, measure)
    elif _is_here(order.source):
        paths = {file.name: Path(order.source.path, file.name) for file in files}
    else:
        folder = (cache_folder or _default_cache()) / "checkpoints" / order.source.digest
        with closing(connect(_service_address(order))) as reader:
            paths = download_span(reader, files, is_needed, folder, on_progress, measure)
    return open_checkpoint(paths, order.weight_map, is_needed)


def _is_here(source: FolderSource) -> bool:
    try:
        return folder_digest(Path(source.path)) == source.digest
    except OSError:
        return False


def _service_address(order: LoadOrder) -> str:
    if not order.checkpoint_service:
        assert isinstance(order.source, FolderSource)
        raise ConfigurationError(
            f"this machine has no folder {order.source.path} with the same files as the head's, and the coordinator "
            f"serves none: copy the folder here, or serve a hub model"
        )
    return order.checkpoint_service


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spanwise"


def needed_files(order: LoadOrder, is_needed: Callable[[str], bool]) -> list[CheckpointFile]:
    """Return the weight files that hold needed tensors; without an index that is every file."""
    names = {file for tensor, file in order.weight_map.items() if is_needed(tensor)}
    return [file for file in order.weight_files if file.name in names or not order.weight_map]


def open_checkpoint(
    paths: Mapping[str, Path], weight_map: Mapping[str, str], is_needed: Callable[[str], bool]
) -> Checkpoint:
    """Open files (name in the checkpoint → where it is). Raises ConfigurationError naming a bad file or tensor."""
    opened = {name: _open(name, path) for name, path in paths.items()}
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


def _open(name: str, path: Path) -> TensorFile:
    label = str(path) if path.name == name else f"{name} ({path})"  # the hub's cache names files by their contents
    try:
        return SafetensorsFile(path, label) if name.endswith(".safetensors") else PickledFile(path, label)
    except OSError as error:
        raise ConfigurationError(f"cannot read weight file {label}: {error.strerror or error}") from error
