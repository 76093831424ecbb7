"""What `--exact` costs: one stage with all blocks, in this process, with and without a fixed reduction order.

    python benchmarks/exactness.py --model /tmp/tinyllama --precision fp32 --concurrency 1,8 --threads 1,2

Both forms take turns, round after round; a ratio is the median over the rounds of exact rate / default rate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import find_token, resolve
from cluster.load_order import LoadOrder
from cluster.microbatch import Epoch, PageDelta, SequenceSampling, StepHeader, StepId
from cluster.model_spec import ModelSpec, Precision
from cluster.request import SamplingParams, SequenceId
from cluster.span import Span
from measures import Workload, describe_machine
from worker.executor import Executor
from worker.loading import TorchSpanLoader

PAGE_SIZE = 64
FORMS = {"default": False, "exact": True}


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one run: prompt tokens, then output tokens after each sequence's first."""

    prefill: float
    decode: float


class Driver:
    """Makes the headers that a coordinator would send to a single stage: whole prompts first, then a token each."""

    def __init__(self, executor: Executor, workload: Workload) -> None:
        self._executor = executor
        self._workload = workload
        self._num_steps = 0

    def run(self) -> Rates:
        """Run the workload from empty caches."""
        self._executor.open_epoch()
        self._num_steps = 0
        prompts = self._workload.prompts()
        begin = time.perf_counter()
        tokens = [self._step(index, prompt) for index, prompt in enumerate(prompts)]
        middle = time.perf_counter()
        for number in range(self._workload.num_output_tokens - 1):
            tokens = self._decode(tokens, self._workload.num_input_tokens + number)
        end = time.perf_counter()
        num_decoded = self._workload.num_tokens - len(prompts)
        num_prefilled = len(prompts) * self._workload.num_input_tokens
        return Rates(num_prefilled / (middle - begin), num_decoded / (end - middle))

    def _step(self, index: int, prompt: Sequence[int]) -> int:
        sequence_id = SequenceId(index)
        num_pages = -(-(len(prompt) + self._workload.num_output_tokens) // PAGE_SIZE)
        pages = tuple(range(index * num_pages, (index + 1) * num_pages))
        (token_id,) = self._execute(
            sequence_ids=(sequence_id,),
            start_positions=(0,),
            lengths=(len(prompt),),
            token_ids=tuple(prompt),
            page_deltas=(PageDelta(sequence_id, 0, pages),),
            sampling_changes=(SequenceSampling(sequence_id, len(prompt), SamplingParams(temperature=0.0)),),
        )
        return token_id

    def _decode(self, tokens: Sequence[int], position: int) -> list[int]:
        size = len(tokens)
        columns: dict[str, Any] = {
            "sequence_ids": tuple(SequenceId(index) for index in range(size)),
            "start_positions": (position,) * size,
            "lengths": (1,) * size,
            "token_ids": tuple(tokens),
        }
        return list(self._execute(**columns))

    def _execute(self, *, sequence_ids: tuple[SequenceId, ...], **columns: Any) -> tuple[int, ...]:
        self._num_steps += 1
        ones = (1,) * len(sequence_ids)
        header = StepHeader(
            epoch=Epoch(1, 1),
            step_id=StepId(self._num_steps),
            deadline_ms=600_000,
            sequence_ids=sequence_ids,
            logits_rows=ones,
            is_sampled=(True,) * len(ones),
            **columns,
        )
        result = self._executor.execute(header, {}, lambda _: None).result
        assert result is not None
        return result.token_ids


def load(spec: ModelSpec, precision: Precision, *, num_pages: int, max_context: int, is_exact: bool) -> Executor:
    """Load all blocks into one stage on the CPU."""
    order = LoadOrder(
        stage=0,
        num_stages=1,
        span=Span(0, spec.num_blocks),
        config=spec.config,
        source=spec.source,
        checkpoint_service="",
        weight_files=spec.weight_files,
        weight_map=spec.weight_map,
        precision=precision,
        kv_dtype="auto",
        wire_dtype="auto",
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_context=max_context,
        is_exact=is_exact,
        token=find_token() or "",
    )
    return TorchSpanLoader(torch.device("cpu")).load(order, lambda _: None).executor


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of every (threads, concurrency)."""
    spec = resolve(arguments.model, token=find_token())
    length = arguments.input_tokens + arguments.output_tokens
    size = {"num_pages": max(arguments.concurrency) * -(-length // PAGE_SIZE), "max_context": length}
    precision = Precision(arguments.precision)
    stages = {form: load(spec, precision, is_exact=is_exact, **size) for form, is_exact in FORMS.items()}
    figures = []
    for num_threads, concurrency in product(arguments.threads, arguments.concurrency):
        torch.set_num_threads(num_threads)
        workload = Workload(concurrency, arguments.input_tokens, arguments.output_tokens, spec.vocab_size)
        drivers = {form: Driver(stage, workload) for form, stage in stages.items()}
        rounds = [{form: driver.run() for form, driver in drivers.items()} for _ in range(arguments.rounds + 1)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="alias, hub id or folder")
    parser.add_argument("--precision", choices=[precision.value for precision in Precision], default="fp32")
    parser.add_argument("--concurrency", type=_integers, default=[1, 8])
    parser.add_argument("--threads", type=_integers, default=[1, 2])
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()

    machine = describe_machine()
    figures = measure(arguments)
    if arguments.json:
        report = {"machine": machine, "benchmark": shlex.join(sys.argv), "results": figures}
        print(json.dumps(report, indent=1))
    else:
        Console().print(machine, make_table(figures))


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
