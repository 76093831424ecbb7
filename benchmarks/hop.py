"""Measures the time from a stage's finish to the next stage's start, between two processes on loopback.

No arithmetic: the spans are fakes that only count, so this is transport alone. Prints median and 95th percentile for
payloads of several sizes, with one step in flight, and the steps per second with several in flight.

    python benchmarks/hop.py --steps 500
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shlex
import statistics
import sys
from multiprocessing.connection import Connection
from typing import Any

from cluster.clock import SystemClock
from cluster.load_order import LoadOrder
from cluster.microbatch import Epoch, StepHeader, StepId, StepResult
from cluster.model_spec import FolderSource, Precision
from cluster.placement import WorkerId, WorkerInfo
from cluster.request import SequenceId
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.span import Span
from cluster.testing.executor import FakeSpanLoader
from cluster.wire.channels import open_channel
from cluster.wire.steps import epoch_to_proto, header_to_proto, result_from_proto
from cluster.wire.workers import load_order_to_proto
from command_line import Parser, run_script
from measures import describe_machine
from worker.server import StageServer

HIDDEN_SIZE = 448  # fp32: 16 tokens are 28 KiB, BLOOM-176B's hidden state of one token in 16 bit
NUM_WARM_UP = 50
MALLOC = {  # as cluster.serve starts workers
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}


def serve_stage(stage: int, pipe: Connection) -> None:
    """Run one stage server in this process until the pipe closes."""
    asyncio.run(_serve(stage, pipe))


async def _serve(stage: int, pipe: Connection) -> None:
    name = WorkerId(f"w{stage}")
    info = WorkerInfo(name, "localhost", "", "cpu", "fake", 1, 1 << 30, 1 << 31, "none", os.getpid(), ())
    loader = FakeSpanLoader(hidden_size=HIDDEN_SIZE)
    server = StageServer(info, loader, host="127.0.0.1", ports=range(0), credentials=None, clock=SystemClock())
    pipe.send(await server.start())
    await asyncio.to_thread(pipe.recv)
    await server.stop()


def make_step(number: int, num_tokens: int, epoch: Epoch) -> StepHeader:
    """Return a decode step of `num_tokens` sequences."""
    return StepHeader(
        epoch=epoch,
        step_id=StepId(number),
        deadline_ms=60_000,
        sequence_ids=tuple(SequenceId(i) for i in range(num_tokens)),
        start_positions=(7,) * num_tokens,
        lengths=(1,) * num_tokens,
        token_ids=(5,) * num_tokens,
        logits_rows=(1,) * num_tokens,
        is_sampled=(True,) * num_tokens,
        last_stage=1,
    )


async def load(stub: Any, stage: int, epoch: Epoch) -> None:
    """Load a fake span."""
    order = LoadOrder(
        stage=stage,
        num_stages=2,
        span=Span(stage, stage + 1),
        config={"n_layer": 2},
        source=FolderSource("/nowhere", "0"),
        checkpoint_service="",
        weight_files=(),
        weight_map={},
        precision=Precision.FP32,
        kv_dtype="auto",
        wire_dtype="auto",
        num_pages=1,
        page_size=64,
        max_context=64,
        is_exact=False,
    )
    async for _ in stub.LoadSpan(load_order_to_proto(order, epoch)):
        pass


async def run_steps(
    stubs: list[Any], addresses: list[str], epoch: Epoch, shape: tuple[int, int, int]
) -> list[StepResult]:
    """Send steps of `num_tokens`, `depth` of them in flight; return all results but the first ones."""
    num_steps, num_tokens, depth = shape
    message = epoch_to_proto(epoch)
    await stubs[1].OpenEpoch(service.OpenEpochRequest(epoch=message))
    await stubs[0].OpenEpoch(service.OpenEpochRequest(epoch=message, next_address=addresses[1]))
    watch, forward = stubs[1].Watch(service.WatchRequest(epoch=message)), stubs[0].Forward()
    results: list[StepResult] = []
    total = num_steps + NUM_WARM_UP
    sent = 0
    while len(results) < total:
        while sent < total and sent - len(results) < depth:
            sent += 1
            await forward.write(service.ForwardRequest(header=header_to_proto(make_step(sent, num_tokens, epoch))))
        results.append(result_from_proto((await watch.read()).result))
    forward.cancel()
    watch.cancel()
    return results[NUM_WARM_UP:]


def summarize(results: list[StepResult], num_tokens: int, depth: int) -> dict[str, float]:
    """Return the figures of one run."""
    hops = sorted((r.timings[1].started_ns - r.timings[0].finished_ns) / 1e6 for r in results)
    seconds = (results[-1].timings[1].finished_ns - results[0].timings[1].finished_ns) / 1e9
    return {
        "payload_bytes": results[0].timings[1].received_bytes,
        "slices": num_tokens,
        "in_flight": depth,
        "hop_p50_ms": round(statistics.median(hops), 3),
        "hop_p95_ms": round(hops[int(len(hops) * 0.95)], 3),
        "steps_per_second": round((len(results) - 1) / seconds, 1),
    }


async def measure(addresses: list[str], num_steps: int) -> list[dict[str, float]]:
    """Measure all shapes."""
    rows = []
    channels = [open_channel(address) for address in addresses]
    stubs = [service_grpc.StageServiceStub(channel) for channel in channels]
    for stage, stub in enumerate(stubs):
        await load(stub, stage, Epoch(1, 1))
    shapes = [(num_steps, 16, 1), (num_steps, 16, 4), (num_steps // 4, 585, 1), (num_steps // 10, 9362, 1)]
    for number, shape in enumerate(shapes, start=1):
        rows.append(summarize(await run_steps(stubs, addresses, Epoch(1, number), shape), *shape[1:]))
    await asyncio.gather(*(channel.close() for channel in channels))
    return rows


def main() -> None:
    """Start two processes, measure, print."""
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of the smallest payload; larger ones take fewer")
    arguments = parser.parse_measurement()
    machine = describe_machine()
    os.environ.update(MALLOC)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for stage in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve_stage, args=(stage, theirs)))
        processes[-1].start()
        pipes.append(ours)
    rows = asyncio.run(measure([pipe.recv() for pipe in pipes], arguments.steps))
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()
    if arguments.json:
        print(json.dumps({"machine": machine, "benchmark": shlex.join(sys.argv), "rows": rows}, indent=1))
        return
    print(machine)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    run_script(main)
