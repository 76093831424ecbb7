"""A repository on the hub, pinned to one commit: listed with one request, or from the cache when there is no network.

Covers finding files and fetching small ones (config, tokenizer, index); `cluster.hub.download` fetches weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.hf_api import RepoSibling

from cluster.errors import ConfigurationError
from cluster.hub.download import HubAccess, cached_file, download_file
from cluster.hub.errors import hub_errors, is_unreachable
from cluster.model_spec import CheckpointFile, HubSource

_TIMEOUT_SECONDS = 30.0
_PROBE = "config.json"  # every transformers checkpoint has one


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of a repository at one commit, by name."""

    source: HubSource
    by_name: Mapping[str, CheckpointFile]
    access: HubAccess

    @property
    def label(self) -> str:
        """Name it in a message."""
        return f"{self.source.repo_id} at commit {self.source.commit[:8]}"

    def path(self, name: str) -> Path:
        """Return where a file is on this machine, after fetching it if need be."""
        return download_file(self.source.repo_id, name, self.source.commit, self.access)


def open_repository(repo_id: str, revision: str, access: HubAccess) -> Repository:
    """List a repository at the commit that `revision` names now.

    Raises PermissionDeniedError (gated), NotFoundError (missing, private), AuthenticationError (bad token), and
    ConfigurationError when the hub cannot be reached and the cache has no such revision.
    """
    try:
        return _list_online(repo_id, revision, access)
    except ConfigurationError as error:
        cached = _list_cached(repo_id, revision, access) if is_unreachable(error) else None
        if cached is None:
            raise
        return cached


def _list_online(repo_id: str, revision: str, access: HubAccess) -> Repository:
    api = HfApi(endpoint=access.endpoint, token=access.token)
    with hub_errors(repo_id, access.endpoint):
        info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        if info.gated:
            # The listing of a gated repository is public; only its files tell whether this token may have them.
            url = hf_hub_url(repo_id, _PROBE, revision=info.sha, endpoint=access.endpoint)
            get_hf_file_metadata(url, token=access.token, timeout=_TIMEOUT_SECONDS)
    files = {file.rfilename: _describe(file) for file in info.siblings or ()}
    if _PROBE in files:
        # By the revision's name rather than the commit, so that the cache knows the name when there is no network.
        download_file(repo_id, _PROBE, revision, access)
    return Repository(HubSource(repo_id, info.sha, access.endpoint), files, access)


def _describe(file: RepoSibling) -> CheckpointFile:
    return CheckpointFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "")


def _list_cached(repo_id: str, revision: str, access: HubAccess) -> Repository | None:
    found = cached_file(repo_id, _PROBE, revision, access)
    if found is None:
        return None
    snapshot = found.parent
    paths = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    files = {name: CheckpointFile(name, path.stat().st_size) for name, path in paths.items()}
    return Repository(HubSource(repo_id, snapshot.name, access.endpoint), files, access)


def is_repo_id(name: str) -> bool:
    """Tell whether a name looks like owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
