"""Fetches the weight files of a span from the hub, several at once. `cluster.hub.download` fetches one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.errors import ConfigurationError
from cluster.hub.download import HubAccess, cached_file, download_file
from cluster.load_order import LoadProgress
from cluster.model_spec import CheckpointFile, HubSource
from worker.free_space import FreeBytes, require_space
from worker.transfer import ByteCounter, run_transfers

CACHE_SETTING = "HF_HOME"


def download_files(
    source: HubSource,
    files: Sequence[CheckpointFile],
    access: HubAccess,
    on_progress: Callable[[LoadProgress], None],
    measure: FreeBytes,
) -> dict[str, Path]:
    """Return where each file is in the hub's cache, after fetching those that it lacks.

    Raises ConfigurationError (no room, no network, a file of another size than the hub announced) and what
    `cluster.hub.errors` says about access.
    """
    missing = [file for file in files if cached_file(source.repo_id, file.name, source.commit, access) is None]
    missing_bytes = sum(file.size_bytes for file in missing)
    require_space(access.folder, missing_bytes, CACHE_SETTING, measure)
    total = sum(file.size_bytes for file in files)
    counter = ByteCounter(total - missing_bytes)
    fetch = partial(download_file, source.repo_id, revision=source.commit, access=access, on_bytes=counter.add)
    run_transfers([partial(fetch, file.name) for file in missing], counter, total, on_progress)
    return {file.name: _checked(file, source, access) for file in files}


def _checked(file: CheckpointFile, source: HubSource, access: HubAccess) -> Path:
    path = download_file(source.repo_id, file.name, source.commit, access).resolve()
    size_bytes = path.stat().st_size
    if file.size_bytes and size_bytes != file.size_bytes:
        raise ConfigurationError(
            f"{file.name} of {source.repo_id} is truncated: {path} has {size_bytes:,} bytes instead of "
            f"{file.size_bytes:,}; delete that file and start again"
        )
    return path
