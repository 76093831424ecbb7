"""Brings the weight files of a span into the hub's cache, several at once: from a worker that has them, else from the
hub. `cluster.hub.download` fetches one from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.errors import ConfigurationError, StorageError
from cluster.hub.download import HubAccess, cached_file, download_file, snapshot_folder
from cluster.load_order import LoadProgress
from cluster.model_spec import CheckpointFile, HubSource
from worker.free_space import RequireSpace
from worker.sharing.copying import Wanted
from worker.sharing.holders import Neighbours
from worker.sharing.shelf import OnBytes
from worker.store.disk import partial as temporary
from worker.transfer import ByteCounter, run_transfers


def download_files(
    source: HubSource,
    files: Sequence[CheckpointFile],
    access: HubAccess,
    on_progress: Callable[[LoadProgress], None],
    require_space: RequireSpace,
    neighbours: Neighbours,
) -> dict[str, Path]:
    """Return where each file is in the hub's cache, after bringing those that it lacks.

    Raises ConfigurationError (no room, no network, a file of another size than the hub announced) and what
    `cluster.hub.errors` says about access.
    """
    missing = [file for file in files if cached_file(source.repo_id, file.name, source.commit, access) is None]
    missing_bytes = sum(file.size_bytes for file in missing)
    require_space(access.folder, missing_bytes)
    total = sum(file.size_bytes for file in files)
    counter = ByteCounter(total - missing_bytes)
    bring = partial(_bring, source, access, neighbours, counter.add)
    run_transfers([partial(bring, file) for file in missing], counter, total, on_progress)
    return {file.name: _checked(file, source, access) for file in files}


def hub_collection(source: HubSource) -> str:
    """Return what workers call the files of a repository at a commit."""
    return f"hub/{source.repo_id}@{source.commit}"


def cached_files(source: HubSource, files: Sequence[CheckpointFile], access: HubAccess) -> dict[str, Path]:
    """Return where the cache has files, those that it has."""
    found = {file.name: cached_file(source.repo_id, file.name, source.commit, access) for file in files}
    return {name: path for name, path in found.items() if path is not None}


def _bring(
    source: HubSource, access: HubAccess, neighbours: Neighbours, on_bytes: OnBytes, file: CheckpointFile
) -> None:
    """Bring a file by its own name, as the hub's client finds it too."""
    folder = snapshot_folder(source.repo_id, source.commit, access)

    def check() -> None:
        copied = temporary(folder / file.name)
        num_bytes = copied.stat().st_size
        if file.size_bytes and num_bytes != file.size_bytes:
            raise StorageError(f"{file.name} has {num_bytes:,} bytes there instead of {file.size_bytes:,}")
        if file.sha256 and _sha256(copied) != file.sha256:
            raise StorageError(f"{file.name} is damaged there: its SHA-256 is not what the hub says")

    def fetch(count: OnBytes) -> None:
        def count_both(num_bytes: int) -> None:
            count(num_bytes)
            on_bytes(num_bytes)

        download_file(source.repo_id, file.name, source.commit, access, count_both)

    try:
        neighbours.bring(Wanted(hub_collection(source), (file.name,), folder, check), fetch, on_bytes)
    except OSError as error:
        raise ConfigurationError(f"cannot write {file.name} to {folder}: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(file: CheckpointFile, source: HubSource, access: HubAccess) -> Path:
    path = download_file(source.repo_id, file.name, source.commit, access).resolve()
    size_bytes = path.stat().st_size
    if file.size_bytes and size_bytes != file.size_bytes:
        raise ConfigurationError(
            f"{file.name} of {source.repo_id} is truncated: {path} has {size_bytes:,} bytes instead of "
            f"{file.size_bytes:,}; delete that file and start again"
        )
    return path
