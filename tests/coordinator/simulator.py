"""A deterministic pipeline in simulated time, for tests of the scheduler.

Stages take steps strictly in order, each for as long as its function of the number of tokens says; hops take a fixed
time. Covers time and the order of events; tokens are numbers counted upwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

from cluster.microbatch import Epoch, StageTiming, StepHeader, StepResult
from cluster.request import RequestId, TokenizedRequest
from coordinator import events
from coordinator.events import Event, Instruction
from coordinator.scheduler import Scheduler

StageSeconds = Callable[[int], float]
"""A stage's seconds for a step of so many tokens."""

EPOCH = Epoch(1, 1)


def linear(fixed: float, per_token: float) -> StageSeconds:
    """Return a stage with a fixed cost per step and a cost per token."""
    return lambda num_tokens: fixed + per_token * num_tokens


@dataclass(slots=True)
class Simulation:
    """A scheduler, its pipeline and what happened. All times in simulated seconds."""

    scheduler: Scheduler
    stages: Sequence[StageSeconds]
    hop_seconds: float = 0.0
    now: float = 0.0
    peak_in_flight: int = 0
    headers: list[StepHeader] = field(default_factory=list)
    timings: list[tuple[StageTiming, ...]] = field(default_factory=list)  # per step
    emitted: list[tuple[float, events.EmitTokens]] = field(default_factory=list)
    finished: dict[RequestId, tuple[float, events.RequestReport]] = field(default_factory=dict)
    _queue: list[tuple[float, int, Event]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _free_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_at = [0.0] * len(self.stages)
        self.post(0.0, events.EpochOpened(EPOCH, len(self.stages)))

    def post(self, at: float, event: Event) -> None:
        """Have an event happen at a time."""
        heapq.heappush(self._queue, (at, next(self._order), event))

    def arrive(self, at: float, *requests: TokenizedRequest) -> None:
        """Have requests arrive together."""
        for request in requests:
            self.post(at, events.RequestArrived(request))

    def run(self, until: float = float("inf")) -> None:
        """Let everything happen up to a time."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, event = heapq.heappop(self._queue)
            for instruction in self.scheduler.handle(event, self.now):
                self._perform(instruction)
            self.peak_in_flight = max(self.peak_in_flight, self.scheduler.counters().num_steps_in_flight)
        self.scheduler.check_invariants()

    def bubble_share(self, start: float, end: float) -> list[float]:
        """Return, per stage, the share of a stretch of time in which it computed nothing."""
        shares = []
        for stage in range(len(self.stages)):
            spans = [(timings[stage].started_ns * 1e-9, timings[stage].finished_ns * 1e-9) for timings in self.timings]
            busy = sum(max(0.0, min(last, end) - max(first, start)) for first, last in spans)
            shares.append(1 - busy / (end - start))
        return shares

    def gaps(self, request_id: str, after: float = 0.0) -> list[float]:
        """Return the times between one request's tokens."""
        times = [at for at, tokens in self.emitted if tokens.request_id == request_id and at >= after]
        return [later - earlier for earlier, later in pairwise(times)]

    def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case events.RunStep(header):
                self._traverse(header)
            case events.GatherRequests(seconds):
                self.post(self.now + seconds, events.GatheringEnded())
            case events.EmitTokens():
                self.emitted.append((self.now, instruction))
            case events.FinishRequest(request_id, report):
                self.finished[request_id] = (self.now, report)
            case events.RejectRequest(_, error) | events.FailRequest(_, error):
                raise error
            case _:
                pass

    def _traverse(self, header: StepHeader) -> None:
        at, timings = self.now, []
        for stage, seconds in enumerate(self.stages):
            received = at + self.hop_seconds
            started = max(received, self._free_at[stage])
            at = self._free_at[stage] = started + seconds(header.num_tokens)
            timings.append(StageTiming(stage, *(round(moment * 1e9) for moment in (received, started, at))))
        self.headers.append(header)
        self.timings.append(tuple(timings))
        result = completed(header, timings=tuple(timings))
        self.post(at + self.hop_seconds, events.StepCompleted(result))


def completed(header: StepHeader, token_id: int = 1, timings: tuple[StageTiming, ...] = ()) -> StepResult:
    """Return a result that samples the same token for every slice that asks for one."""
    ids = tuple(i for i, is_sampled in zip(header.sequence_ids, header.is_sampled, strict=True) if is_sampled)
    return StepResult(header.epoch, header.step_id, ids, (token_id,) * len(ids), (None,) * len(ids), timings=timings)
