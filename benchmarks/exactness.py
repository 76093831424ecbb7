"""What `--exact` costs: one stage with all blocks, in this process, with and without a fixed reduction order.

    python benchmarks/exactness.py --model /tmp/tinyllama --precision fp32 --concurrency 1,8 --threads 1,2

Both forms take turns, round after round; a ratio is the median over the rounds of exact rate / default rate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import find_token, resolve
from cluster.model_spec import Precision
from command_line import Parser, integers, run_script
from measures import Workload, describe_machine
from stage import Driver, load

FORMS = {"default": False, "exact": True}


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one run: prompt tokens, then output tokens after each sequence's first."""

    prefill: float
    decode: float


def run(driver: Driver, workload: Workload) -> Rates:
    """Run a workload whose prompts are computed one after the other."""
    one = driver.run(workload)
    prefill_seconds = one.first_token_seconds[-1]
    num_decoded = workload.num_tokens - workload.concurrency
    num_prefilled = workload.concurrency * workload.num_input_tokens
    return Rates(num_prefilled / prefill_seconds, num_decoded / (one.wall_seconds - prefill_seconds))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of every (threads, concurrency)."""
    spec = resolve(arguments.model, token=find_token())
    length = arguments.input_tokens + arguments.output_tokens
    size = {"num_sequences": max(arguments.concurrency), "max_context": length}
    precision = Precision(arguments.precision)
    stages = {form: load(spec, precision, is_exact=is_exact, **size).executor for form, is_exact in FORMS.items()}
    figures = []
    for num_threads, concurrency in product(arguments.threads, arguments.concurrency):
        torch.set_num_threads(num_threads)
        workload = Workload(concurrency, arguments.input_tokens, arguments.output_tokens, spec.vocab_size)
        one_by_one = {"max_context": length, "step_tokens": arguments.input_tokens}
        drivers = {form: Driver(stage, **one_by_one) for form, stage in stages.items()}
        rounds = [
            {form: run(driver, workload) for form, driver in drivers.items()} for _ in range(arguments.rounds + 1)
        ]
        figures.append({"threads": num_threads, "concurrency": concurrency, **summarize(rounds[1:])})
    return figures


def summarize(rounds: Sequence[dict[str, Rates]]) -> dict[str, Any]:
    """Return median rates of each form and the median of the rounds' ratios."""
    answer: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        rates = {form: [getattr(one[form], phase) for one in rounds] for form in FORMS}
        ratios = [exact / default for exact, default in zip(rates["exact"], rates["default"], strict=True)]
        answer[phase] = {form: median(values) for form, values in rates.items()} | {"ratio": median(ratios)}
    return answer


def make_table(figures: Sequence[dict[str, Any]]) -> Table:
    """Return the figures for people, in tokens per second."""
    table = Table("threads", "requests", "phase", "default", "exact", "ratio", title="tok/s")
    for one in figures:
        for phase in ("prefill", "decode"):
            cells = [f"{one[phase]['default']:.1f}", f"{one[phase]['exact']:.1f}", f"{one[phase]['ratio']:.2f}"]
            table.add_row(str(one["threads"]), str(one["concurrency"]), phase, *cells)
    return table


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="alias, hub id or folder")
    parser.add_argument(
        "--precision", choices=[precision.value for precision in Precision], default="fp32", help="of weights"
    )
    parser.add_argument("--concurrency", type=integers, default="1,8", help="requests at once")
    parser.add_argument("--threads", type=integers, default="1,2", help="that compute")
    parser.add_argument("--input-tokens", type=int, default=64, help="of every prompt")
    parser.add_argument("--output-tokens", type=int, default=32, help="of every request")
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    arguments = parser.parse_measurement(quick="--rounds 1 --concurrency 1 --threads 1 --output-tokens 4")

    machine = describe_machine()
    figures = measure(arguments)
    if arguments.json:
        report = {"machine": machine, "benchmark": shlex.join(sys.argv), "results": figures}
        print(json.dumps(report, indent=1))
    else:
        Console().print(machine, make_table(figures))


if __name__ == "__main__":
    run_script(main)
