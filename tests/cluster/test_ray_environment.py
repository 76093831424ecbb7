from __future__ import annotations

from pathlib import Path

import pytest

from cluster.ray_environment import ray_environment


def test_nothing_that_the_user_has_set_changes(tmp_path: Path) -> None:
    assert ray_environment({"RAY_worker_niceness": "5"}, tmp_path).keys() == {
        "RAY_USAGE_STATS_ENABLED",
        "RAY_prestart_worker_first_driver",
        "RAY_DEDUP_LOGS_SKIP_REGEX",
    }


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_token_of_the_environment_is_used_unless_authentication_is_off(tmp_path: Path, name: str) -> None:
    assert ray_environment({name: "x"}, tmp_path)["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE" not in ray_environment({name: "x", "RAY_AUTH_MODE": "disabled"}, tmp_path)


def test_token_of_the_home_folder_is_used(tmp_path: Path) -> None:
    assert "RAY_AUTH_MODE" not in ray_environment({}, tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert ray_environment({}, tmp_path)["RAY_AUTH_MODE"] == "token"
