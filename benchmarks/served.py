"""`cluster serve` as its users see it: the command in a process of its own, driven through the client library."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

from cluster.client import AsyncClient, ClusterStatus, StageStatus
from cluster.errors import SpanwiseError
from measures import Round, StageWindow, Workload

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0


class ServedCluster:
    """A cluster that is ready. `command` is what a person would type."""

    def __init__(self, command: Sequence[str], address: str) -> None:
        self.command = command
        self._address = address

    async def describe(self) -> ClusterStatus:
        """Return what the cluster tells of itself."""
        async with AsyncClient(self._address) as client:
            return await client.describe()

    async def run(self, workload: Workload) -> tuple[Round, list[StageWindow]]:
        """Send all requests at once; return what the client saw and what the stages did meanwhile."""
        before = await self.describe()
        begin = time.perf_counter()
        async with AsyncClient(self._address) as client:
            requests = [_arrivals(client, prompt, workload.num_output_tokens) for prompt in workload.prompts()]
            arrivals = await asyncio.gather(*requests)
        wall_seconds = time.perf_counter() - begin
        after = await self.describe()
        first = [times[0] - begin for times in arrivals]
        between = [later - earlier for times in arrivals for earlier, later in pairwise(times)]
        stages = zip(before.stages, after.stages, strict=True)
        windows = [_window(old, new, wall_seconds) for old, new in stages]
        return Round(wall_seconds, workload.num_tokens, first, between), windows

    async def measure(self, workload: Workload) -> Round:
        """Send all requests at once; return what the client saw."""
        return (await self.run(workload))[0]


@asynccontextmanager
async def serving(arguments: Sequence[str], load_seconds: float) -> AsyncIterator[ServedCluster]:
    """Start `cluster serve` with a Ray cluster of its own, wait until it is ready, interrupt it in the end."""
    port = _free_port()
    cluster = ServedCluster(["cluster", "serve", *arguments], f"127.0.0.1:{port}")
    program = Path(sys.executable).with_name("cluster")
    environment = os.environ | {"RAY_ADDRESS": "local"}
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            program,
            *cluster.command[1:],
            "--port",
            str(port),
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            await _ready(cluster, process, load_seconds)
            yield cluster
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            await _stop(process)


async def _ready(cluster: ServedCluster, process: asyncio.subprocess.Process, load_seconds: float) -> None:
    async with asyncio.timeout(load_seconds):
        while not await _is_ready(cluster):
            if process.returncode is not None:
                raise RuntimeError(
                    f"`{shlex.join(cluster.command)}` ended with {process.returncode} before it was ready"
                )
            await asyncio.sleep(POLL_SECONDS)


async def _is_ready(cluster: ServedCluster) -> bool:
    try:
        return (await cluster.describe()).state == "ready"
    except SpanwiseError:
        return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _arrivals(client: AsyncClient, prompt: list[int], num_tokens: int) -> list[float]:
    """Return when each token arrived. Tokens that come in one message share its time."""
    times: list[float] = []
    pieces = client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True, repetition_penalty=1.0)
    async for piece in pieces:
        times += [time.perf_counter()] * len(piece.token_ids)
    if len(times) != num_tokens:
        raise RuntimeError(f"{len(times)} tokens came, {num_tokens} were asked for")
    return times


def _window(before: StageStatus, after: StageStatus, wall_seconds: float) -> StageWindow:
    num_steps = after.num_steps - before.num_steps
    busy = after.busy_seconds - before.busy_seconds
    bubble = after.bubble_seconds - before.bubble_seconds
    return StageWindow(
        stage=after.stage,
        num_steps=num_steps,
        busy_share=busy / wall_seconds,
        bubble_share=bubble / wall_seconds,
        bytes_per_step=(after.received_bytes - before.received_bytes) / max(1, num_steps),
        hop_seconds=after.hop_seconds,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
