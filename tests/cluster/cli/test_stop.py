import os
import signal
import subprocess
import sys

import pytest

from cluster.cli.local_runs import find_run, run_store
from cluster.cli.stop import PATIENCE_SECONDS, wait_until_gone
from cluster.errors import NotFoundError
from cluster.runs import RunRecord, process_started


def record_of(pid, *, port=7050, started=None):
    return RunRecord(pid, process_started(pid) if started is None else started, f"127.0.0.1:{port}", "m", "/logs")


@pytest.fixture
def child():
    """A process that ends at SIGTERM and is collected at once, as an orphan would be."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_stop_ends_the_recorded_process(run, child):
    run_store().write(record_of(child.pid))
    result = run("stop")
    assert result.exit_code == 0
    assert result.output == "stopped m on port 7050\n"
    assert child.wait() == -signal.SIGTERM


def test_stop_leaves_a_process_alone_that_only_has_the_same_number(run, child):
    run_store().write(record_of(child.pid, started="1"))
    result = run("stop")
    assert result.exit_code == 0
    assert "nothing to stop" in result.output
    assert child.poll() is None


def test_stop_without_any_run_says_so(run):
    result = run("stop", "--port", 7051)
    assert result.exit_code == 1
    assert "was started on port 7051" in result.stderr


def test_stop_gives_up_after_its_patience_and_says_how_to_go_on():
    time = [0.0]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        time[0] += seconds

    assert not wait_until_gone(record_of(os.getpid()), now=lambda: time[0], sleep=sleep)
    assert sum(slept) == pytest.approx(PATIENCE_SECONDS, abs=0.2)


def test_the_only_run_alive_is_meant_and_several_need_a_port(child):
    run_store().write(record_of(1, port=7050, started="1"))
    run_store().write(record_of(child.pid, port=7051))
    assert find_run(None).port == 7051
    assert find_run(7050).pid == 1
    run_store().write(record_of(os.getpid(), port=7052))
    with pytest.raises(NotFoundError, match="7051, 7052"):
        find_run(None)
