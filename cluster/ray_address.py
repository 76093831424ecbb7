"""Which Ray cluster to join: the one of this machine, or one at an address, and whether something answers there.

Covers what can be found out, and said, without Ray; `cluster.serve` joins.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from cluster.errors import ConfigurationError


def cluster_of_this_machine() -> str:
    """Return the address that `ray start` or `ray up` left on this machine, if something still listens there."""
    record = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    try:
        address = record.read_text().strip()
    except OSError:
        return ""
    return address if _answers(address) else ""


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3.0):
            return True
    except (OSError, ValueError):
        return False


def check_ray_answers(address: str) -> None:
    """Raise ConfigurationError, with the way out, for an address at which no Ray cluster can be joined."""
    if address.startswith("ray://"):
        raise ConfigurationError(
            f"{address} is a Ray Client address; run `cluster serve` on a node of the cluster (for example through "
            "`ray attach`) with --address auto"
        )
    if address != "auto" and not _answers(address):
        raise ConfigurationError(
            f"no Ray cluster answers at {address}; start one there with `ray start --head` or `ray up`, correct "
            "--address or RAY_ADDRESS, or leave both out to start a local one"
        )


def why_no_ray(address: str, error: Exception) -> str:
    """Return a sentence for what Ray raised when it was to be started ("local") or joined."""
    if address == "local":
        return f"Ray did not start: {error}"
    return (
        f"the Ray cluster at {address} did not let us join: {error}; if it asks for a token, set RAY_AUTH_MODE=token "
        "and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"
    )
