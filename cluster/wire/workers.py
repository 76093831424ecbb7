"""Hellos, measurements and load orders: domain values to protobuf and back."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import InvalidRequestError
from cluster.load_order import LoadedReport, LoadOrder, LoadPhase, LoadProgress, StoreOptions
from cluster.microbatch import Epoch
from cluster.model_spec import (
    CheckpointFile,
    FolderSource,
    HubSource,
    ModelSizes,
    ModelSource,
    Precision,
    WeightCount,
)
from cluster.placement import WorkerId, WorkerInfo
from cluster.rpc.v1 import stage_pb2, stage_service_pb2
from cluster.span import Span
from cluster.version import PROTOCOL_VERSION
from cluster.wire.steps import epoch_to_proto


def worker_info_to_proto(info: WorkerInfo) -> stage_service_pb2.HelloResponse:
    return stage_service_pb2.HelloResponse(
        protocol_version=PROTOCOL_VERSION,
        worker_id=info.worker_id,
        node_name=info.node_name,
        address=info.address,
        device=info.device,
        device_name=info.device_name,
        num_threads=info.num_threads,
        free_memory_bytes=info.free_memory_bytes,
        total_memory_bytes=info.total_memory_bytes,
        isa=info.isa,
        process_id=info.process_id,
        versions=dict(info.versions),
        process_bytes=info.process_bytes,
        free_host_bytes=info.free_host_bytes,
    )


def worker_info_from_proto(message: stage_service_pb2.HelloResponse) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(message.worker_id),
        node_name=message.node_name,
        address=message.address,
        device=message.device,
        device_name=message.device_name,
        num_threads=message.num_threads,
        free_memory_bytes=message.free_memory_bytes,
        total_memory_bytes=message.total_memory_bytes,
        isa=message.isa,
        process_id=message.process_id,
        versions=tuple(sorted(message.versions.items())),
        process_bytes=message.process_bytes,
        free_host_bytes=message.free_host_bytes,
    )


def model_sizes_to_proto(sizes: ModelSizes) -> stage_service_pb2.MeasureModelResponse:
    return stage_service_pb2.MeasureModelResponse(
        blocks=[_count_to_proto(count) for count in sizes.blocks],
        experts=[_count_to_proto(count) for count in sizes.experts],
        num_experts=sizes.num_experts,
        embedding_num_parameters=sizes.embedding_num_parameters,
        head=_count_to_proto(sizes.head),
        kv_elements_per_token=sizes.kv_elements_per_token,
        hidden_size=sizes.hidden_size,
        num_output_elements=sizes.num_output_elements,
        num_heads=sizes.num_heads,
        rotary_elements_per_token=sizes.rotary_elements_per_token,
    )


def model_sizes_from_proto(message: stage_service_pb2.MeasureModelResponse) -> ModelSizes:
    return ModelSizes(
        blocks=tuple(_count_from_proto(count) for count in message.blocks),
        experts=tuple(_count_from_proto(count) for count in message.experts),
        num_experts=message.num_experts,
        embedding_num_parameters=message.embedding_num_parameters,
        head=_count_from_proto(message.head),
        kv_elements_per_token=tuple(message.kv_elements_per_token),
        hidden_size=message.hidden_size,
        num_output_elements=message.num_output_elements,
        num_heads=message.num_heads,
        rotary_elements_per_token=message.rotary_elements_per_token,
    )


def _count_to_proto(count: WeightCount) -> stage_service_pb2.WeightCount:
    return stage_service_pb2.WeightCount(
        num_linear=count.num_linear, num_rows=count.num_rows, num_kept=count.num_kept, num_small=count.num_small
    )


def _count_from_proto(message: stage_service_pb2.WeightCount) -> WeightCount:
    return WeightCount(message.num_linear, message.num_rows, message.num_kept, message.num_small)


def load_order_to_proto(order: LoadOrder, epoch: Epoch) -> stage_service_pb2.LoadSpanRequest:
    message = stage_service_pb2.LoadSpanRequest(
        epoch=epoch_to_proto(epoch),
        stage=order.stage,
        num_stages=order.num_stages,
        first_block=order.span.start,
        end_block=order.span.end,
        config_json=json.dumps(dict(order.config)),
        weight_files=[
            stage_pb2.CheckpointFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in order.weight_files
        ],
        weight_map=order.weight_map,
        precision=order.precision.value,
        kv_dtype=order.kv_dtype,
        wire_dtype=order.wire_dtype,
        num_pages=order.num_pages,
        page_size=order.page_size,
        max_context=order.max_context,
        is_exact=order.is_exact,
        store=_store_to_proto(order.store),
        holders=order.holders,
        compute_dtype=order.compute_dtype,
        outlier_threshold=order.outlier_threshold,
        num_streamed=order.num_streamed,
        ring_bytes=order.ring_bytes,
        memory_bytes=order.memory_bytes,
        expert_cache_bytes=order.expert_cache_bytes,
    )
    source = order.source
    if isinstance(source, HubSource):
        message.hub.CopyFrom(
            stage_pb2.HubSource(
                repo_id=source.repo_id, commit=source.commit, endpoint=source.endpoint, token=order.token
            )
        )
    else:
        message.folder.CopyFrom(
            stage_pb2.FolderSource(path=source.path, digest=source.digest, checkpoint_service=order.checkpoint_service)
        )
    return message


def load_order_from_proto(message: stage_service_pb2.LoadSpanRequest) -> LoadOrder:
    """Return the order. Raises InvalidRequestError for one that no coordinator of this version sends."""
    try:
        span, precision, config = _parse_order(message)
    except ValueError as error:
        raise InvalidRequestError(f"malformed order to load a span: {error}") from error
    return LoadOrder(
        stage=message.stage,
        num_stages=message.num_stages,
        span=span,
        config=config,
        source=_source_from_proto(message),
        checkpoint_service=message.folder.checkpoint_service,
        weight_files=tuple(CheckpointFile(file.name, file.size_bytes, file.sha256) for file in message.weight_files),
        weight_map=dict(message.weight_map),
        precision=precision,
        kv_dtype=message.kv_dtype,
        wire_dtype=message.wire_dtype,
        num_pages=message.num_pages,
        page_size=message.page_size,
        max_context=message.max_context,
        is_exact=message.is_exact,
        token=message.hub.token,
        store=_store_from_proto(message.store),
        holders=tuple(message.holders),
        compute_dtype=message.compute_dtype,
        outlier_threshold=message.outlier_threshold,
        num_streamed=message.num_streamed,
        ring_bytes=message.ring_bytes,
        memory_bytes=message.memory_bytes,
        expert_cache_bytes=message.expert_cache_bytes,
    )


def _store_to_proto(store: StoreOptions) -> stage_service_pb2.StoreOptions:
    return stage_service_pb2.StoreOptions(
        store_folder=store.store_folder,
        download_folder=store.download_folder,
        is_source_discarded=store.is_source_discarded,
        quota_bytes=store.quota_bytes,
        reserve_bytes=store.reserve_bytes,
    )


def _store_from_proto(message: stage_service_pb2.StoreOptions) -> StoreOptions:
    return StoreOptions(
        store_folder=message.store_folder,
        download_folder=message.download_folder,
        is_source_discarded=message.is_source_discarded,
        quota_bytes=message.quota_bytes,
        reserve_bytes=message.reserve_bytes,
    )


def _parse_order(message: stage_service_pb2.LoadSpanRequest) -> tuple[Span, Precision, dict[str, Any]]:
    return (
        Span(message.first_block, message.end_block),
        Precision(message.precision),
        json.loads(message.config_json),
    )


def _source_from_proto(message: stage_service_pb2.LoadSpanRequest) -> ModelSource:
    if message.WhichOneof("source") == "hub":
        return HubSource(message.hub.repo_id, message.hub.commit, message.hub.endpoint)
    return FolderSource(message.folder.path, message.folder.digest)


_PHASES: dict[LoadPhase, stage_service_pb2.LoadSpanResponse.Phase] = {
    "downloading": stage_service_pb2.LoadSpanResponse.PHASE_DOWNLOADING,
    "converting": stage_service_pb2.LoadSpanResponse.PHASE_CONVERTING,
    "verifying": stage_service_pb2.LoadSpanResponse.PHASE_VERIFYING,
    "loading": stage_service_pb2.LoadSpanResponse.PHASE_LOADING,
}
_PHASE_NAMES = {phase: name for name, phase in _PHASES.items()}


def load_progress_to_proto(progress: LoadProgress) -> stage_service_pb2.LoadSpanResponse:
    return stage_service_pb2.LoadSpanResponse(
        phase=_PHASES[progress.phase], bytes_done=progress.bytes_done, bytes_total=progress.bytes_total
    )


def load_progress_from_proto(message: stage_service_pb2.LoadSpanResponse) -> LoadProgress:
    return LoadProgress(_PHASE_NAMES.get(message.phase, "loading"), message.bytes_done, message.bytes_total)


def loaded_report_to_proto(report: LoadedReport) -> stage_service_pb2.LoadSpanResponse:
    return stage_service_pb2.LoadSpanResponse(
        phase=stage_service_pb2.LoadSpanResponse.PHASE_LOADING,
        is_loaded=True,
        weight_bytes=report.weight_bytes,
        kv_bytes=report.kv_bytes,
        compute_dtype=report.compute_dtype,
        wire_dtype=report.wire_dtype,
        kv_dtype=report.kv_dtype,
        streamed_bytes=report.streamed_bytes,
        disk_bytes_per_second=report.disk_bytes_per_second,
        is_exact=report.is_exact,
    )


def loaded_report_from_proto(message: stage_service_pb2.LoadSpanResponse) -> LoadedReport:
    return LoadedReport(
        weight_bytes=message.weight_bytes,
        kv_bytes=message.kv_bytes,
        compute_dtype=message.compute_dtype,
        wire_dtype=message.wire_dtype,
        kv_dtype=message.kv_dtype,
        streamed_bytes=message.streamed_bytes,
        disk_bytes_per_second=message.disk_bytes_per_second,
        is_exact=message.is_exact,
    )
