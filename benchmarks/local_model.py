"""`cluster.local.LocalModel` in a process that answers workloads as the peers do: a model under a memory budget."""

from __future__ import annotations

import argparse
import atexit
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

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

    def run(workload: Workload) -> Round:
        before = model.describe().stages[0]
        begin = time.perf_counter()
        options = {"max_tokens": workload.num_output_tokens, "temperature": 0.0, "ignore_eos": True}
        completions = model.generate_many(workload.prompts(), repetition_penalty=1.0, **options)
        seconds = time.perf_counter() - begin
        assert all(len(one.token_ids) == workload.num_output_tokens for one in completions)
        after = model.describe().stages[0]
        num_passes, read_bytes = after.num_steps - before.num_steps, after.read_bytes - before.read_bytes
        stall_seconds = after.stall_seconds - before.stall_seconds
        return Round(seconds, workload.num_tokens, [], [], num_passes, read_bytes, stall_seconds)

    return describe(model, arguments), run


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
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
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
    answer(lambda: load(arguments))


if __name__ == "__main__":
    main()
