"""Speed with weights on disk under a memory limit, beside AirLLM and Accelerate, and beside what the disk gives.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype bf16
    python benchmarks/streamed.py --model /tmp/tinyllama --memory 1.5GiB --concurrency 1,16

Every system runs by itself, in a control group with the same memory limit, and begins with an empty page cache; pages
that another group has read would be free. Two forms of ours:

* "PRECISION, all streamed": one stage that reads every block and the head on every pass. Bytes per second of decode
  passes, beside what fio reads of the very same files, directly, with the same sizes and depth, before and after.
* "PRECISION, planned": `LocalModel` with a budget 10 % below the limit: what fits stays in memory.

Seconds per token are those of decode passes, divided by the number of requests, which a pass serves all at once: by the
delays between tokens, or, where a system does not tell them, the time of a run less that of a run for one token. Needs
root, for control groups and the page cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import resolve
from cluster.model_spec import ModelSpec, Precision
from command_line import Parser, checkpoint, integers, names, one_line, run_script, size
from limits import DiskSpeed, MemoryGroup, drop_page_cache, measure_disk, memory_limit
from measures import Round, Workload, describe_machine
from peers import environment
from peers.environment import HUGGING_FACE
from peers.process import Peer, PeerError
from resident import DEFAULT_CACHE, prepare_with
from worker.store.folder import open_store
from worker.store.manifest import SLICE_BYTES

PRECISIONS = ("bf16", "int8", "nf4")
PEERS = {"airllm": "airllm_stream", "accelerate": "accelerate_offload"}
ALL_STREAMED, PLANNED = "all streamed", "planned"
BUDGET_SHARE = 1 / 1.1  # of the limit, for ours
RING_SLOTS = 4
FIO_BYTES, FIO_DEPTH, FIO_SECONDS = 4 << 20, 4, 10.0


def own_command(arguments: argparse.Namespace, form: str, precision: str, num_blocks: int) -> list[str]:
    """Return the command of one form of ours."""
    context = str(arguments.input_tokens + arguments.output_tokens)
    shared = ["--precision", precision, "--threads", str(arguments.threads), "--max-context", context]
    shared += ["--store-dir", str(arguments.cache / "store")]
    if form == PLANNED:
        budget = str(int(arguments.memory * BUDGET_SHARE))
        return [sys.executable, "-m", "local_model", str(arguments.model), "--memory", budget, *shared]
    concurrency = max(arguments.concurrency)
    sizes = ["--max-concurrency", str(concurrency), "--step-tokens", str(concurrency * arguments.input_tokens)]
    ring = ["--streamed", str(num_blocks + 1), "--ring-bytes", str(RING_SLOTS * SLICE_BYTES)]
    return [sys.executable, "-m", "stage", str(arguments.model), *sizes, *ring, *shared]


def peer_command(arguments: argparse.Namespace, name: str) -> list[str]:
    """Return the command of a peer, its form of the checkpoint made on first use."""
    folder = prepare_with(HUGGING_FACE, PEERS[name], arguments.cache, arguments.model)
    options = ["--threads", str(arguments.threads), "--max-concurrency", str(max(arguments.concurrency))]
    return HUGGING_FACE.command(arguments.cache, PEERS[name], ["run", str(folder), *options])


def convert(arguments: argparse.Namespace) -> None:
    """Fill the block store ahead, without a limit: only serving is measured here."""
    for precision in arguments.precisions:
        store = ["--store-dir", str(arguments.cache / "store")]
        command = [sys.executable, "-m", "cluster.cli", "convert", str(arguments.model), "--precision", precision]
        environment.run([*command, *store], environment.variables(None, arguments.threads))


def measure_system(
    arguments: argparse.Namespace, command: Sequence[str], workloads: Sequence[Workload]
) -> dict[str, Any]:
    """Run one system's workloads in a group of its own; return its figures."""
    drop_page_cache()
    variables = environment.variables(None, arguments.threads)
    with (
        memory_limit(arguments.memory) as group,
        Peer(group.wrap(command), variables) as peer,
    ):
        runs = {str(workload.concurrency): run_workload(peer, workload) for workload in workloads}
        return {"about": peer.about, "runs": runs} | describe_group(group)


def run_workload(peer: Peer, workload: Workload) -> dict[str, Any]:
    """Run a workload for one token per request, then for all of them."""
    first = peer.run(replace(workload, num_output_tokens=1))
    return decode_figures(workload, first, peer.run(workload))


def decode_figures(workload: Workload, first: Round, whole: Round) -> dict[str, Any]:
    """Return what the decode passes took and read: what the whole run did beyond the run for one token."""
    delays = sum(whole.inter_token_seconds) / workload.concurrency  # all requests share their passes
    seconds = delays or whole.wall_seconds - first.wall_seconds
    read_bytes = whole.read_bytes - first.read_bytes
    num_passes = workload.num_output_tokens - 1
    return {
        "first_token_seconds": first.wall_seconds,
        "seconds_per_pass": seconds / num_passes,
        "seconds_per_token": seconds / num_passes / workload.concurrency,
        "tokens_per_minute": 60 * num_passes * workload.concurrency / seconds,
        "bytes_per_pass": read_bytes / num_passes,
        "bytes_per_second": read_bytes / seconds,
        "stall_share": (whole.stall_seconds - first.stall_seconds) / seconds,
    }


def describe_group(group: MemoryGroup) -> dict[str, Any]:
    """Return the memory that a system took, page cache included, and how often it hit the limit."""
    return {"peak_bytes": group.peak_bytes, "num_times_at_limit": group.num_times_at_limit}


def systems(arguments: argparse.Namespace, spec: ModelSpec) -> Iterator[tuple[str, list[str]]]:
    """Yield each system's name and command."""
    for precision in arguments.precisions:
        for form in (ALL_STREAMED, PLANNED):
            yield f"{precision}, {form}", own_command(arguments, form, precision, spec.num_blocks)
    for name in arguments.peers:
        yield name, peer_command(arguments, name)


def measure(arguments: argparse.Namespace, spec: ModelSpec) -> dict[str, list[dict[str, Any]]]:
    """Return every system's figures, one per round."""
    workloads = [
        Workload(concurrency, arguments.input_tokens, arguments.output_tokens, spec.vocab_size)
        for concurrency in arguments.concurrency
    ]
    convert(arguments)
    figures: dict[str, list[dict[str, Any]]] = {}
    commands = dict(systems(arguments, spec))
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            before = read_disk(arguments, spec, name) if name.endswith(ALL_STREAMED) else None
            try:
                found = measure_system(arguments, command, workloads)
            except PeerError as error:  # a plan for so little memory may be refused: the others count all the same
                print(f"{name}: {one_line(error)}", file=sys.stderr)
                continue
            if before is not None:
                found["disk"] = [vars_of(before), vars_of(read_disk(arguments, spec, name))]
            figures.setdefault(name, []).append(found)
            print(f"{name}: {found['runs']}", file=sys.stderr)
    if not figures:
        raise SystemExit("streamed.py: no system could be measured")
    return figures


def read_disk(arguments: argparse.Namespace, spec: ModelSpec, name: str) -> DiskSpeed:
    """Measure the disk by the files that a precision streams."""
    store = open_store(arguments.cache / "store", spec.source, Precision(name.partition(",")[0]))
    files = [store.path(part) for part in store.parts() if part != "embedding"]
    drop_page_cache()
    return measure_disk(files, block_bytes=FIO_BYTES, depth=FIO_DEPTH, seconds=arguments.fio_seconds)


def vars_of(speed: DiskSpeed) -> dict[str, Any]:
    """Return a speed for the report."""
    return {"bytes_per_second": speed.bytes_per_second, "method": speed.method}


def summarize(figures: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row per system and concurrency: medians over the rounds, and what the peers take in relation."""
    rows = []
    for name, rounds in figures.items():
        for concurrency in rounds[0]["runs"]:
            runs = [one["runs"][concurrency] for one in rounds]
            row = {"system": name, "concurrency": int(concurrency)}
            row |= {key: median(run[key] for run in runs) for key in runs[0]}
            row["peak_bytes"] = max(one["peak_bytes"] or 0 for one in rounds)
            if "disk" in rounds[0]:
                speeds = [[speed["bytes_per_second"] for speed in one["disk"]] for one in rounds]
                shares = [
                    run["bytes_per_second"] * len(pair) / sum(pair) for run, pair in zip(runs, speeds, strict=True)
                ]
                row["share_of_disk"] = median(shares)
            rows.append(row)
    for row in rows:
        others = [other for other in rows if other["system"] in PEERS and other["concurrency"] == row["concurrency"]]
        if row["system"] not in PEERS:
            row["faster_than"] = {one["system"]: one["seconds_per_token"] / row["seconds_per_token"] for one in others}
    return rows


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the figures for people."""
    columns = ("requests", "system", "s/pass", "s/token", "MB/pass", "GB/s", "of disk", "stalled", "peak MiB")
    peers = sorted({name for row in rows for name in row.get("faster_than", {})})
    table = Table(*columns, *[f"x {name}" for name in peers], title="Weights on disk")
    for row in rows:
        share = f"{row['share_of_disk']:.2f}" if "share_of_disk" in row else ""
        cells = [f"{row['seconds_per_pass']:.3f}", f"{row['seconds_per_token']:.3f}"]
        cells += [f"{row['bytes_per_pass'] / 1e6:.0f}", f"{row['bytes_per_second'] / 1e9:.2f}", share]
        cells += [f"{row['stall_share']:.0%}", f"{row['peak_bytes'] / 2**20:.0f}"]
        ratios = [f"{row['faster_than'][name]:.1f}" if "faster_than" in row else "" for name in peers]
        table.add_row(str(row["concurrency"]), row["system"], *cells, *ratios)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, type=checkpoint, help="a Llama's folder with bf16 weights")
    parser.add_argument("--memory", type=size, default="1.5GiB", help="limit of every system's control group")
    parser.add_argument("--precisions", type=names(PRECISIONS), default=",".join(PRECISIONS), help="ours; - for none")
    parser.add_argument("--peers", type=names([*PEERS]), default=",".join(PEERS), help="other systems; - for none")
    parser.add_argument("--concurrency", type=integers, default="1,16", help="requests at once")
    parser.add_argument("--input-tokens", type=int, default=64, help="of every prompt")
    parser.add_argument("--output-tokens", type=int, default=5, help="of every request")
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--rounds", type=int, default=2, help="that count")
    parser.add_argument("--fio-seconds", type=float, default=FIO_SECONDS, help="of every look at the disk")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps environments and converted weights")
    return parser.parse_measurement(quick="--rounds 1 --output-tokens 3 --fio-seconds 2")


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` ends every process, too
    machine = describe_machine()
    figures = measure(arguments, resolve(str(arguments.model)))
    rows = summarize(figures)
    report = {"machine": machine, "benchmark": shlex.join(sys.argv), "rows": rows, "rounds": figures}
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console(width=160).print(machine, make_table(rows))


if __name__ == "__main__":
    run_script(main)
