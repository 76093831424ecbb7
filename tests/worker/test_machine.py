"""What workers may plan with stays below what Ray's memory monitor allows."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigurationError
from worker import machine

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "total", "usable"),
    [(100, 100, 85), (60, 100, 51), (20, 100, 12), (5, 100, 0)],
)
def test_a_margin_is_left_and_the_monitor_never_reached(
    monkeypatch: pytest.MonkeyPatch, free: int, total: int, usable: int
) -> None:
    monkeypatch.delenv("RAY_memory_usage_threshold", raising=False)
    monkeypatch.setattr(machine, "host_memory", lambda: (free * GIB, total * GIB))
    assert machine.usable_memory() // GIB == usable
    used = total - free
    assert used * GIB + machine.usable_memory() <= max(used, 0.95 * total) * GIB


def test_a_lower_threshold_of_the_monitor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.5")
    monkeypatch.setattr(machine, "host_memory", lambda: (100 * GIB, 100 * GIB))
    assert machine.usable_memory() // GIB == 48
    assert machine.monitor_threshold({"RAY_memory_usage_threshold": "much"}) == machine.MONITOR_THRESHOLD


def test_more_than_the_machine_has_is_refused_with_what_it_has() -> None:
    machine.check_memory(10 * GIB, 2, 22 * GIB, 0.95)
    with pytest.raises(ConfigurationError, match=r"11\.00 GiB to each of 2.*has 22\.00 GiB.*95%.*at most 10\.45"):
        machine.check_memory(11 * GIB, 2, 22 * GIB, 0.95)
