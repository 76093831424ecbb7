"""Measure `cluster serve` on this machine, next to transformers' own `generate` with the same threads, in the same run.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype fp32
    python benchmarks/serve.py --model /tmp/tinyllama --precision fp32 --stages 2 --concurrency 1,8,16

All requests of a round arrive at once and generate greedily, ignoring end-of-sequence tokens. The two systems take
turns, round after round, so that whatever else the machine does disturbs both; a ratio is the median over the rounds of
the two rates of one round. Rates count output tokens over the whole round, prompts included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import find_token, resolve
from cluster.model_spec import FolderSource, ModelSpec
from command_line import Parser, integers, run_script
from measures import Round, StageWindow, Workload, describe_machine, summarize, summarize_stages
from peers.environment import variables
from peers.process import Peer
from served import ServedCluster, serving


@dataclass(slots=True)
class Results:
    """All rounds of one concurrency."""

    workload: Workload
    ours: list[Round] = field(default_factory=list)
    stages: list[list[StageWindow]] = field(default_factory=list)
    theirs: list[Round] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the figures that are reported."""
        answer = {
            "concurrency": self.workload.concurrency,
            "spanwise": summarize(self.ours) | {"stages": summarize_stages(self.stages)},
        }
        if self.theirs:
            answer["transformers"] = summarize(self.theirs)
            pairs = zip(self.ours, self.theirs, strict=True)
            ratios = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]
            answer["ratio"] = {"median": median(ratios), "rounds": ratios}
        return answer


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="alias, hub id or folder")
    parser.add_argument("--revision", default="main", help="of a hub id")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights")
    parser.add_argument("--concurrency", type=integers, default="1,8,32", help="requests at once")
    parser.add_argument("--input-tokens", type=int, default=64, help="of every prompt")
    parser.add_argument("--output-tokens", type=int, default=32, help="of every request")
    parser.add_argument("--stages", type=int, default=2, help="that the cluster has")
    parser.add_argument("--threads-per-stage", type=int, default=1, help="that compute")
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    parser.add_argument("--peer-batch", type=int, default=8, help="largest batch given to transformers")
    parser.add_argument("--no-peer", action="store_true", help="measure Spanwise alone")
    parser.add_argument("--load-timeout", type=float, default=900.0, help="seconds until the cluster must be ready")
    parser.add_argument(
        "serve_options", nargs="*", help="after --: further options of `cluster serve`, e.g. -- --exact"
    )
    return parser.parse_measurement(quick="--rounds 1 --concurrency 1,4 --output-tokens 8")


async def measure(arguments: argparse.Namespace, spec: ModelSpec, results: Sequence[Results]) -> str:
    """Fill `results`; return the command line of the cluster that was measured."""
    options = ["--workers", arguments.stages, "--threads", arguments.threads_per_stage]
    options += ["--precision", arguments.precision, "--revision", arguments.revision, *arguments.serve_options]
    with contextlib.ExitStack() as stack:
        peer = None if arguments.no_peer else stack.enter_context(make_peer(arguments, spec))
        async with serving([arguments.model, *map(str, options)], arguments.load_timeout) as served:
            for number in range(-1, arguments.rounds):  # round -1 warms up
                for one in results:
                    await measure_round(served, peer, one, is_kept=number >= 0)
            return shlex.join(served.command)


async def measure_round(served: ServedCluster, peer: Peer | None, results: Results, *, is_kept: bool) -> None:
    """Let both systems do the same workload, one after the other."""
    ours, stages = await served.run(results.workload)
    theirs = peer.run(results.workload) if peer else None
    print(f"{results.workload.concurrency} requests: {ours.tokens_per_second:.1f} tok/s", file=sys.stderr)
    if is_kept:
        results.ours.append(ours)
        results.stages.append(stages)
        if theirs:
            results.theirs.append(theirs)


def make_peer(arguments: argparse.Namespace, spec: ModelSpec) -> Peer:
    """Start transformers on the same checkpoint, with all stages' threads together."""
    source = spec.source
    model, revision = (source.path, "main") if isinstance(source, FolderSource) else (source.repo_id, source.commit)
    num_threads = arguments.stages * arguments.threads_per_stage
    command = [sys.executable, "-m", "peers.transformers_generate", model, arguments.precision]
    command += [str(num_threads), str(arguments.peer_batch), "--revision", revision]
    return Peer(command, variables(None, num_threads))


def print_tables(report: dict[str, Any]) -> None:
    """Print the report for people."""
    console = Console()
    console.print(f"{report['command']}\n{report['machine']}", highlight=False, soft_wrap=True)
    console.print(f"{report['input_tokens']} tokens in, {report['output_tokens']} out, {report['rounds']} rounds\n")
    console.print(rates_table(report["results"]), stages_table(report["results"]), sep="\n")


def rates_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return what clients saw."""
    columns = ("requests", "system", "tok/s", "best", "ratio", "first token p50/p99", "inter-token p50/p95/p99")
    table = Table(*columns, title="Clients (times in ms)")
    for one in results:
        for system in ("spanwise", "transformers"):
            if system in one:
                ratio = f"{one['ratio']['median']:.2f}" if system == "spanwise" and "ratio" in one else ""
                table.add_row(str(one["concurrency"]), system, *_cells(one[system], ratio))
    return table


def _cells(figures: dict[str, Any], ratio: str) -> list[str]:
    rates = figures["tokens_per_second"]
    delays = [_milliseconds(figures[name].values()) for name in ("first_token_seconds", "inter_token_seconds")]
    return [f"{rates['median']:.1f}", f"{rates['best']:.1f}", ratio, *delays]


def _milliseconds(delays: Iterable[float]) -> str:
    return " / ".join(f"{1e3 * seconds:.0f}" for seconds in delays)


def stages_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return what the stages did with the rounds' time, and the hop that leads to each."""
    table = Table("requests", "stage", "steps", "busy", "bubble", "KiB per step", "hop p50 ms", title="Stages")
    for one in results:
        for stage in one["spanwise"]["stages"]:
            hop = f"{1e3 * stage['hop_seconds']:.2f}" if stage["hop_seconds"] is not None else ""
            shares = [f"{stage['busy_share']:.0%}", f"{stage['bubble_share']:.0%}"]
            size = f"{stage['bytes_per_step'] / 1024:.1f}"
            table.add_row(str(one["concurrency"]), str(stage["stage"]), f"{stage['num_steps']:.0f}", *shares, size, hop)
    return table


def main() -> None:
    arguments = parse_arguments()
    spec = resolve(arguments.model, revision=arguments.revision, token=find_token())
    sizes = (arguments.input_tokens, arguments.output_tokens, spec.vocab_size)
    results = [Results(Workload(concurrency, *sizes)) for concurrency in arguments.concurrency]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` ends the cluster, too
    machine = describe_machine()
    command = asyncio.run(measure(arguments, spec, results))
    report = {
        "machine": machine,
        "benchmark": shlex.join(sys.argv),
        "command": command,
        "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens,
        "rounds": arguments.rounds,
        "peer_batch": arguments.peer_batch,
        "results": [one.summary() for one in results],
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print_tables(report)


if __name__ == "__main__":
    run_script(main)
