"""A stage's part in the pipeline: steps come in, are computed in order, and leave for the next stage or as results.

Receiving step k+1, computing k and sending k-1 overlap. No step vanishes: each leaves as hidden states, as a result, or
as a failure that the coordinator's Watch reads. After a failure the rest of the epoch fails too, until a new one opens.

All methods but those marked otherwise run on the event loop. Arithmetic is the Executor's, sockets are the server's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.clock import Clock
from cluster.errors import (
    InvalidRequestError,
    InvariantError,
    NotReadyError,
    SpanwiseError,
    StageTimeoutError,
    StalePlacementError,
)
from cluster.microbatch import Epoch, StageTiming, StepFailure, StepHeader, StepId, StepProgress, WeightTraffic
from cluster.wire.status import as_spanwise_error
from worker.compute_thread import ComputeThread
from worker.downstream import Downstream, OutgoingStep
from worker.executor import Executor, StageOutput
from worker.reports import Reports

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_STEPS_HELD = 64
"""Steps received but not computed; beyond it the stream is not read. Above what the coordinator keeps in flight."""
PROGRESS_SECONDS = 2.5
"""A step that computes at two looks of this distance is told of: the first time within twice this."""


@dataclass(slots=True)
class ReceivedStep:
    """A step whose payload is here. Moments are clock seconds."""

    header: StepHeader
    tensors: Mapping[str, Tensor]
    num_bytes: int
    arrived: float  # its header
    received: float  # the whole payload
    started: float = 0.0
    finished: float = 0.0
    traffic: WeightTraffic = field(default_factory=WeightTraffic)

    @property
    def expires(self) -> float:
        """When its deadline passes."""
        return self.arrived + self.header.deadline_ms / 1000

    def timing(self, stage: int) -> StageTiming:
        """Return this stage's entry for the header."""
        received, started, finished = (int(moment * 1e9) for moment in (self.received, self.started, self.finished))
        traffic = self.traffic
        return StageTiming(
            stage,
            received,
            started,
            finished,
            self.num_bytes,
            traffic.read_bytes,
            traffic.stall_ns,
            traffic.resident_bytes,
        )


@dataclass(slots=True)
class OpenEpoch:
    """One epoch at this stage."""

    epoch: Epoch
    downstream: Downstream | None
    reports: Reports = field(default_factory=Reports)
    next_step: int = 1
    is_broken: bool = False  # set and read by both threads: no step is computed any more


class Relay:
    """Runs one loaded span's steps."""

    def __init__(
        self,
        stage: int,
        executor: Executor,
        compute: ComputeThread,
        clock: Clock,
        *,
        progress_seconds: float = PROGRESS_SECONDS,
    ) -> None:
        self.stage = stage
        self._executor = executor
        self._compute = compute
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._open: OpenEpoch | None = None
        self._slots = asyncio.Semaphore(MAX_STEPS_HELD)
        self._running: ReceivedStep | None = None  # written by the compute thread
        self._blocks_done = 0  # likewise
        self._progress_seconds = progress_seconds
        self._tell_progress(None)

    @property
    def epoch(self) -> Epoch | None:
        """The open epoch."""
        return self._open.epoch if self._open else None

    async def open_epoch(self, epoch: Epoch, downstream: Downstream | None) -> None:
        """Replace the open epoch: its steps and sequences are forgotten. `downstream` is connected but not open."""
        await self.close_epoch()
        await self._compute.run(self._executor.open_epoch)
        opened = OpenEpoch(epoch, downstream)
        if downstream is not None:
            downstream.open(lambda error: self._break(opened, error))
        self._open = opened

    async def close_epoch(self) -> None:
        """Drop the open epoch, its steps and its streams."""
        if self._open is None:
            return
        closed, self._open = self._open, None
        closed.is_broken = True
        closed.reports.close()
        if closed.downstream is not None:
            await closed.downstream.close()

    async def close(self) -> None:
        """End everything but the compute thread, which the server owns."""
        self._next_look.cancel()
        await self.close_epoch()
        self._compute.submit(self._executor.close)

    def check_epoch(self, epoch: Epoch) -> OpenEpoch:
        """Return the open epoch if it is this one. Raises StalePlacementError or NotReadyError otherwise."""
        if self._open is None:
            raise NotReadyError(f"stage {self.stage} has no open epoch")
        if epoch != self._open.epoch:
            raise StalePlacementError(f"stage {self.stage} is in epoch {self._open.epoch}, the call in {epoch}")
        return self._open

    async def accept(self, step: ReceivedStep) -> None:
        """Queue a step for the compute thread; waits while too many are held.

        Raises StalePlacementError for another epoch's. A step out of order breaks the epoch.
        """
        self.check_epoch(step.header.epoch)
        await self._slots.acquire()
        try:
            opened = self.check_epoch(step.header.epoch)
        except SpanwiseError:
            self._slots.release()
            raise
        self._take(opened, step)

    def refuse(self, error: InvalidRequestError) -> None:
        """A stream brought what makes no step: report the step that was due as failed."""
        if self._open is not None:
            self._report_failure(self._open, StepId(self._open.next_step), error, is_stage_lost=False)

    def _take(self, opened: OpenEpoch, step: ReceivedStep) -> None:
        if step.header.step_id != opened.next_step:
            message = f"step {step.header.step_id} came where step {opened.next_step} was due"
            self._slots.release()
            self._fail(opened, step.header, InvariantError(message))
            return
        opened.next_step += 1
        self._compute.submit(lambda: self._execute(opened, step))

    # --- in the compute thread ---------------------------------------------------------------------------------------

    def _execute(self, opened: OpenEpoch, step: ReceivedStep) -> None:
        step.started = self._clock.now()
        output: StageOutput | None = None
        error: Exception | None = None
        try:
            output = self._compute_step(opened, step)
            step.traffic = output.traffic
        except Exception as raised:  # whatever it is, the coordinator must hear of it
            opened.is_broken = True
            error = raised
        step.finished = self._clock.now()
        self._running = None
        self._loop.call_soon_threadsafe(self._finish, opened, step, output, error)

    def _compute_step(self, opened: OpenEpoch, step: ReceivedStep) -> StageOutput:
        if opened.is_broken:
            raise StalePlacementError(f"step {step.header.step_id} was dropped: an earlier step of its epoch failed")
        if step.started >= step.expires:
            late = step.started - step.expires
            raise StageTimeoutError(f"step {step.header.step_id} was due to begin {late:.3f} s after its deadline")
        self._blocks_done = 0
        self._running = step
        return self._executor.execute(step.header, step.tensors, lambda done: self._note_block(opened, done))

    def _note_block(self, opened: OpenEpoch, blocks_done: int) -> None:
        self._blocks_done = blocks_done
        if opened.is_broken:
            raise StalePlacementError(f"epoch {opened.epoch} was given up while a step of it was computed")

    # --- on the event loop -------------------------------------------------------------------------------------------

    def _finish(
        self, opened: OpenEpoch, step: ReceivedStep, output: StageOutput | None, error: Exception | None
    ) -> None:
        self._slots.release()
        if opened is not self._open:
            return  # its epoch is gone, and with it everyone who waited
        if output is None:
            self._fail(opened, step.header, as_spanwise_error(error or InvariantError("no output")))
            return
        timings = (*step.header.timings, step.timing(self.stage))
        if output.result is not None:
            opened.reports.put(replace(output.result, timings=timings))
        elif opened.downstream is None:
            self._fail(opened, step.header, InvariantError(f"stage {self.stage} is the last but returned no result"))
        else:
            header = replace(step.header, timings=timings)
            opened.downstream.send(OutgoingStep(header, output.tensors, step.expires))

    def _fail(self, opened: OpenEpoch, header: StepHeader, error: SpanwiseError) -> None:
        self._report_failure(opened, header.step_id, error, is_stage_lost=False)

    def _break(self, opened: OpenEpoch, error: SpanwiseError) -> None:
        """The stream to the next stage broke: the fate of the steps sent is unknown."""
        if opened is self._open:
            is_lost = not isinstance(error, _REFUSALS)
            self._report_failure(opened, StepId(opened.next_step - 1), error, is_stage_lost=is_lost)

    def _report_failure(self, opened: OpenEpoch, step_id: StepId, error: SpanwiseError, *, is_stage_lost: bool) -> None:
        logger.error("stage %s: step %s failed: %s", self.stage, step_id, error)
        opened.is_broken = True
        reason = type(error).__name__
        failure = StepFailure(opened.epoch, step_id, self.stage, reason, error.message, is_stage_lost)
        opened.reports.put(failure)

    def _tell_progress(self, seen: ReceivedStep | None) -> None:
        """Report how far a step is that was computed at the last look already, and look again later."""
        step, opened = self._running, self._open
        if step is not None and step is seen and opened is not None:
            header, done, total = step.header, self._blocks_done, self._executor.num_blocks
            opened.reports.put(StepProgress(header.epoch, header.step_id, self.stage, done, total))
        self._next_look = self._loop.call_later(self._progress_seconds, self._tell_progress, step)


_REFUSALS = (InvalidRequestError, InvariantError, NotReadyError, StalePlacementError)
"""What a next stage says that is there but will not take the step."""
