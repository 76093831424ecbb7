"""Which worker serves which span in which precision: the value. `coordinator.placement` decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from cluster.microbatch import Epoch
from cluster.model_spec import Precision
from cluster.span import Span

WorkerId = NewType("WorkerId", str)


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Where Ray put a process."""

    node_id: str
    node_name: str
    address: str  # that the other nodes reach it by
    version: str  # of Spanwise, there


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says about itself in its hello."""

    worker_id: WorkerId
    node_name: str  # host name, as a person knows the machine
    address: str  # host:port of its stage service, as its neighbours dial it
    device: str  # "cpu" or "cuda:0"
    device_name: str
    num_threads: int
    free_memory_bytes: int  # what the worker may use for weights, KV and buffers
    total_memory_bytes: int
    isa: str  # e.g. "AVX512" or "sm_90": part of the numerics fingerprint
    process_id: int
    versions: tuple[tuple[str, str], ...]  # package → version


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a placement."""

    stage: int
    worker: WorkerInfo
    span: Span
    precision: Precision
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """All stages, in pipeline order, and the KV pages that each of them holds."""

    epoch: Epoch
    stages: tuple[StagePlan, ...]
    num_pages: int
    page_size: int  # token slots per page
    max_context: int

    @property
    def last_stage(self) -> int:
        return len(self.stages) - 1
