"""One file of a repository, from the hub into the hub's own cache.

Covers access, the cache and counting bytes; `huggingface_hub` resumes interrupted transfers and locks the cache
between processes. Which files, and how many at once, is the caller's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from cluster.hub.errors import hub_errors


def default_endpoint() -> str:
    """Return the hub that HF_ENDPOINT names, else the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How to reach a hub: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and proxies hold where nothing is given."""

    endpoint: str = field(default_factory=default_endpoint)
    token: str | None = field(default=None, repr=False)
    cache_folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the cache is: for messages and for its free space."""
        return self.cache_folder or Path(constants.HF_HUB_CACHE)


def download_file(
    repo_id: str, name: str, revision: str, access: HubAccess, on_bytes: Callable[[int], None] = lambda _: None
) -> Path:
    """Return where a file is in the cache, after fetching it if need be.

    Calls `on_bytes(count)` as bytes arrive, from the calling thread or the transfer's; an exception there ends the
    transfer. `count` is negative when the server makes it start over. Raises what `hub_errors` does.
    """
    with hub_errors(repo_id, access.endpoint):
        found = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            endpoint=access.endpoint,
            token=access.token,
            cache_dir=access.cache_folder,
            tqdm_class=_counting_bar(on_bytes),
        )
    return Path(found)


def cached_file(repo_id: str, name: str, revision: str, access: HubAccess) -> Path | None:
    """Return where the cache has a file, or None."""
    found = try_to_load_from_cache(repo_id, name, cache_dir=access.cache_folder, revision=revision)
    return Path(found) if isinstance(found, str) else None


def snapshot_folder(repo_id: str, commit: str, access: HubAccess) -> Path:
    """Return where the cache has, or would have, the files of a commit."""
    return Path(access.folder, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots", commit)


def delete_cached_file(repo_id: str, name: str, revision: str, access: HubAccess) -> None:
    """Delete a file from the cache: its name at this revision, and its contents, where those lie in the cache too."""
    link = cached_file(repo_id, name, revision, access)
    if link is None:
        return
    contents = link.resolve()
    link.unlink(missing_ok=True)
    if contents.is_relative_to(access.folder.resolve()):
        contents.unlink(missing_ok=True)


def _counting_bar(on_bytes: Callable[[int], None]) -> type:
    """Return a class that stands in for tqdm, since the hub's client reports bytes only to progress bars."""

    class CountingBar:
        def __init__(self, *_: Any, **__: Any) -> None:
            """Draw nothing."""

        def __enter__(self) -> CountingBar:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Called beside `update`, with bytes on the wire: fewer where the transfer compresses."""

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    return CountingBar
