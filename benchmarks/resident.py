"""Speed with all weights in memory, beside vLLM, llama.cpp, CTranslate2 and transformers, in the same run.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype bf16
    python benchmarks/resident.py --model /tmp/tinyllama --concurrency 1,8,32

Every system runs in a process of its own with the same number of threads and greedily, ignoring end-of-sequence tokens.
Peers are installed into environments of their own on first use (--cache), at the versions that the report names. They
take turns, round after round, so that whatever else the machine does disturbs all; a ratio is the median over the
rounds of two rates of one round.

A round asks each system twice: for one token per request, which gives the prefill rate (prompt tokens per second), and
for all tokens; the difference of the two times gives the decode rate (output tokens per second after the first ones).
Before that it asks once without a measurement: while others took their turns, the system's memory lay idle for minutes.
"layers" are our int8 linear layers alone, without anything else that a model does: the ceiling for int8. "onednn" are
oneDNN's products alone, whose inputs are quantized already: the ceiling for those who compute with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.hub.resolve import resolve
from command_line import Parser, checkpoint, integers, names, run_script
from measures import Round, Workload, describe_machine
from peers import environment
from peers.environment import Environment
from peers.process import Peer
from served import serving

SERVE = "cluster serve"
CEILINGS = {"layers": "ours", "onednn": "onednn"}
"""Linear layers alone: what `linear_kernels` calls them."""
OURS = ("stage", SERVE)
PEERS: dict[str, tuple[Environment, str]] = {
    "vllm": (environment.VLLM, "vllm_w8a8"),
    "llama.cpp": (environment.LLAMA_CPP, "llama_cpp_q8"),
    "ctranslate2": (environment.CTRANSLATE2, "ctranslate2_int8"),
}
"""Peers with weights in a form of their own: where they run, and the module of `peers` that does."""
TRANSFORMERS = {"transformers fp32": "fp32", "transformers bf16": "bf16"}
SYSTEMS = (*CEILINGS, *OURS, *PEERS, *TRANSFORMERS)
DEFAULT_CACHE = Path("~/.cache/spanwise-benchmarks").expanduser()

Runner = Callable[[Workload], Awaitable[Round]]


@dataclass(frozen=True, slots=True)
class Rates:
    """One round of one system, in tokens per second."""

    prefill: float  # prompt tokens, first tokens included in the time
    decode: float  # output tokens after the first ones
    whole: float  # output tokens, prompts included in the time


@dataclass(slots=True)
class Results:
    """All rounds of one concurrency, by system."""

    workload: Workload
    rates: dict[str, list[Rates]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return medians per system and phase, and each of ours in relation to every other system."""
        return {"concurrency": self.workload.concurrency, "systems": {name: self._of(name) for name in self.rates}}

    def _of(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = {phase: median(self._phase(name, phase)) for phase in ("prefill", "decode", "whole")}
        answer["rounds"] = [[one.prefill, one.decode, one.whole] for one in self.rates[name]]
        if name in OURS:
            answer["ratios"] = {other: self._ratios(name, other) for other in self.rates if other not in OURS}
        return answer

    def _ratios(self, name: str, other: str) -> dict[str, float]:
        return {
            phase: median(ratios(self._phase(name, phase), self._phase(other, phase)))
            for phase in ("prefill", "decode", "whole")
        }

    def _phase(self, name: str, phase: str) -> list[float]:
        return [getattr(one, phase) for one in self.rates[name]]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratio of every round."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def rates_of(workload: Workload, first: Round, whole: Round) -> Rates:
    """Return the rates of a round from the time to the first tokens and the time to all of them."""
    num_later = workload.num_tokens - workload.concurrency
    seconds = whole.wall_seconds - first.wall_seconds
    if seconds <= 0:  # disturbed: a rate that is too low rather than one without a bound
        seconds = whole.wall_seconds
    return Rates(
        prefill=workload.concurrency * workload.num_input_tokens / first.wall_seconds,
        decode=num_later / seconds,
        whole=whole.tokens_per_second,
    )


async def measure_round(runners: dict[str, Runner], results: Results, *, is_kept: bool) -> None:
    """Let every system do the same workload, one after the other."""
    for name, run in runners.items():
        await run(replace(results.workload, num_output_tokens=1))
        first = await run(replace(results.workload, num_output_tokens=1))
        rates = rates_of(results.workload, first, await run(results.workload))
        report = f"{results.workload.concurrency} requests: {rates.prefill:.1f} prefill, {rates.decode:.1f} decode"
        print(f"{name}, {report} tok/s", file=sys.stderr)
        if is_kept:
            results.rates.setdefault(name, []).append(rates)


def prepare_with(where: Environment, module: str, cache: Path, model: Path) -> Path:
    """Return a peer's own form of a checkpoint, made on first use."""
    digest = resolve(str(model)).revision[:12]
    folder = cache / "checkpoints" / f"{module}-{model.name}-{digest}"
    if not folder.is_dir():
        print(f"converting {model} with {module}", file=sys.stderr)
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        command = where.command(cache, module, ["prepare", str(model), str(unfinished)])
        environment.run(command, environment.variables(where, 2))
        unfinished.rename(folder)
    return folder


def start(arguments: argparse.Namespace, name: str, sizes: Sequence[str]) -> Peer:
    """Start a system in a process of its own."""
    threads = ["--threads", str(arguments.threads)]
    if name in PEERS:
        where, module = PEERS[name]
        folder = prepare_with(where, module, arguments.cache, arguments.model)
        command = where.command(arguments.cache, module, ["run", str(folder), *threads, *sizes])
        return Peer(command, environment.variables(where, arguments.threads))
    python = [sys.executable, "-m"]
    model = str(arguments.model)
    if name in CEILINGS:
        command = [*python, "linear_kernels", model, CEILINGS[name], *threads]
    elif name in TRANSFORMERS:
        batch = str(max(arguments.concurrency))
        command = [*python, "peers.transformers_generate", model, TRANSFORMERS[name], str(arguments.threads), batch]
    else:
        store = ["--store-dir", str(arguments.cache / "store")]
        command = [*python, "stage", model, "--precision", arguments.precision, *store, *threads, *sizes]
    return Peer(command, environment.variables(None, arguments.threads))


def as_runner(peer: Peer) -> Runner:
    """Return how to run a workload in a peer's process."""

    async def run(workload: Workload) -> Round:
        return peer.run(workload)

    return run


async def measure(arguments: argparse.Namespace, results: Sequence[Results]) -> dict[str, Any]:
    """Fill `results`; return what each system said of itself."""
    about: dict[str, Any] = {}
    runners: dict[str, Runner] = {}
    context = arguments.input_tokens + arguments.output_tokens
    sizes = ["--max-concurrency", str(max(arguments.concurrency)), "--max-context", str(context)]
    async with contextlib.AsyncExitStack() as stack:
        for name in arguments.systems:
            if name == SERVE:
                served = await stack.enter_async_context(serving(serve_options(arguments), arguments.load_timeout))
                runners[name] = lambda workload, served=served: served.measure(workload)
                about[name] = {"system": shlex.join(served.command)}
                continue
            peer = stack.enter_context(start(arguments, name, sizes))
            runners[name], about[name] = as_runner(peer), peer.about
        for number in range(-1, arguments.rounds):  # round -1 warms up
            for one in results:
                await measure_round(runners, one, is_kept=number >= 0)
    return about


def serve_options(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of `cluster serve` for one stage."""
    options = ["--workers", "1", "--threads", str(arguments.threads), "--precision", arguments.precision]
    return [str(arguments.model), *options, "--store-dir", str(arguments.cache / "store")]


def make_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return the figures for people: rates, and behind ours the relation to the best peer and to the ceilings."""
    table = Table("requests", "system", "prefill tok/s", "decode tok/s", "whole tok/s", title="Resident weights")
    for one in results:
        for name, figures in one["systems"].items():
            cells = [_cell(one["systems"], name, figures, phase) for phase in ("prefill", "decode", "whole")]
            table.add_row(str(one["concurrency"]), name, *cells)
        table.add_section()
    return table


def _cell(systems: dict[str, Any], name: str, figures: dict[str, Any], phase: str) -> str:
    text = f"{figures[phase]:.1f}"
    peers = [other for other in systems if other not in (*OURS, *CEILINGS)]
    if name not in OURS:
        return text
    if peers:
        best = max(peers, key=lambda other: systems[other][phase])
        text += f"  {figures['ratios'][best][phase]:.2f} x {best}"
    for ceiling in CEILINGS:
        if ceiling in systems:
            text += f"  {figures['ratios'][ceiling][phase]:.2f} of {ceiling}"
    return text


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, type=checkpoint, help="a Llama's folder with bf16 weights")
    parser.add_argument("--precision", choices=("int8", "nf4", "fp32", "bf16"), default="int8", help="of our weights")
    parser.add_argument("--concurrency", type=integers, default="1,8,32", help="requests at once")
    parser.add_argument("--input-tokens", type=int, default=64, help="of every prompt")
    parser.add_argument("--output-tokens", type=int, default=32, help="of every request")
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    parser.add_argument("--systems", type=names(SYSTEMS), default=",".join(SYSTEMS), help="which to measure")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps environments and converted weights")
    parser.add_argument("--load-timeout", type=float, default=900.0, help="seconds until the cluster must be ready")
    return parser.parse_measurement(quick="--rounds 1 --concurrency 1,4 --output-tokens 8")


def main() -> None:
    arguments = parse_arguments()
    spec = resolve(str(arguments.model))
    sizes = (arguments.input_tokens, arguments.output_tokens, spec.vocab_size)
    results = [Results(Workload(concurrency, *sizes)) for concurrency in arguments.concurrency]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` ends every process, too
    machine = describe_machine()
    about = asyncio.run(measure(arguments, results))
    report = {
        "machine": machine,
        "benchmark": shlex.join(sys.argv),
        "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens,
        "rounds": arguments.rounds,
        "systems": about,
        "results": [one.summary() for one in results],
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(machine, about, make_table(report["results"]))


if __name__ == "__main__":
    run_script(main)
