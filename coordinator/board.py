"""The status board: what `cluster status` shows, kept by the engine and the bring-up as things happen.

Covers state and its protobuf form; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.clock import Clock
from cluster.microbatch import StageTiming
from cluster.model_spec import ModelSpec, Precision
from cluster.placement import MemoryPlan, Placement, StagePlan, WorkerId, WorkerInfo
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.span import Span
from cluster.version import PROTOCOL_VERSION, VERSION
from coordinator.meters import RateMeter
from coordinator.pipeline_meter import PipelineMeter, StageTotals

BUSY_WINDOW_SECONDS = 60
THROUGHPUT_WINDOW_SECONDS = 10


@dataclass(slots=True)
class StageRecord:
    """One stage as the board knows it. Span and what follows are set once a placement exists."""

    stage: int
    worker: WorkerInfo
    state: service.StageState = service.STAGE_STATE_CONNECTING
    span: Span | None = None
    precision: Precision | None = None
    compute_dtype: str = ""
    kv_dtype: str = ""
    wire_dtype: str = ""
    is_exact: bool = False
    weight_bytes: int = 0  # in memory when it was loaded
    kv_bytes: int = 0
    streamed_bytes: int = 0  # read at every step when it was loaded
    disk_bytes_per_second: float = 0.0
    memory: MemoryPlan | None = None
    progress_bytes: int = 0
    progress_total_bytes: int = 0
    message: str = ""
    busy: RateMeter = field(default_factory=lambda: RateMeter(BUSY_WINDOW_SECONDS))

    def numerics(self) -> generation.StageNumerics:
        """Return what this stage contributes to the model's fingerprint."""
        return generation.StageNumerics(
            first_block=self.span.start if self.span else 0,
            end_block=self.span.end if self.span else 0,
            precision=self.precision.value if self.precision else "",
            compute_dtype=self.compute_dtype,
            kv_dtype=self.kv_dtype,
            wire_dtype=self.wire_dtype,
            device=self.worker.device,
            isa=self.worker.isa,
            num_threads=self.worker.num_threads,
            is_exact=self.is_exact,
        )


class StatusBoard:
    """The cluster's state, stages and counters."""

    def __init__(self, spec: ModelSpec, *, has_chat_template: bool, clock: Clock) -> None:
        self.state: service.ClusterState = service.CLUSTER_STATE_LOADING
        self.message = "connecting to workers"
        self.stages: list[StageRecord] = []
        self.placement: Placement | None = None
        self.num_requests_finished = 0
        self.num_requests_failed = 0
        self._spec = spec
        self._has_chat_template = has_chat_template
        self._clock = clock
        self._started = clock.now()
        self._meter = PipelineMeter([])
        self._prompt_tokens = RateMeter(THROUGHPUT_WINDOW_SECONDS)
        self._output_tokens = RateMeter(THROUGHPUT_WINDOW_SECONDS)

    @property
    def has_chat_template(self) -> bool:
        return self._has_chat_template

    def meet(self, workers: list[WorkerInfo]) -> None:
        """Show workers that answered their hello, before a placement exists."""
        self.stages = [StageRecord(stage, worker) for stage, worker in enumerate(workers)]

    def place(self, placement: Placement) -> None:
        """Show a placement whose stages are about to load."""
        self.placement = placement
        self.stages = list(map(_placed, placement.stages))
        self.start_epoch()

    def start_epoch(self) -> None:
        """Count the stages' time afresh: an epoch has opened."""
        self._meter = PipelineMeter([record.worker.node_name for record in self.stages])

    def ready(self) -> None:
        """Show that a real token went through every stage."""
        self.state, self.message = service.CLUSTER_STATE_READY, "ready"

    def drain(self) -> None:
        """Show that no more requests are taken; a failure stays shown."""
        if self.state != service.CLUSTER_STATE_FAILED:
            self.state, self.message = service.CLUSTER_STATE_DRAINING, "shutting down"

    def lose(self, stage: int | None, message: str) -> None:
        """Show that the cluster can no longer generate, because of `stage` when that is known."""
        self.state = service.CLUSTER_STATE_FAILED
        self.message = message
        if stage is not None and stage < len(self.stages):
            self.stages[stage].state = service.STAGE_STATE_LOST
            self.stages[stage].message = message

    def stage_of(self, worker_id: WorkerId) -> int | None:
        """Return the stage that a worker serves, if it serves one."""
        return next((record.stage for record in self.stages if record.worker.worker_id == worker_id), None)

    def count_tokens(self, *, prompt: int, output: int) -> None:
        """Count tokens that a step computed or produced."""
        now = self._clock.now()
        self._prompt_tokens.add(prompt, now)
        self._output_tokens.add(output, now)

    def rest(self) -> None:
        """Nothing is left to do: the time until the next step is no bubble."""
        self._meter.rest()

    def count_timings(self, timings: tuple[StageTiming, ...]) -> None:
        """Count the stages' time of a completed step."""
        self._meter.count(timings)
        now = self._clock.now()
        for timing in timings:
            self.stages[timing.stage].busy.add((timing.finished_ns - timing.started_ns) / 1e9, now)

    def fingerprint(self) -> generation.Fingerprint:
        """Return what must be equal for equal tokens."""
        return generation.Fingerprint(
            model=self._spec.name, revision=self._spec.revision, stages=[record.numerics() for record in self.stages]
        )

    def model(self) -> service.Model:
        """Return the model as clients see it."""
        return service.Model(
            name=self._spec.name,
            architecture=self._spec.architecture,
            revision=self._spec.revision,
            max_context=self.placement.max_context if self.placement else 0,
            vocab_size=self._spec.vocab_size,
            has_chat_template=self._has_chat_template,
        )

    def describe(self) -> service.DescribeClusterResponse:
        """Return everything but the scheduler's counters, which the engine fills in."""
        now = self._clock.now()
        return service.DescribeClusterResponse(
            version=VERSION,
            protocol_version=PROTOCOL_VERSION,
            state=self.state,
            message=self.message,
            model=self.model(),
            stages=self._describe_stages(now),
            page_size=self.placement.page_size if self.placement else 0,
            num_pages=self.placement.num_pages if self.placement else 0,
            max_step_tokens=self.placement.max_step_tokens if self.placement else 0,
            advice=self.placement.advice if self.placement else "",
            uptime_seconds=now - self._started,
            prompt_tokens_per_second=self._prompt_tokens.per_second(now),
            output_tokens_per_second=self._output_tokens.per_second(now),
            num_requests_finished=self.num_requests_finished,
            num_requests_failed=self.num_requests_failed,
        )

    def _describe_stages(self, now: float) -> list[service.StageStatus]:
        totals = self._meter.stages or [StageTotals() for _ in self.stages]
        return [_describe_stage(record, entry, now) for record, entry in zip(self.stages, totals, strict=True)]


def _placed(plan: StagePlan) -> StageRecord:
    return StageRecord(
        plan.stage,
        plan.worker,
        span=plan.span,
        precision=plan.precision,
        weight_bytes=plan.memory.weight_bytes,
        kv_bytes=plan.memory.kv_bytes,
        streamed_bytes=plan.memory.streamed_bytes,
        memory=plan.memory,
    )


def _describe_stage(record: StageRecord, totals: StageTotals, now: float) -> service.StageStatus:
    worker, plan = record.worker, record.memory
    resident_bytes = totals.resident_bytes or record.weight_bytes
    all_bytes = record.weight_bytes + record.streamed_bytes
    has_experts_on_disk = plan is not None and plan.expert_cache_bytes > 0
    return service.StageStatus(
        stage=record.stage,
        state=record.state,
        worker_id=worker.worker_id,
        node_name=worker.node_name,
        address=worker.address,
        process_id=worker.process_id,
        device=worker.device,
        numerics=record.numerics(),
        weight_bytes=record.weight_bytes,
        kv_bytes=record.kv_bytes,
        free_memory_bytes=worker.free_memory_bytes,
        total_memory_bytes=worker.total_memory_bytes,
        progress_bytes=record.progress_bytes,
        progress_total_bytes=record.progress_total_bytes,
        busy_share=min(1.0, record.busy.per_second(now)),
        message=record.message,
        num_steps=totals.num_steps,
        busy_seconds=totals.busy_ns / 1e9,
        bubble_seconds=totals.bubble_ns / 1e9,
        received_bytes=totals.received_bytes,
        hop_seconds=totals.hop_seconds,
        resident_bytes=resident_bytes,
        streamed_bytes=record.streamed_bytes if has_experts_on_disk else max(0, all_bytes - resident_bytes),
        read_bytes=totals.read_bytes,
        stall_seconds=totals.stall_ns / 1e9,
        disk_bytes_per_second=record.disk_bytes_per_second,
        num_streamed=plan.num_streamed if plan else 0,
        ring_bytes=plan.ring_bytes if plan else 0,
        buffer_bytes=plan.buffer_bytes if plan else 0,
        expert_cache_bytes=plan.expert_cache_bytes if plan else 0,
        process_bytes=worker.process_bytes,
        resident_share=min(1.0, resident_bytes / all_bytes) if all_bytes else 0.0,
        read_bytes_per_second=1e9 * totals.read_bytes / totals.busy_ns if totals.busy_ns else 0.0,
    )
