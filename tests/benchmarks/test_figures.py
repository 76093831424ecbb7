"""The arithmetic of the benchmarks that compare with other systems."""

from __future__ import annotations

import math

import pytest

from bloom import pass_figures
from cluster.errors import ConfigurationError
from linear_kernels import block_shapes
from measures import Round, Workload
from quality import Score, cut, make_markdown
from resident import Rates, Results, rates_of
from streamed import decode_figures, summarize

WORKLOAD = Workload(concurrency=2, num_input_tokens=10, num_output_tokens=5, vocab_size=1000)


def test_decode_rate_leaves_out_the_time_to_the_first_tokens() -> None:
    rates = rates_of(WORKLOAD, Round(2.0, 2, [], []), Round(6.0, 10, [], []))
    assert (rates.prefill, rates.decode) == (10.0, 2.0)
    assert rates.whole == pytest.approx(10 / 6)


def test_a_ratio_is_the_median_over_the_rounds_of_two_rates_of_one_round() -> None:
    ours = [Rates(1.0, rate, 1.0) for rate in (10.0, 30.0, 20.0)]
    theirs = [Rates(1.0, rate, 1.0) for rate in (5.0, 30.0, 5.0)]
    figures = Results(WORKLOAD, {"stage": ours, "vllm": theirs}).summary()["systems"]
    assert figures["stage"]["ratios"]["vllm"]["decode"] == 2.0
    assert "ratios" not in figures["vllm"]


def test_decode_passes_are_timed_by_delays_where_a_system_tells_them() -> None:
    first, whole = Round(2.0, 2, [], [], 1, 100), Round(9.0, 10, [1.0, 1.0], [0.5] * 8, 5, 500)
    figures = decode_figures(WORKLOAD, first, whole)
    assert (figures["seconds_per_pass"], figures["seconds_per_token"]) == (0.5, 0.25)
    assert (figures["bytes_per_pass"], figures["bytes_per_second"]) == (100, 200)


def test_decode_passes_are_timed_by_two_runs_otherwise() -> None:
    figures = decode_figures(WORKLOAD, Round(2.0, 2, [], []), Round(6.0, 10, [], []))
    assert (figures["seconds_per_pass"], figures["tokens_per_minute"]) == (1.0, 120.0)


def test_share_of_the_disk_is_against_the_mean_of_before_and_after() -> None:
    run = decode_figures(WORKLOAD, Round(2.0, 2, [], [], 1, 100), Round(9.0, 10, [1.0, 1.0], [0.5] * 8, 5, 500))
    disk = [{"bytes_per_second": 150.0}, {"bytes_per_second": 250.0}]
    peer = run | {"seconds_per_token": 1.0}
    ours = {"runs": {"2": run}, "peak_bytes": 7, "disk": disk}
    rows = summarize({"int8, all streamed": [ours], "airllm": [{"runs": {"2": peer}, "peak_bytes": 9}]})
    assert rows[0]["share_of_disk"] == 1.0
    assert rows[0]["faster_than"] == {"airllm": 4.0}
    assert "faster_than" not in rows[1]


def test_a_pass_serves_all_requests() -> None:
    figures = pass_figures(WORKLOAD, Round(9.0, 10, [1.0, 3.0], [2.0] * 8, 5, 500, 0.9))
    assert (figures["seconds_per_pass"], figures["tokens_per_minute"], figures["bytes_per_pass"]) == (2.0, 60.0, 100.0)


def test_windows_predict_enough_tokens_and_are_spread_over_the_text() -> None:
    windows = cut(range(1000), num_tokens=25, window=10)
    assert [window[0] for window in windows] == [0, 330, 660]
    assert all(len(window) == 10 for window in windows)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        cut(range(20), num_tokens=100, window=10)


def test_perplexity_is_compared_with_fp32() -> None:
    scores = [Score("Spanwise", "fp32", 2 * math.log(10), 2), Score("Spanwise", "nf4", 2 * math.log(11), 2)]
    assert make_markdown(scores).splitlines()[-1] == "| nf4 | Spanwise | 11.000 | +10.00% |"


def test_products_of_a_block_hold_all_of_its_parameters() -> None:
    config = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert sum(rows * columns for rows, columns in block_shapes(config)) == 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 12
