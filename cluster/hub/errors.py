"""What the hub's client raises, said in our own errors. Foreign exceptions of the hub stop here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cluster.errors import (
    AuthenticationError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
    SpanwiseError,
)

_LOGIN = "log in with `hf auth login` (or set HF_TOKEN) on the machine that runs `cluster serve`"


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Raise what the hub's client raises as a SpanwiseError that names the repository and says what to do."""
    try:
        yield
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError, KeyError) as error:
        raise _translate(error, repo_id, endpoint) from error


def is_unreachable(error: SpanwiseError) -> bool:
    """Tell whether `hub_errors` raised this because the hub did not answer, or must not be asked."""
    causes = (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError)
    return isinstance(error, ConfigurationError) and isinstance(error.__cause__, causes)


def _translate(error: Exception, repo_id: str, endpoint: str) -> SpanwiseError:
    page = f"{endpoint}/{repo_id}"
    match error:
        case GatedRepoError():
            return PermissionDeniedError(
                f"{repo_id} is gated: accept its licence at {page}, then {_LOGIN}", reason="GATED_MODEL"
            )
        case RepositoryNotFoundError():
            return NotFoundError(
                f"there is no model {repo_id} at {endpoint}, or it is private: check the name at {page}; "
                f"if it is private, {_LOGIN}",
                reason="UNKNOWN_MODEL",
            )
        case RevisionNotFoundError():
            return NotFoundError(f"{repo_id} has no such revision: see {page}/commits", reason="UNKNOWN_REVISION")
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return _unreachable(error, repo_id, endpoint)
        case EntryNotFoundError():
            return NotFoundError(f"{repo_id} lacks a file: {error}", reason="UNKNOWN_FILE")
        case HFValidationError():
            return NotFoundError(f"{repo_id!r} cannot be a hub id: {error}", reason="UNKNOWN_MODEL")
        case HfHubHTTPError():
            return _translate_status(error, repo_id, endpoint)
        case HTTPError():
            return _unreachable(error, repo_id, endpoint)
        case ValueError() | KeyError():
            return ConfigurationError(
                f"{endpoint} does not answer like a hub for {repo_id} ({error}): check HF_ENDPOINT and proxies"
            )
        case _:
            return ConfigurationError(f"{repo_id} could not be downloaded: {error}")


def _translate_status(error: HfHubHTTPError, repo_id: str, endpoint: str) -> SpanwiseError:
    status = error.response.status_code
    if status == 401:
        return AuthenticationError(f"{endpoint} does not accept the hub token: {_LOGIN}", reason="HUB_TOKEN")
    if status == 403:
        return PermissionDeniedError(
            f"the hub token may not read {repo_id}: ask for access at {endpoint}/{repo_id}, then {_LOGIN}"
        )
    return ConfigurationError(f"{endpoint} answered with status {status} for {repo_id}: try again")


def _unreachable(error: BaseException, repo_id: str, endpoint: str) -> ConfigurationError:
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return ConfigurationError(
        f"cannot reach {endpoint} for {repo_id}, and the cache does not have all of it "
        f"({str(cause).splitlines()[0] if str(cause) else type(cause).__name__}): check the network, HTTPS_PROXY "
        f"and HF_ENDPOINT, unset HF_HUB_OFFLINE, or name a local folder"
    )
