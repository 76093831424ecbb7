import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError
from cluster.runs import RunRecord, RunStore, process_started, state_directory

RECORD = RunRecord(
    pid=os.getpid(),
    process_started=process_started(os.getpid()),
    address="127.0.0.1:7050",
    model="bloom-tiny",
    log_dir="/logs",
    worker_ids=("w1", "w0"),
)


def test_record_is_read_back_by_its_port(tmp_path):
    store = RunStore(tmp_path)
    store.write(RECORD)
    store.write(replace(RECORD, address="[::1]:7051", state="failed", message="no memory"))
    assert store.read(7050) == RECORD
    assert [record.port for record in store.all()] == [7050, 7051]
    assert store.read(7051).message == "no memory"


def test_writing_replaces_and_leaves_no_part_behind(tmp_path):
    store = RunStore(tmp_path)
    store.write(RECORD)
    store.write(replace(RECORD, state="ready"))
    assert store.read(7050).state == "ready"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["7050.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"unknown": 1}'])
def test_damaged_record_counts_as_none(tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "7050.json").write_text(content)
    assert RunStore(tmp_path).read(7050) is None
    assert list(RunStore(tmp_path).all()) == []


def test_no_state_directory_means_no_runs(tmp_path):
    assert RunStore(tmp_path / "none").read(7050) is None
    assert list(RunStore(tmp_path / "none").all()) == []


def test_state_directory_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="XDG_STATE_HOME"):
        RunStore(tmp_path / "file").write(RECORD)


def test_running_process_is_alive_and_an_ended_one_is_not():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = replace(RECORD, pid=child.pid, process_started=process_started(child.pid))
    assert record.is_alive
    child.communicate(b"\n")
    assert not record.is_alive


def test_corpse_that_nobody_collected_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = replace(RECORD, pid=child.pid, process_started=process_started(child.pid))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) if child.stdin.close() is None else None
    assert not record.is_alive
    child.wait()


def test_another_process_with_the_same_number_is_not_taken_for_ours():
    assert RECORD.is_alive
    assert not replace(RECORD, process_started="1").is_alive
    assert not replace(RECORD, process_started="").is_alive


def test_state_directory_follows_the_environment():
    assert state_directory({"XDG_STATE_HOME": "/x"}) == Path("/x/spanwise")
    assert state_directory({}) == Path.home() / ".local" / "state" / "spanwise"
