import json
import os
from contextlib import ExitStack, closing

import pytest

from cluster.cli.local_runs import run_store
from cluster.cli.logs import Tail, merge
from cluster.logs import LogLine
from cluster.runs import RunRecord


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def line(second, message, **extras):
    return LogLine(f"2026-01-01T00:00:0{second}.000+00:00", "INFO", "x", message, **extras)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    run_store().write(RunRecord(1, "never", "127.0.0.1:7050", "m", str(folder), worker_ids=("w1", "w0")))
    return folder


def test_lines_of_all_processes_come_in_the_order_of_time(run, folder):
    (folder / "coordinator.log").write_text(f"{line(1, 'a').as_text()}\n{line(3, 'c').as_text()}\n")
    (folder / "worker-w0.log").write_text(f"{line(2, 'b', request_id='r1').as_json()}\n")
    output = run("logs").output.splitlines()
    assert [text.split(" | ")[0] for text in output] == ["coordinator", "worker-w0", "coordinator"]
    assert output[1] == f"worker-w0 | {line(2, 'b', request_id='r1').as_text()}"


def test_stage_selects_the_log_of_its_worker(run, folder):
    (folder / "coordinator.log").write_text(f"{line(1, 'a').as_text()}\n")
    (folder / "worker-w0.log").write_text(f"{line(2, 'b').as_text()}\n")
    assert run("logs", "--stage", 1).output == f"worker-w0 | {line(2, 'b').as_text()}\n"
    assert "a worker on another node" in run("logs", "--stage", 0).stderr
    assert "m has 2 stages" in run("logs", "--stage", 2).stderr


def test_tracebacks_stay_with_their_record(run, folder):
    (folder / "coordinator.log").write_text(f"{line(1, 'a').as_text()}\nTraceback:\n  boom\n{line(2, 'b').as_text()}\n")
    first, second = (json.loads(text) for text in run("logs", "--json").output.splitlines())
    assert first["message"] == "a\nTraceback:\n  boom"
    assert first["source"] == "coordinator"
    assert second["message"] == "b"
    assert run("logs", "-n", 1).output == f"coordinator | {line(2, 'b').as_text()}\n"


@pytest.mark.usefixtures("folder")
def test_no_run_and_no_log_are_told(run):
    assert "there is no log" in run("logs").stderr
    assert "was started on port 9" in run("logs", "--port", 9).stderr


def test_tail_gives_only_what_is_new_and_whole(tmp_path, stack):
    path = tmp_path / "a.log"
    path.write_text(f"{line(1, 'a').as_text()}\n")
    tail = stack.enter_context(closing(Tail(path)))
    assert [entry.time[-11:-6] for entry in merge([tail])] == ["1.000"]
    with path.open("a") as file:
        file.write("2026-01-01T00:00:02.000+00:00 INFO x: hal")
        file.flush()
        assert merge([tail]) == []
        file.write("f\n")
    (entry,) = merge([tail])
    assert entry.format(False).endswith("x: half")


def test_tail_follows_rotation_without_losing_a_line(tmp_path, stack):
    path = tmp_path / "a.log"
    path.write_text(f"{line(1, 'a').as_text()}\n")
    tail = stack.enter_context(closing(Tail(path)))
    merge([tail])
    with path.open("a") as file:
        file.write(f"{line(2, 'b').as_text()}\n")
    os.rename(path, tmp_path / "a.log.1")
    assert [entry.format(False)[-1] for entry in merge([tail])] == ["b"]
    path.write_text(f"{line(3, 'c').as_text()}\n")
    assert [entry.format(False)[-1] for entry in merge([tail])] == ["c"]
    assert merge([tail]) == []
