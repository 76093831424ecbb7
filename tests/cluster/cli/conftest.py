from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, and no settings of the developer's own."""
    import os

    for name in list(os.environ):
        if name.startswith("SPANWISE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "state"


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command in this process."""
    return lambda *arguments, **options: CliRunner().invoke(app, [str(a) for a in arguments], **options)
