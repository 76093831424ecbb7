"""What Ray reads from the environment when it is imported. A decision only; whoever imports Ray for us applies it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def ray_environment(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the variables to set before Ray is imported; what the user has set stays.

    With a token at hand, Ray uses it for a cluster that it finds by itself but not for one whose address is given, and
    that cluster then refuses us. One without authentication does not mind a token.
    """
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let anything else go first
        "RAY_prestart_worker_first_driver": "0",  # our actors could not use what Ray starts ahead
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # its paragraph about a dead worker would hide our sentence
    }
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys())
    if has_token or (home / ".ray" / "auth_token").exists():
        wanted["RAY_AUTH_MODE"] = "token"
    return {name: value for name, value in wanted.items() if name not in environment}
