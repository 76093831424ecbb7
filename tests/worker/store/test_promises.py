"""Promises are seen by others while they hold, and by nobody once their process is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.store.promises import Promise, announced, read_promises

ROOT = Path(__file__).parents[3]
PROMISE = Promise({"key/block-0000.weights": 7}, {"/cache/shard": 9})


def announce_until_killed(root: Path) -> None:
    with announced(root, PROMISE):
        print("ready", flush=True)
        input()


def test_a_promise_is_seen_while_it_holds(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    with announced(root, PROMISE):
        with announced(root, PROMISE):
            assert read_promises(root) == [PROMISE, PROMISE]
        assert read_promises(root) == [PROMISE]
    assert list(root.iterdir()) == []


def test_a_promise_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.worker.store.test_promises", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert read_promises(tmp_path) == [PROMISE]
        process.kill()
    assert len(list(tmp_path.iterdir())) == 1
    assert read_promises(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_promise_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with announced(root, PROMISE):
        assert read_promises(root) == []


def test_a_file_that_is_no_promise_counts_for_nothing(tmp_path: Path) -> None:
    with announced(tmp_path, PROMISE):
        (path,) = tmp_path.iterdir()
        path.write_text("[1")
        assert read_promises(tmp_path) == []


def test_what_fails_within_takes_its_promise_along(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), announced(tmp_path, PROMISE):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    announce_until_killed(Path(sys.argv[1]))
