"""A device that does what it was told as late, or as early, as its streams and events allow.

Memory on it is ordinary memory, so a computation or a copy that should have waited for another one finds or leaves the
wrong bytes. What computes at once, as torch does on a CPU, need not be queued: only copies are late then.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

UNWRITTEN = 0xAB


@dataclass(eq=False)
class SimulatedStream:
    """Does one thing after the other."""

    todo: deque[Callable[[], None] | SimulatedEvent] = field(default_factory=deque)

    @property
    def can_go_on(self) -> bool:
        """Tell whether the next thing does not wait for another stream."""
        if not self.todo:
            return False
        head = self.todo[0]
        return not isinstance(head, SimulatedEvent) or head.stream is self or head.has_passed

    def go_on(self) -> None:
        """Do the next thing."""
        head = self.todo.popleft()
        if not isinstance(head, SimulatedEvent):
            head()
        elif head.stream is self:
            head.has_passed = True


@dataclass(eq=False)
class SimulatedEvent:
    """Passes when its stream comes to it."""

    stream: SimulatedStream
    has_passed: bool = False

    def synchronize(self) -> None:
        """Let happen what must, and nothing else."""
        while not self.has_passed:
            head = self.stream.todo[0]
            if isinstance(head, SimulatedEvent) and head.stream is not self.stream:
                head.synchronize()
            self.stream.go_on()

    def wait(self, stream: Any) -> None:
        stream.todo.append(self)


class SimulatedDevice:
    """A Copier. `eager` streams go on whenever they can, or, if it is a Random, whenever that says so."""

    def __init__(self, eager: str | random.Random = "") -> None:
        self.computing, self.copying = SimulatedStream(), SimulatedStream()
        self.pinned: list[Tensor] = []
        self.num_copies = 0
        self._eager = eager

    def compute(self, computation: Callable[[], None]) -> None:
        """Queue a computation."""
        self.computing.todo.append(computation)
        self._drift()

    def finish(self) -> None:
        """Do everything."""
        self.mark().synchronize()

    def allocate(self, num_bytes: int) -> Tensor:
        """See Copier."""
        return torch.full((num_bytes,), UNWRITTEN, dtype=torch.uint8)

    def mark(self) -> SimulatedEvent:
        """See Copier."""
        return self._record(self.computing)

    def copy(self, source: Tensor, target: Tensor, after: Any) -> SimulatedEvent:
        """See Copier."""
        assert source.shape == target.shape
        assert any(self._holds(memory, source) for memory in self.pinned)
        self.num_copies += 1
        half = len(source) // 2
        after.wait(self.copying)
        for part in (slice(half), slice(half, None)):
            self.copying.todo.append(lambda part=part: target[part].copy_(source[part]))  # type: ignore[misc]
        return self._record(self.copying)

    def pin(self, memory: Tensor) -> None:
        """See Copier."""
        self.pinned.append(memory)

    def unpin(self, memory: Tensor) -> None:
        """See Copier."""
        assert not any(callable(task) for task in self.copying.todo)
        self.pinned = [other for other in self.pinned if other is not memory]

    def _record(self, stream: SimulatedStream) -> SimulatedEvent:
        event = SimulatedEvent(stream)
        stream.todo.append(event)
        self._drift()
        return event

    def _drift(self) -> None:
        for stream, name in ((self.copying, "copying"), (self.computing, "computing")):
            while stream.can_go_on and self._is_eager(name):
                stream.go_on()

    def _is_eager(self, name: str) -> bool:
        return self._eager.random() < 0.6 if isinstance(self._eager, random.Random) else name == self._eager

    def _holds(self, memory: Tensor, part: Tensor) -> bool:
        return (
            memory.data_ptr() <= part.data_ptr() <= part.data_ptr() + part.nbytes <= memory.data_ptr() + memory.nbytes
        )
