"""What workers may plan with stays below what Ray's memory monitor allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import parse_size
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


@pytest.mark.parametrize("num_workers", [1, 3])
def test_memory_asked_for_stays_below_what_the_monitor_allows_beside_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """The processes have taken theirs already; of 24 GiB, 4 are free and 7 % must stay so."""
    monkeypatch.delenv("RAY_memory_usage_threshold", raising=False)
    monkeypatch.setattr(machine, "host_memory", lambda: (4 * GIB, 24 * GIB))
    taken = GIB // 2
    limit = taken + int(4 * GIB - 0.07 * 24 * GIB) // num_workers
    machine.check_memory(limit - 1, num_workers, taken)
    with pytest.raises(ConfigurationError, match=rf"to each of {num_workers} .*has 4\.00 GiB free of 24\.00 GiB.*95%"):
        machine.check_memory(limit + 2, num_workers, taken)


@settings(deadline=None)
@given(st.integers(1, 2**36), st.integers(1, 6))
def test_the_most_that_a_refusal_allows_is_allowed(free: int, num_workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "host_memory", lambda: (free, 2**36))
        with pytest.raises(ConfigurationError) as caught:
            machine.check_memory(2**40, num_workers, GIB // 2)
        most = parse_size("memory", str(caught.value).partition("at most ")[2])
        if most > GIB // 2:
            machine.check_memory(most, num_workers, GIB // 2)


def test_less_than_the_process_takes_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: (4 * GIB, 24 * GIB))
    with pytest.raises(ConfigurationError, match=r"gives 100 MiB .* takes 400 MiB before it loads anything"):
        machine.check_memory(100 * 2**20, 1, 400 * 2**20)
