"""`cluster.local.LocalModel` in a process that answers workloads as the peers do: a model under a memory budget."""

from __future__ import annotations

import argparse
import atexit
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from cluster.errors import SpanwiseError
from cluster.local import LocalModel
from measures import Round, Workload
from peers.process import Run, answer


def load(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Run]:
    """Load as a user would; return what the model says of its memory, and how to run workloads on it."""
    model = LocalModel.from_pretrained(
        arguments.model,
        precision=arguments.precision,
        memory=arguments.memory,
        threads=arguments.threads,
        max_context=arguments.max_context,
        kv_dtype=arguments.kv_dtype,
        store_dir=arguments.store_dir,
    )
    atexit.register(model.close)

    return describe(model, arguments), lambda workload: generate(model, workload)


def generate(model: LocalModel, workload: Workload) -> Round:
    """Send all requests at once, each from a thread of its own."""
    before = model.describe().stages[0]
    begin = time.perf_counter()
    with ThreadPoolExecutor(workload.concurrency) as pool:
        arrivals = list(pool.map(lambda prompt: _arrivals(model, prompt, workload), workload.prompts()))
    seconds = time.perf_counter() - begin
    after = model.describe().stages[0]
    return Round(
        wall_seconds=seconds,
        num_output_tokens=workload.num_tokens,
        first_token_seconds=[times[0] - begin for times in arrivals],
        inter_token_seconds=[later - earlier for times in arrivals for earlier, later in pairwise(times)],
        num_passes=after.num_steps - before.num_steps,
        read_bytes=after.read_bytes - before.read_bytes,
        stall_seconds=after.stall_seconds - before.stall_seconds,
    )


def _arrivals(model: LocalModel, prompt: list[int], workload: Workload) -> list[float]:
    """Return when each token arrived. Tokens that come in one piece share its time."""
    times: list[float] = []
    length = workload.num_output_tokens
    for piece in model.stream(prompt, max_tokens=length, temperature=0.0, ignore_eos=True, repetition_penalty=1.0):
        times += [time.perf_counter()] * len(piece.token_ids)
    assert len(times) == length
    return times


def describe(model: LocalModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what readers of a figure want to know."""
    status = model.describe()
    stage = status.stages[0]
    names = ("weight_bytes", "kv_bytes", "resident_bytes", "streamed_bytes", "ring_bytes", "buffer_bytes")
    return {
        "system": f"Spanwise, {arguments.precision}, --memory {arguments.memory}",
        "version": status.version,
        "num_streamed": stage.num_streamed,
        "disk_bytes_per_second": stage.disk_bytes_per_second,
        "max_context": status.model.max_context,
        "num_pages": status.num_pages,
        "page_size": status.page_size,
        "numerics": asdict(stage.numerics),
    } | {name: getattr(stage, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--memory", required=True, help="budget of the whole process, like 12GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--store-dir", default="")
    arguments = parser.parse_args()
    answer(lambda: load(arguments), (SpanwiseError,))


if __name__ == "__main__":
    main()
