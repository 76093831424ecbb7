from cluster.rpc.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("protocol_version", "version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    version: str
    def __init__(self, protocol_version: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("protocol_version", "worker_id", "node_name", "address", "device", "device_name", "num_threads", "free_memory_bytes", "total_memory_bytes", "isa", "process_id", "versions", "process_bytes", "free_host_bytes")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    FREE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_id: str
    node_name: str
    address: str
    device: str
    device_name: str
    num_threads: int
    free_memory_bytes: int
    total_memory_bytes: int
    isa: str
    process_id: int
    versions: _containers.ScalarMap[str, str]
    process_bytes: int
    free_host_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., worker_id: _Optional[str] = ..., node_name: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., num_threads: _Optional[int] = ..., free_memory_bytes: _Optional[int] = ..., total_memory_bytes: _Optional[int] = ..., isa: _Optional[str] = ..., process_id: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., process_bytes: _Optional[int] = ..., free_host_bytes: _Optional[int] = ...) -> None: ...

class MeasureModelRequest(_message.Message):
    __slots__ = ("config_json",)
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    config_json: str
    def __init__(self, config_json: _Optional[str] = ...) -> None: ...

class WeightCount(_message.Message):
    __slots__ = ("num_linear", "num_rows", "num_kept", "num_small")
    NUM_LINEAR_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    NUM_SMALL_FIELD_NUMBER: _ClassVar[int]
    num_linear: int
    num_rows: int
    num_kept: int
    num_small: int
    def __init__(self, num_linear: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_kept: _Optional[int] = ..., num_small: _Optional[int] = ...) -> None: ...

class MeasureModelResponse(_message.Message):
    __slots__ = ("blocks", "experts", "num_experts", "embedding_num_parameters", "head", "kv_elements_per_token", "hidden_size", "num_output_elements", "num_heads", "rotary_elements_per_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    KV_ELEMENTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    ROTARY_ELEMENTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[WeightCount]
    experts: _containers.RepeatedCompositeFieldContainer[WeightCount]
    num_experts: int
    embedding_num_parameters: int
    head: WeightCount
    kv_elements_per_token: _containers.RepeatedScalarFieldContainer[int]
    hidden_size: int
    num_output_elements: int
    num_heads: int
    rotary_elements_per_token: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[WeightCount, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[WeightCount, _Mapping]]] = ..., num_experts: _Optional[int] = ..., embedding_num_parameters: _Optional[int] = ..., head: _Optional[_Union[WeightCount, _Mapping]] = ..., kv_elements_per_token: _Optional[_Iterable[int]] = ..., hidden_size: _Optional[int] = ..., num_output_elements: _Optional[int] = ..., num_heads: _Optional[int] = ..., rotary_elements_per_token: _Optional[int] = ...) -> None: ...

class LoadSpanRequest(_message.Message):
    __slots__ = ("epoch", "stage", "num_stages", "first_block", "end_block", "config_json", "hub", "folder", "weight_files", "weight_map", "precision", "kv_dtype", "wire_dtype", "num_pages", "page_size", "max_context", "is_exact", "store", "holders", "compute_dtype", "outlier_threshold", "num_streamed", "ring_bytes", "memory_bytes", "expert_cache_bytes")
    class WeightMapEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FILES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_MAP_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMED_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    epoch: _stage_pb2.Epoch
    stage: int
    num_stages: int
    first_block: int
    end_block: int
    config_json: str
    hub: _stage_pb2.HubSource
    folder: _stage_pb2.FolderSource
    weight_files: _containers.RepeatedCompositeFieldContainer[_stage_pb2.CheckpointFile]
    weight_map: _containers.ScalarMap[str, str]
    precision: str
    kv_dtype: str
    wire_dtype: str
    num_pages: int
    page_size: int
    max_context: int
    is_exact: bool
    store: StoreOptions
    holders: _containers.RepeatedScalarFieldContainer[str]
    compute_dtype: str
    outlier_threshold: float
    num_streamed: int
    ring_bytes: int
    memory_bytes: int
    expert_cache_bytes: int
    def __init__(self, epoch: _Optional[_Union[_stage_pb2.Epoch, _Mapping]] = ..., stage: _Optional[int] = ..., num_stages: _Optional[int] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., config_json: _Optional[str] = ..., hub: _Optional[_Union[_stage_pb2.HubSource, _Mapping]] = ..., folder: _Optional[_Union[_stage_pb2.FolderSource, _Mapping]] = ..., weight_files: _Optional[_Iterable[_Union[_stage_pb2.CheckpointFile, _Mapping]]] = ..., weight_map: _Optional[_Mapping[str, str]] = ..., precision: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., wire_dtype: _Optional[str] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., max_context: _Optional[int] = ..., is_exact: bool = ..., store: _Optional[_Union[StoreOptions, _Mapping]] = ..., holders: _Optional[_Iterable[str]] = ..., compute_dtype: _Optional[str] = ..., outlier_threshold: _Optional[float] = ..., num_streamed: _Optional[int] = ..., ring_bytes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., expert_cache_bytes: _Optional[int] = ...) -> None: ...

class StoreOptions(_message.Message):
    __slots__ = ("store_folder", "download_folder", "is_source_discarded", "quota_bytes", "reserve_bytes")
    STORE_FOLDER_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_FOLDER_FIELD_NUMBER: _ClassVar[int]
    IS_SOURCE_DISCARDED_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    store_folder: str
    download_folder: str
    is_source_discarded: bool
    quota_bytes: int
    reserve_bytes: int
    def __init__(self, store_folder: _Optional[str] = ..., download_folder: _Optional[str] = ..., is_source_discarded: bool = ..., quota_bytes: _Optional[int] = ..., reserve_bytes: _Optional[int] = ...) -> None: ...

class LoadSpanResponse(_message.Message):
    __slots__ = ("phase", "bytes_done", "bytes_total", "is_loaded", "weight_bytes", "kv_bytes", "compute_dtype", "wire_dtype", "kv_dtype", "streamed_bytes", "disk_bytes_per_second", "is_exact")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[LoadSpanResponse.Phase]
        PHASE_DOWNLOADING: _ClassVar[LoadSpanResponse.Phase]
        PHASE_LOADING: _ClassVar[LoadSpanResponse.Phase]
        PHASE_CONVERTING: _ClassVar[LoadSpanResponse.Phase]
        PHASE_VERIFYING: _ClassVar[LoadSpanResponse.Phase]
    PHASE_UNSPECIFIED: LoadSpanResponse.Phase
    PHASE_DOWNLOADING: LoadSpanResponse.Phase
    PHASE_LOADING: LoadSpanResponse.Phase
    PHASE_CONVERTING: LoadSpanResponse.Phase
    PHASE_VERIFYING: LoadSpanResponse.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    IS_LOADED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    phase: LoadSpanResponse.Phase
    bytes_done: int
    bytes_total: int
    is_loaded: bool
    weight_bytes: int
    kv_bytes: int
    compute_dtype: str
    wire_dtype: str
    kv_dtype: str
    streamed_bytes: int
    disk_bytes_per_second: float
    is_exact: bool
    def __init__(self, phase: _Optional[_Union[LoadSpanResponse.Phase, str]] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., is_loaded: bool = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., compute_dtype: _Optional[str] = ..., wire_dtype: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., streamed_bytes: _Optional[int] = ..., disk_bytes_per_second: _Optional[float] = ..., is_exact: bool = ...) -> None: ...

class OpenEpochRequest(_message.Message):
    __slots__ = ("epoch", "next_address", "next_node_name")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NEXT_NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    epoch: _stage_pb2.Epoch
    next_address: str
    next_node_name: str
    def __init__(self, epoch: _Optional[_Union[_stage_pb2.Epoch, _Mapping]] = ..., next_address: _Optional[str] = ..., next_node_name: _Optional[str] = ...) -> None: ...

class OpenEpochResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("header", "tensors", "piece")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    header: _stage_pb2.StepHeader
    tensors: _containers.RepeatedCompositeFieldContainer[_stage_pb2.TensorSpec]
    piece: _stage_pb2.TensorPiece
    def __init__(self, header: _Optional[_Union[_stage_pb2.StepHeader, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_stage_pb2.TensorSpec, _Mapping]]] = ..., piece: _Optional[_Union[_stage_pb2.TensorPiece, _Mapping]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("epoch", "step_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: _stage_pb2.Epoch
    step_id: int
    def __init__(self, epoch: _Optional[_Union[_stage_pb2.Epoch, _Mapping]] = ..., step_id: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: _stage_pb2.Epoch
    def __init__(self, epoch: _Optional[_Union[_stage_pb2.Epoch, _Mapping]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("result", "failure", "progress")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    result: _stage_pb2.StepResult
    failure: _stage_pb2.StepFailure
    progress: _stage_pb2.StepProgress
    def __init__(self, result: _Optional[_Union[_stage_pb2.StepResult, _Mapping]] = ..., failure: _Optional[_Union[_stage_pb2.StepFailure, _Mapping]] = ..., progress: _Optional[_Union[_stage_pb2.StepProgress, _Mapping]] = ...) -> None: ...

class ReadRangeRequest(_message.Message):
    __slots__ = ("file", "offset", "length")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    file: str
    offset: int
    length: int
    def __init__(self, file: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadRangeResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ListHeldRequest(_message.Message):
    __slots__ = ("collection",)
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    collection: str
    def __init__(self, collection: _Optional[str] = ...) -> None: ...

class ListHeldResponse(_message.Message):
    __slots__ = ("files", "claims")
    FILES_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[_stage_pb2.CheckpointFile]
    claims: _containers.RepeatedCompositeFieldContainer[Claim]
    def __init__(self, files: _Optional[_Iterable[_Union[_stage_pb2.CheckpointFile, _Mapping]]] = ..., claims: _Optional[_Iterable[_Union[Claim, _Mapping]]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("file", "has_begun", "bytes_done")
    FILE_FIELD_NUMBER: _ClassVar[int]
    HAS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    file: str
    has_begun: bool
    bytes_done: int
    def __init__(self, file: _Optional[str] = ..., has_begun: bool = ..., bytes_done: _Optional[int] = ...) -> None: ...

class ReadHeldRequest(_message.Message):
    __slots__ = ("collection", "file", "offset", "length")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    collection: str
    file: str
    offset: int
    length: int
    def __init__(self, collection: _Optional[str] = ..., file: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadHeldResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
