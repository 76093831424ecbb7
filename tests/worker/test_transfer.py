from __future__ import annotations

from threading import Event

import pytest

from cluster.load_order import LoadProgress
from worker.transfer import MAX_PARALLEL, ByteCounter, TransferStoppedError, run_transfers

TIMEOUT_SECONDS = 30.0  # of a test that would hang otherwise


def test_stalled_transfer_still_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.transfer.REPORT_SECONDS", 0.001)
    go_on, reports = Event(), list[LoadProgress]()

    def stalled() -> None:
        counter.add(3)
        assert go_on.wait(TIMEOUT_SECONDS)
        counter.add(4)

    def report(progress: LoadProgress) -> None:
        reports.append(progress)
        if [past.bytes_done for past in reports].count(3) == 3:
            go_on.set()

    counter = ByteCounter(0)
    run_transfers([stalled], counter, 7, report)
    assert reports[-1] == LoadProgress("downloading", 7, 7)


def test_failure_stops_the_others_and_starts_no_more() -> None:
    is_running, started = Event(), list[int]()
    counter = ByteCounter(0)

    def endless() -> None:
        is_running.set()
        while True:
            counter.add(1)

    def failing() -> None:
        assert is_running.wait(TIMEOUT_SECONDS)
        raise OSError("disk on fire")

    transfers = [endless, failing, *([endless] * MAX_PARALLEL), lambda: started.append(1)]
    with pytest.raises(OSError, match="disk on fire"):
        run_transfers(transfers, counter, 0, lambda _: None)
    assert started == []


def test_nothing_to_transfer_reports_nothing() -> None:
    reports: list[LoadProgress] = []
    run_transfers([], ByteCounter(5), 5, reports.append)
    assert reports == []


def test_stopped_counter_refuses_bytes() -> None:
    counter = ByteCounter(1)
    counter.stop()
    with pytest.raises(TransferStoppedError):
        counter.add(1)
    assert counter.bytes_done == 1
