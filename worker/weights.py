"""The tensors that a span needs, wherever the checkpoint is: fetched if they must be, then memory-mapped.

Covers which files hold them and opening those; `worker.hub_download` and `worker.span_download` fetch,
`worker.safetensors_file` and `worker.pickled_file` read. Not what the tensors mean, nor their precision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from cluster.errors import ConfigurationError
from cluster.hub.download import HubAccess, cached_file, delete_cached_file, snapshot_folder
from cluster.hub.folder import folder_digest
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import CheckpointFile, FolderSource, HubSource
from worker.checkpoint_client import CheckpointReader
from worker.checkpoint_client import connect as connect_checkpoint
from worker.free_space import FreeBytes, free_bytes, require_space
from worker.held_files import HeldFiles, discard_file
from worker.hub_download import download_files
from worker.partial_file import delete_partial_file
from worker.pickled_file import PickledFile
from worker.safetensors_file import SafetensorsFile
from worker.sharing.holders import Neighbours
from worker.span_download import download_span


class TensorFile(Protocol):
    """An open file of tensors."""

    def names(self) -> frozenset[str]: ...

    def size(self, name: str) -> int: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def forget_pages(self) -> None: ...

    def close(self) -> None: ...


class Checkpoint:
    """The needed tensors of a checkpoint, by their names in it. Close it when they are copied; views stay valid."""

    def __init__(self, files: Mapping[str, TensorFile], on_close: Callable[[], None] = lambda: None) -> None:
        self._files = files  # tensor → the file that holds it
        self._on_close = on_close

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

    def forget_pages(self) -> None:
        """Let go of the memory that reading has taken so far, where files are mapped. Tensors stay valid."""
        for file in set(self._files.values()):
            file.forget_pages()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._on_close()


class CheckpointSource:
    """Where an order's checkpoint is, and where its files are kept on this machine if they must be downloaded."""

    def __init__(
        self,
        order: LoadOrder,
        *,
        connect: Callable[[str], CheckpointReader] = connect_checkpoint,
        cache_folder: Path | None = None,
        measure: FreeBytes = free_bytes,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`connect` opens the coordinator's checkpoint service, for a folder that only the head has. `cache_folder` is
        where downloads are kept: by default the order's folder, else the hub's own cache, or `spanwise` in
        XDG_CACHE_HOME for folders. `neighbours` may have files of a hub."""
        self._order, self._connect = order, connect
        self._require_space = partial(require_space, measure=measure, reserve_bytes=order.store.reserve_bytes)
        self._neighbours = neighbours or Neighbours.none()
        self._cache_folder = cache_folder or (Path(found) if (found := order.store.download_folder) else None)
        self.is_downloaded = isinstance(order.source, HubSource) or not is_here(order.source)

    def fetch(self, is_needed: Callable[[str], bool], on_progress: Callable[[LoadProgress], None]) -> Checkpoint:
        """See fetch_checkpoint. Downloaded files are held until the checkpoint is closed."""
        files = needed_files(self._order, is_needed)
        held = self.hold([file.name for file in files])
        try:
            paths = self._bring(files, is_needed, on_progress)
            return open_checkpoint(paths, self._order.weight_map, is_needed, held.close)
        except BaseException:
            held.close()
            raise

    def bring_files(
        self, files: Sequence[CheckpointFile], on_progress: Callable[[LoadProgress], None]
    ) -> Mapping[str, Path]:
        """Return where whole files are, after downloading what is not on this machine."""
        return self._bring(files, lambda _: True, on_progress)

    @property
    def folder(self) -> Path:
        """Where downloads are kept."""
        if isinstance(self._order.source, HubSource):
            return self._access.folder
        return (self._cache_folder or default_cache()) / "checkpoints" / self._order.source.digest

    def hold(self, names: Iterable[str]) -> HeldFiles:
        """Keep other workers of this machine from discarding downloaded files, until it is closed."""
        return HeldFiles(self._locks, names if self.is_downloaded else ())

    def discard(self, name: str) -> None:
        """Delete a downloaded file, unless another worker holds it. Files of a user's folder stay."""
        if self.is_downloaded:
            discard_file(self._locks, name, lambda: self._delete(name))

    def missing(self, files: Iterable[CheckpointFile]) -> dict[Path, int]:
        """Return where those of some files will be that are not downloaded yet, and their bytes, at most."""
        if not self.is_downloaded:
            return {}
        return {self._path(file.name): file.size_bytes for file in files if not self._is_present(file.name)}

    def _bring(
        self,
        files: Sequence[CheckpointFile],
        is_needed: Callable[[str], bool],
        on_progress: Callable[[LoadProgress], None],
    ) -> Mapping[str, Path]:
        source = self._order.source
        if isinstance(source, HubSource):
            return download_files(source, files, self._access, on_progress, self._require_space, self._neighbours)
        if not self.is_downloaded:
            return {file.name: Path(source.path, file.name) for file in files}
        with closing(self._connect(_service_address(self._order))) as reader:
            return download_span(reader, files, is_needed, self.folder, on_progress, self._require_space)

    @property
    def _access(self) -> HubAccess:
        assert isinstance(self._order.source, HubSource)
        return HubAccess(self._order.source.endpoint, self._order.token or None, self._cache_folder)

    @property
    def _locks(self) -> Path:
        source = self._order.source
        name = source.repo_id.replace("/", "--") if isinstance(source, HubSource) else "locks"
        return self.folder / ".spanwise" / name

    def _path(self, name: str) -> Path:
        source = self._order.source
        if isinstance(source, HubSource):
            return snapshot_folder(source.repo_id, source.commit, self._access) / name
        return self.folder / name

    def _is_present(self, name: str) -> bool:
        source = self._order.source
        if isinstance(source, HubSource):
            return cached_file(source.repo_id, name, source.commit, self._access) is not None
        return self._path(name).exists()

    def _delete(self, name: str) -> None:
        source = self._order.source
        if isinstance(source, HubSource):
            delete_cached_file(source.repo_id, name, source.commit, self._access)
        else:
            delete_partial_file(self._path(name))


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

    For the other arguments see CheckpointSource.
    Raises ConfigurationError naming file and tensor for anything missing, truncated or damaged; errors of access and
    network as `cluster.hub.errors` and `cluster.wire.status` tell them.
    """
    source = CheckpointSource(order, connect=connect, cache_folder=cache_folder, measure=measure)
    return source.fetch(is_needed, on_progress)


def is_here(source: FolderSource) -> bool:
    """Tell whether this machine sees the same folder at the same path."""
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


def default_cache() -> Path:
    """Return where spans of folders elsewhere are kept unless a folder is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spanwise"


def needed_files(order: LoadOrder, is_needed: Callable[[str], bool]) -> list[CheckpointFile]:
    """Return the weight files that hold needed tensors; without an index that is every file."""
    names = {file for tensor, file in order.weight_map.items() if is_needed(tensor)}
    return [file for file in order.weight_files if file.name in names or not order.weight_map]


def open_checkpoint(
    paths: Mapping[str, Path],
    weight_map: Mapping[str, str],
    is_needed: Callable[[str], bool],
    on_close: Callable[[], None] = lambda: None,
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
    return Checkpoint(files, on_close)


def _open(name: str, path: Path) -> TensorFile:
    label = str(path) if path.name == name else f"{name} ({path})"  # the hub's cache names files by their contents
    try:
        return SafetensorsFile(path, label) if name.endswith(".safetensors") else PickledFile(path, label)
    except OSError as error:
        raise ConfigurationError(f"cannot read weight file {label}: {error.strerror or error}") from error
