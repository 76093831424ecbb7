"""Whether a memory budget is kept: a process that may use it, under a limit of the budget and a tenth.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype bf16
    python benchmarks/ceiling.py --model /tmp/tinyllama --memory 2.5GiB,1.6GiB,1.2GiB

For every precision and budget, in a control group of its own and from an empty page cache: convert (into a store that
is removed afterwards), load, then the longest prompt that the context allows, many sequences, and some long prompts at
once. Every phase tells how often the limit was hit and the most memory that belongs to the process itself, sampled:
what the page cache takes can be taken from it. Ends with status 1 where a limit was hit. Needs root: control groups.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import resolve
from cluster.model_spec import Precision
from command_line import Parser, names, run_script, sizes
from limits import MemoryGroup, drop_page_cache, memory_limit
from measures import Workload, describe_machine
from peers import environment
from peers.process import Peer, PeerError

PRECISIONS = [precision.value for precision in Precision]
LIMIT_SHARE = 1.1
SAMPLE_SECONDS = 0.005
PHASES = ("convert, load", "longest prompt", "many sequences", "long prompts")


class Sampler:
    """The most memory of a group that is no page cache, since the last `take`."""

    def __init__(self, group: MemoryGroup) -> None:
        self._group, self._peak = group, 0
        self._stop = threading.Event()

    def take(self) -> int:
        """Return the peak in bytes and begin anew."""
        peak, self._peak = self._peak, 0
        return peak

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample until the end of the block."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._group.anonymous_bytes)


def workloads(arguments: argparse.Namespace, vocab_size: int) -> list[Workload]:
    """Return what follows loading, in the order of PHASES."""
    longest = arguments.max_context - arguments.output_tokens
    sizes = [(1, longest), (arguments.sequences, 16), (arguments.long_prompts, longest // 2)]
    return [Workload(number, length, arguments.output_tokens, vocab_size) for number, length in sizes]


def measure(arguments: argparse.Namespace, vocab_size: int, precision: str, budget: int) -> dict[str, Any]:
    """Return the figures of one budget."""
    variables = environment.variables(None, arguments.threads)
    drop_page_cache()
    with TemporaryDirectory(dir=arguments.store_dir) as store, memory_limit(int(budget * LIMIT_SHARE)) as group:
        phases: list[dict[str, Any]] = []
        figures = {"precision": precision, "budget_bytes": budget, "phases": phases}
        sampler = Sampler(group)
        with sampler.running():
            try:
                later = workloads(arguments, vocab_size)
                with Peer(group.wrap(command(arguments, precision, budget, store)), variables) as peer:
                    run(peer, later, group, sampler, figures)
            except PeerError as error:
                phases.append(phase(group, sampler, phases) | {"error": str(error)})
        shutil.rmtree(store)
        Path(store).mkdir()
    return figures


def run(
    peer: Peer, workloads: Sequence[Workload], group: MemoryGroup, sampler: Sampler, figures: dict[str, Any]
) -> None:
    """Go through the phases, adding their figures."""
    phases = figures["phases"]
    figures["about"] = peer.about
    phases.append(phase(group, sampler, phases))
    for workload in workloads:
        peer.run(workload)
        phases.append(phase(group, sampler, phases))


def phase(group: MemoryGroup, sampler: Sampler, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the phase that ends now."""
    num_hits = group.num_times_at_limit - sum(one["num_times_at_limit"] for one in before)
    return {"phase": PHASES[len(before)], "anonymous_bytes": sampler.take(), "num_times_at_limit": num_hits}


def command(arguments: argparse.Namespace, precision: str, budget: int, store: str) -> list[str]:
    """Return the command of the process."""
    options = ["--precision", precision, "--memory", str(budget), "--threads", str(arguments.threads)]
    options += ["--max-context", str(arguments.max_context), "--store-dir", store]
    return [sys.executable, "-m", "local_model", arguments.model, *options]


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the figures for people: per phase MiB, and hits of the limit where there were any."""
    table = Table("precision", "budget MiB", "streamed", *PHASES, "of budget", title="Memory, page cache aside")
    for row in rows:
        cells = [f"{one['anonymous_bytes'] >> 20}{_hits(one)}" for one in row["phases"]]
        cells += [""] * (len(PHASES) - len(cells))
        peak = max(one["anonymous_bytes"] for one in row["phases"])
        streamed = str(row.get("about", {}).get("num_streamed", ""))
        share = f"{peak / row['budget_bytes']:.2f}"
        table.add_row(row["precision"], str(row["budget_bytes"] >> 20), streamed, *cells, share)
    return table


def _hits(phase: dict[str, Any]) -> str:
    hits = f", {phase['num_times_at_limit']} hits" if phase["num_times_at_limit"] else ""
    return hits + (", failed" if "error" in phase else "")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="alias, hub id or folder")
    parser.add_argument("--memory", type=sizes, required=True, help="budgets, e.g. 3GiB,1.5GiB")
    parser.add_argument("--precisions", type=names(PRECISIONS), default="bf16,int8,nf4", help="of weights")
    parser.add_argument(
        "--max-context", type=int, default=2048, help="tokens of the longest prompt and what follows it"
    )
    parser.add_argument("--sequences", type=int, default=16, help="of 16 tokens, at once")
    parser.add_argument("--long-prompts", type=int, default=4, help="of half the context, at once")
    parser.add_argument("--output-tokens", type=int, default=4, help="of every request")
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--store-dir", type=Path, help="where converted weights are for a while")
    return parser.parse_measurement(
        quick="--precisions int8 --max-context 128 --sequences 4 --long-prompts 2 --output-tokens 2"
    )


def main() -> None:
    arguments = parse_arguments()
    vocab_size = resolve(arguments.model).vocab_size
    machine = describe_machine()
    rows = []
    for precision in arguments.precisions:
        for budget in arguments.memory:
            rows.append(measure(arguments, vocab_size, precision, budget))
            print(json.dumps(rows[-1]["phases"]), file=sys.stderr)
    if arguments.json:
        print(json.dumps({"machine": machine, "benchmark": shlex.join(sys.argv), "rows": rows}, indent=1))
    else:
        Console(width=160).print(machine, make_table(rows))
    if any(one["num_times_at_limit"] for row in rows for one in row["phases"]):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
