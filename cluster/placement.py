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
    process_bytes: int = 0  # taken before anything is loaded, and no longer among the free ones
    free_host_bytes: int = 0  # of a worker with a GPU: what it may use of the machine's own memory


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a stage divides the memory that its worker may use. Weights that can be streamed share `shared_bytes` with
    keys and values; small tensors are always held."""

    budget_bytes: int
    weight_bytes: int  # resident when it is loaded, small tensors included
    small_bytes: int
    streamed_bytes: int  # read from disk at every pass; of experts: those that are read on demand
    num_streamed: int  # parts that are streamed, see `cluster.span.streaming_order`
    kv_bytes: int  # of all pages
    shared_bytes: int
    ring_bytes: int
    buffer_bytes: int  # what computing or loading takes for a moment
    expert_cache_bytes: int  # 0: no experts, or all of them are resident

    @property
    def is_streamed(self) -> bool:
        return self.streamed_bytes > 0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of a placement."""

    stage: int
    worker: WorkerInfo
    span: Span
    precision: Precision
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class Placement:
    """All stages, in pipeline order, and the KV pages that each of them holds."""

    epoch: Epoch
    stages: tuple[StagePlan, ...]
    num_pages: int
    page_size: int  # token slots per page
    max_context: int
    max_step_tokens: int  # what the stages' buffers are planned for
    advice: str = ""  # what would be better, in a sentence

    @property
    def is_streamed(self) -> bool:
        """Whether any stage reads weights from disk at every pass."""
        return any(plan.memory.is_streamed for plan in self.stages)

    @property
    def last_stage(self) -> int:
        return len(self.stages) - 1
