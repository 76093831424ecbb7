"""Transcripts: what tests of the scheduler hand in and pick out."""

from __future__ import annotations

from typing import TypeVar

from cluster.errors import StageUnavailableError
from cluster.microbatch import Epoch, StepHeader
from cluster.request import TokenizedRequest
from coordinator.events import EpochOpened, Instruction, RequestArrived, RunStep, StepCompleted
from coordinator.scheduler import Scheduler
from tests.coordinator.requests import make_limits
from tests.coordinator.simulator import completed

EPOCH = Epoch(1, 1)
LOST = StageUnavailableError("stage 1 on b is gone")
T = TypeVar("T")


def only(instructions: list[Instruction], kind: type[T]) -> list[T]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


def headers_of(instructions: list[Instruction]) -> list[StepHeader]:
    return [instruction.header for instruction in only(instructions, RunStep)]


def opened(num_stages: int = 1, **limits: object) -> Scheduler:
    """A scheduler with an open epoch."""
    scheduler = Scheduler(make_limits(**limits))
    assert scheduler.handle(EpochOpened(EPOCH, num_stages), 0.0) == []
    return scheduler


def arrive(scheduler: Scheduler, request: TokenizedRequest, now: float = 0.0) -> list[Instruction]:
    return scheduler.handle(RequestArrived(request), now)


def complete(scheduler: Scheduler, header: StepHeader, token_id: int = 7, now: float = 0.0) -> list[Instruction]:
    instructions = scheduler.handle(StepCompleted(completed(header, token_id)), now)
    scheduler.check_invariants()
    return instructions
