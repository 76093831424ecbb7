"""From worker addresses to a serving pipeline: hello, measure, place, load, open the first epoch, one real token.

Covers the order of things and what the board shows meanwhile. Placement is `coordinator.placement`'s decision.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.config import ServeConfig
from cluster.errors import ConfigurationError, IncompatibleVersionError, SpanwiseError
from cluster.load_order import LoadedReport, LoadOrder, LoadProgress, StoreOptions
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSpec, Precision
from cluster.placement import Placement, StagePlan, WorkerInfo
from cluster.rpc.v1 import generation_service_pb2 as service
from coordinator.board import StageRecord, StatusBoard
from coordinator.placement import PlacementOptions, place
from coordinator.stage_link import StageLink

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

PAGE_SIZE = 64
DEFAULT_MAX_CONTEXT = 4096

_STATES = {
    "downloading": service.STAGE_STATE_DOWNLOADING,
    "converting": service.STAGE_STATE_CONVERTING,
    "verifying": service.STAGE_STATE_VERIFYING,
    "loading": service.STAGE_STATE_LOADING,
}


@dataclass(frozen=True, slots=True)
class BringUp:
    """What bringing a pipeline up needs to know."""

    config: ServeConfig
    spec: ModelSpec
    checkpoint_service: str  # host:port; empty when every worker reaches the source itself
    token: str
    generation: int


async def bring_up(job: BringUp, links: Sequence[StageLink], board: StatusBoard) -> tuple[Placement, list[StageLink]]:
    """Load every stage; return the placement and the links in stage order. Raises SpanwiseError naming what failed."""
    workers = await _gather([link.hello() for link in links])
    _check_versions(workers)
    board.meet(workers)
    board.message = "measuring the model"
    sizes = await links[0].measure(job.spec.config)
    placement = place(workers, sizes, placement_options(job))
    by_worker = {worker.worker_id: link for worker, link in zip(workers, links, strict=True)}
    ordered = [by_worker[plan.worker.worker_id] for plan in placement.stages]
    board.place(placement)
    board.message = "loading"
    loads = [
        _load(link, _order(job, placement, plan), placement.epoch, record, job.config.load_timeout)
        for link, plan, record in zip(ordered, placement.stages, board.stages, strict=True)
    ]
    await _gather(loads)
    return placement, ordered


def placement_options(job: BringUp) -> PlacementOptions:
    """Return what placement may assume about this model and these settings."""
    config, spec = job.config, job.spec
    return PlacementOptions(
        precision=storage_precision(config.precision, spec),
        kv_dtype=config.kv_dtype,
        page_size=PAGE_SIZE,
        max_context=context_limit(config.max_context, spec),
        max_running=config.max_running,
        kv_memory_bytes=config.kv_memory,
        generation=job.generation,
        max_step_tokens=config.max_step_tokens,
        compute_dtype=config.compute_dtype,
        is_precision_fixed=spec.stored_precision is not None,
        is_context_fixed=config.max_context > 0,
    )


def storage_precision(setting: str, spec: ModelSpec) -> Precision:
    """Return the precision of a setting; "auto" is what the checkpoint says its weights are stored in.

    Raises ConfigurationError for another one than a quantized checkpoint comes in.
    """
    stored = spec.stored_precision
    if stored is not None and setting not in ("auto", stored.value):
        raise ConfigurationError(
            f"{spec.name} comes in {stored.value} and cannot be served in {setting}: leave --precision out, or serve "
            "the original checkpoint"
        )
    if stored is not None:
        return stored
    if setting != "auto":
        return Precision(setting)
    named = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"float16": Precision.FP16, "bfloat16": Precision.BF16}.get(named, Precision.FP32)


def context_limit(setting: int, spec: ModelSpec) -> int:
    """Return the longest context to serve. Raises ConfigurationError for one that the model does not have."""
    if setting > spec.max_context:
        raise ConfigurationError(
            f"--max-context {setting} is more than {spec.name} allows, which is {spec.max_context} tokens"
        )
    return setting or min(spec.max_context, DEFAULT_MAX_CONTEXT)


def _order(job: BringUp, placement: Placement, plan: StagePlan) -> LoadOrder:
    config, memory = job.config, plan.memory
    return LoadOrder(
        stage=plan.stage,
        num_stages=len(placement.stages),
        span=plan.span,
        config=job.spec.config,
        source=job.spec.source,
        checkpoint_service=job.checkpoint_service,
        weight_files=job.spec.weight_files,
        weight_map=job.spec.weight_map,
        precision=plan.precision,
        kv_dtype=config.kv_dtype,
        wire_dtype=config.wire_dtype,
        num_pages=placement.num_pages,
        page_size=placement.page_size,
        max_context=placement.max_context,
        is_exact=config.exact,
        token=job.token,
        store=_store_options(config),
        holders=tuple(other.worker.address for other in placement.stages if other.stage != plan.stage),
        compute_dtype=config.compute_dtype,
        outlier_threshold=config.outlier_threshold,
        num_streamed=memory.num_streamed,
        ring_bytes=memory.ring_bytes,
        memory_bytes=memory.shared_bytes,
        expert_cache_bytes=memory.expert_cache_bytes,
    )


def _store_options(config: ServeConfig) -> StoreOptions:
    return StoreOptions(
        store_folder=config.store_dir,
        download_folder=config.download_dir,
        is_source_discarded=config.discard_source,
        quota_bytes=config.store_quota,
        reserve_bytes=config.disk_reserve,
    )


async def _load(link: StageLink, order: LoadOrder, epoch: Epoch, record: StageRecord, stall_seconds: float) -> None:
    def show(progress: LoadProgress) -> None:
        record.state = _STATES[progress.phase]
        record.progress_bytes, record.progress_total_bytes = progress.bytes_done, progress.bytes_total

    record.state = service.STAGE_STATE_LOADING
    report: LoadedReport = await link.load(order, epoch, show, stall_seconds=stall_seconds)
    record.state = service.STAGE_STATE_READY
    record.weight_bytes, record.kv_bytes = report.weight_bytes, report.kv_bytes
    record.streamed_bytes, record.disk_bytes_per_second = report.streamed_bytes, report.disk_bytes_per_second
    record.compute_dtype, record.kv_dtype, record.wire_dtype = report.compute_dtype, report.kv_dtype, report.wire_dtype
    record.is_exact = report.is_exact
    logger.info("stage %s on %s holds blocks %s", order.stage, record.worker.node_name, order.span)


def _check_versions(workers: Sequence[WorkerInfo]) -> None:
    """Refuse workers whose numerics-relevant packages differ: their tokens would too."""
    for package in ("torch", "transformers"):
        found = {worker.node_name: dict(worker.versions).get(package, "none") for worker in workers}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{node}: {version}" for node, version in sorted(found.items()))
            raise IncompatibleVersionError(
                f"the nodes have different versions of {package} ({listed}); install the same"
            )


async def _gather(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all; the first failure cancels the others and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one failure: an unexpected one before those that we know how to tell."""
    known, unknown = failures.split(SpanwiseError)
    return (unknown or known or failures).exceptions[0]
