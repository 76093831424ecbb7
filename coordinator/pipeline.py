"""The coordinator's end of the pipeline: steps go out to stage 0, results and failures come in from every stage.

Covers streams and epochs. What to send and what an event means is the scheduler's and the engine's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import SpanwiseError, StageTimeoutError, StageUnavailableError
from cluster.microbatch import (
    Epoch,
    PageDelta,
    SequenceSampling,
    StepFailure,
    StepHeader,
    StepId,
    StepProgress,
    StepResult,
)
from cluster.placement import Placement
from cluster.request import SamplingParams, SequenceId
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.wire.status import as_spanwise_error, from_rpc_error
from cluster.wire.steps import (
    epoch_to_proto,
    failure_from_proto,
    header_to_proto,
    progress_from_proto,
    result_from_proto,
)
from coordinator.stage_link import StageLink

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage's stream broke while its epoch was open."""

    epoch: Epoch
    stage: int
    message: str


PipelineEvent = StepResult | StepFailure | StepProgress | StageLost


class Pipeline:
    """All stages of one placement, in order. Its methods run on the coordinator's event loop."""

    def __init__(
        self,
        placement: Placement,
        links: Sequence[StageLink],
        on_event: Callable[[PipelineEvent], None],
        *,
        canary_seconds: float,
    ) -> None:
        self.epoch = placement.epoch
        self.lost_stage: int | None = None
        self._plans = placement.stages
        self._links = tuple(links)
        self._on_event = on_event
        self._outgoing: asyncio.Queue[StepHeader] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._canary_seconds = canary_seconds
        self._canary: asyncio.Future[None] | None = None

    @property
    def num_stages(self) -> int:
        return len(self._links)

    async def prove(self) -> Epoch:
        """Send one real token through every stage in an epoch of its own, then open the one that will serve.

        Raises SpanwiseError when a stage cannot be reached or computed nothing.
        """
        await self.open_next_epoch()
        self._canary = asyncio.get_running_loop().create_future()
        try:
            self.send(_canary_step(self.epoch, self.num_stages - 1, self._canary_seconds))
            async with asyncio.timeout(self._canary_seconds):
                await self._canary
        except TimeoutError:
            raise StageTimeoutError(f"a first token did not pass all stages in {self._canary_seconds:g} s") from None
        finally:
            self._canary = None
        return await self.open_next_epoch()

    async def open_next_epoch(self) -> Epoch:
        """Give up the present epoch and open a higher one on every stage. Raises StageUnavailableError naming the stage
        that did not follow, which `lost_stage` then holds."""
        await self._stop_streams()
        self.epoch = Epoch(self.epoch.generation, self.epoch.number + 1)
        self._outgoing = asyncio.Queue()
        await self._open_stages()
        self._tasks = [asyncio.create_task(self._watch(stage, self.epoch)) for stage in range(self.num_stages)]
        self._tasks.append(asyncio.create_task(self._forward(self.epoch)))
        return self.epoch

    def send(self, header: StepHeader) -> None:
        """Queue a step for stage 0; it leaves in order. The scheduler bounds how many are under way."""
        self._outgoing.put_nowait(header)

    async def close(self) -> None:
        """End the streams and channels."""
        await self._stop_streams()
        await asyncio.gather(*(link.close() for link in self._links))

    def describe_stage(self, stage: int) -> str:
        """Name a stage for a person: its number, worker and node."""
        plan = self._plans[stage]
        return f"stage {stage} (worker {plan.worker.worker_id} on {plan.worker.node_name}, blocks {plan.span})"

    async def _open(self, stage: int) -> None:
        is_last = stage == self.num_stages - 1
        follower = None if is_last else self._plans[stage + 1].worker
        await self._links[stage].open_epoch(
            self.epoch, follower.address if follower else "", follower.node_name if follower else ""
        )

    async def _open_stages(self) -> None:
        """Open the epoch on all stages at once. Of several that fail the last one counts; those before it may only
        suffer from it and are not waited for."""
        opening = [asyncio.create_task(self._open(stage)) for stage in range(self.num_stages)]
        try:
            for stage in reversed(range(self.num_stages)):
                self.lost_stage = stage
                await opening[stage]
            self.lost_stage = None
        except SpanwiseError as error:
            raise type(error)(f"{self.describe_stage(stage)}: {error}", reason=error.reason) from None
        finally:
            for task in opening:
                task.cancel()
            await asyncio.gather(*opening, return_exceptions=True)

    async def _stop_streams(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, stage: int, epoch: Epoch) -> None:
        """Pass on what a stage reports, until its stream or the epoch ends."""
        call = self._links[stage].stub.Watch(service.WatchRequest(epoch=epoch_to_proto(epoch)))
        try:
            async for response in call:
                self._report(_event_from_proto(response))
            message = "its report stream ended"
        except Exception as error:  # the top of a task: whatever it was must be reported
            message = str(as_spanwise_error(error))
        finally:
            call.cancel()
        self._lose(epoch, stage, message)

    async def _forward(self, epoch: Epoch) -> None:
        """Send steps to stage 0 over one stream, reading its acknowledgements meanwhile."""
        call = self._links[0].stub.Forward()
        acknowledgements = asyncio.create_task(self._drain(call, epoch))
        try:
            while True:
                header = await self._outgoing.get()
                await call.write(service.ForwardRequest(header=header_to_proto(header)))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the acknowledgements' end says why
        except Exception as error:  # the top of a task: whatever it was must be reported
            self._lose(epoch, 0, f"a step could not be sent: {as_spanwise_error(error)}")
        finally:
            call.cancel()
            with suppress(asyncio.CancelledError):
                await acknowledgements

    async def _drain(self, call: Any, epoch: Epoch) -> None:
        try:
            async for _ in call:
                pass  # the step's fate comes through Watch
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self._lose(epoch, 0, str(from_rpc_error(error)))

    def _lose(self, epoch: Epoch, stage: int, message: str) -> None:
        self._report(StageLost(epoch, stage, f"{self.describe_stage(stage)} is lost: {message}"))

    def _report(self, event: PipelineEvent) -> None:
        """Hand an event on; those of the canary's epoch are the canary's."""
        if self._canary is None:
            self._on_event(event)
        elif self._canary.done() or isinstance(event, StepProgress):
            pass
        elif isinstance(event, StepResult):
            self._canary.set_result(None)
        else:
            self._canary.set_exception(StageUnavailableError(event.message))


def _canary_step(epoch: Epoch, last_stage: int, deadline_seconds: float) -> StepHeader:
    """Return a step of one token in page 0, which no sequence holds yet."""
    canary = SequenceId(0)
    return StepHeader(
        epoch=epoch,
        step_id=StepId(1),
        deadline_ms=int(deadline_seconds * 1000),
        sequence_ids=(canary,),
        start_positions=(0,),
        lengths=(1,),
        token_ids=(0,),
        logits_rows=(1,),
        is_sampled=(True,),
        page_deltas=(PageDelta(canary, 0, (0,)),),
        sampling_changes=(SequenceSampling(canary, 1, SamplingParams(temperature=0.0)),),
        last_stage=last_stage,
    )


def _event_from_proto(response: service.WatchResponse) -> PipelineEvent:
    kind = response.WhichOneof("event")
    if kind == "result":
        return result_from_proto(response.result)
    if kind == "failure":
        return failure_from_proto(response.failure)
    if kind == "progress":
        return progress_from_proto(response.progress)
    raise StageUnavailableError(f"a stage reported {kind!r}, which this version does not know")
