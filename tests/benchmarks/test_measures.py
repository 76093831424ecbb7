"""The arithmetic of the benchmarks."""

from __future__ import annotations

import pytest

from measures import Round, StageWindow, Workload, percentile, summarize, summarize_stages


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.95, 4.0), (0.25, 1.0), (1.0, 4.0)])
def test_percentile_is_the_smallest_value_that_covers_its_share(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_percentile_of_nothing_is_zero() -> None:
    assert percentile([], 0.5) == 0.0


def test_workload_gives_every_system_the_same_prompts() -> None:
    workload = Workload(concurrency=3, num_input_tokens=5, num_output_tokens=2, vocab_size=1000)
    prompts = workload.prompts()
    assert prompts == workload.prompts()
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert all(300 <= token_id < 1000 for prompt in prompts for token_id in prompt)
    assert workload.num_tokens == 6


def test_rates_are_summed_up_over_rounds_and_delays_over_requests() -> None:
    rounds = [Round(2.0, 20, [0.1, 0.3], [0.01]), Round(1.0, 20, [0.2], [0.03, 0.02])]
    summary = summarize(rounds)
    assert summary["tokens_per_second"] == {"median": 15.0, "best": 20.0, "rounds": [10.0, 20.0]}
    assert summary["first_token_seconds"] == {"p50": 0.2, "p99": 0.3}
    assert summary["inter_token_seconds"] == {"p50": 0.02, "p95": 0.03, "p99": 0.03}


def test_a_hop_that_nobody_measured_stays_unknown() -> None:
    windows = [[StageWindow(0, 4, 0.5, 0.25, 0.0, None)], [StageWindow(0, 6, 0.7, 0.05, 0.0, None)]]
    (stage,) = summarize_stages(windows)
    assert stage["hop_seconds"] is None
    assert (stage["num_steps"], stage["busy_share"], stage["bubble_share"]) == (5, 0.6, 0.15)
