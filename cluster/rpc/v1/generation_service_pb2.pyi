from cluster.rpc.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClusterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLUSTER_STATE_UNSPECIFIED: _ClassVar[ClusterState]
    CLUSTER_STATE_LOADING: _ClassVar[ClusterState]
    CLUSTER_STATE_READY: _ClassVar[ClusterState]
    CLUSTER_STATE_DRAINING: _ClassVar[ClusterState]
    CLUSTER_STATE_FAILED: _ClassVar[ClusterState]

class StageState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_STATE_UNSPECIFIED: _ClassVar[StageState]
    STAGE_STATE_CONNECTING: _ClassVar[StageState]
    STAGE_STATE_DOWNLOADING: _ClassVar[StageState]
    STAGE_STATE_LOADING: _ClassVar[StageState]
    STAGE_STATE_READY: _ClassVar[StageState]
    STAGE_STATE_LOST: _ClassVar[StageState]
    STAGE_STATE_CONVERTING: _ClassVar[StageState]
    STAGE_STATE_VERIFYING: _ClassVar[StageState]
CLUSTER_STATE_UNSPECIFIED: ClusterState
CLUSTER_STATE_LOADING: ClusterState
CLUSTER_STATE_READY: ClusterState
CLUSTER_STATE_DRAINING: ClusterState
CLUSTER_STATE_FAILED: ClusterState
STAGE_STATE_UNSPECIFIED: StageState
STAGE_STATE_CONNECTING: StageState
STAGE_STATE_DOWNLOADING: StageState
STAGE_STATE_LOADING: StageState
STAGE_STATE_READY: StageState
STAGE_STATE_LOST: StageState
STAGE_STATE_CONVERTING: StageState
STAGE_STATE_VERIFYING: StageState

class GenerateRequest(_message.Message):
    __slots__ = ("model", "request_id", "text", "token_ids", "chat", "sampling", "stop", "logprobs", "num_completions", "echo", "resume_offset")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    RESUME_OFFSET_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    text: str
    token_ids: _generation_pb2.TokenIds
    chat: _generation_pb2.ChatMessages
    sampling: _generation_pb2.SamplingParams
    stop: _generation_pb2.StopRules
    logprobs: _generation_pb2.LogprobOptions
    num_completions: int
    echo: bool
    resume_offset: int
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[_generation_pb2.ChatMessages, _Mapping]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_generation_pb2.StopRules, _Mapping]] = ..., logprobs: _Optional[_Union[_generation_pb2.LogprobOptions, _Mapping]] = ..., num_completions: _Optional[int] = ..., echo: bool = ..., resume_offset: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "prompt_echo", "piece", "completion_finished", "finished")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ECHO_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FINISHED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    accepted: _generation_pb2.Accepted
    progress: _generation_pb2.Progress
    prompt_echo: _generation_pb2.PromptEcho
    piece: _generation_pb2.Piece
    completion_finished: _generation_pb2.CompletionFinished
    finished: _generation_pb2.Finished
    def __init__(self, accepted: _Optional[_Union[_generation_pb2.Accepted, _Mapping]] = ..., progress: _Optional[_Union[_generation_pb2.Progress, _Mapping]] = ..., prompt_echo: _Optional[_Union[_generation_pb2.PromptEcho, _Mapping]] = ..., piece: _Optional[_Union[_generation_pb2.Piece, _Mapping]] = ..., completion_finished: _Optional[_Union[_generation_pb2.CompletionFinished, _Mapping]] = ..., finished: _Optional[_Union[_generation_pb2.Finished, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "text", "chat")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    chat: _generation_pb2.ChatMessages
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[_generation_pb2.ChatMessages, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "text")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("model", "token_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "architecture", "revision", "max_context", "vocab_size", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    revision: str
    max_context: int
    vocab_size: int
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., revision: _Optional[str] = ..., max_context: _Optional[int] = ..., vocab_size: _Optional[int] = ..., has_chat_template: bool = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class DescribeClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageStatus(_message.Message):
    __slots__ = ("stage", "state", "worker_id", "node_name", "address", "process_id", "device", "numerics", "weight_bytes", "kv_bytes", "free_memory_bytes", "total_memory_bytes", "progress_bytes", "progress_total_bytes", "busy_share", "message", "num_steps", "busy_seconds", "bubble_seconds", "received_bytes", "hop_seconds", "resident_bytes", "streamed_bytes", "read_bytes", "stall_seconds", "disk_bytes_per_second", "num_streamed", "ring_bytes", "buffer_bytes", "expert_cache_bytes", "process_bytes", "resident_share", "read_bytes_per_second")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUBBLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMED_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SHARE_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    stage: int
    state: StageState
    worker_id: str
    node_name: str
    address: str
    process_id: int
    device: str
    numerics: _generation_pb2.StageNumerics
    weight_bytes: int
    kv_bytes: int
    free_memory_bytes: int
    total_memory_bytes: int
    progress_bytes: int
    progress_total_bytes: int
    busy_share: float
    message: str
    num_steps: int
    busy_seconds: float
    bubble_seconds: float
    received_bytes: int
    hop_seconds: float
    resident_bytes: int
    streamed_bytes: int
    read_bytes: int
    stall_seconds: float
    disk_bytes_per_second: float
    num_streamed: int
    ring_bytes: int
    buffer_bytes: int
    expert_cache_bytes: int
    process_bytes: int
    resident_share: float
    read_bytes_per_second: float
    def __init__(self, stage: _Optional[int] = ..., state: _Optional[_Union[StageState, str]] = ..., worker_id: _Optional[str] = ..., node_name: _Optional[str] = ..., address: _Optional[str] = ..., process_id: _Optional[int] = ..., device: _Optional[str] = ..., numerics: _Optional[_Union[_generation_pb2.StageNumerics, _Mapping]] = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., free_memory_bytes: _Optional[int] = ..., total_memory_bytes: _Optional[int] = ..., progress_bytes: _Optional[int] = ..., progress_total_bytes: _Optional[int] = ..., busy_share: _Optional[float] = ..., message: _Optional[str] = ..., num_steps: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., bubble_seconds: _Optional[float] = ..., received_bytes: _Optional[int] = ..., hop_seconds: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., streamed_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., stall_seconds: _Optional[float] = ..., disk_bytes_per_second: _Optional[float] = ..., num_streamed: _Optional[int] = ..., ring_bytes: _Optional[int] = ..., buffer_bytes: _Optional[int] = ..., expert_cache_bytes: _Optional[int] = ..., process_bytes: _Optional[int] = ..., resident_share: _Optional[float] = ..., read_bytes_per_second: _Optional[float] = ...) -> None: ...

class DescribeClusterResponse(_message.Message):
    __slots__ = ("version", "protocol_version", "state", "message", "model", "stages", "num_running", "num_waiting", "max_waiting", "num_pages", "num_free_pages", "page_size", "uptime_seconds", "prompt_tokens_per_second", "output_tokens_per_second", "num_requests_finished", "num_requests_failed", "num_steps_in_flight", "epoch", "advice", "max_step_tokens")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_version: int
    state: ClusterState
    message: str
    model: Model
    stages: _containers.RepeatedCompositeFieldContainer[StageStatus]
    num_running: int
    num_waiting: int
    max_waiting: int
    num_pages: int
    num_free_pages: int
    page_size: int
    uptime_seconds: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    num_requests_finished: int
    num_requests_failed: int
    num_steps_in_flight: int
    epoch: str
    advice: str
    max_step_tokens: int
    def __init__(self, version: _Optional[str] = ..., protocol_version: _Optional[int] = ..., state: _Optional[_Union[ClusterState, str]] = ..., message: _Optional[str] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[StageStatus, _Mapping]]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., max_waiting: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_free_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., prompt_tokens_per_second: _Optional[float] = ..., output_tokens_per_second: _Optional[float] = ..., num_requests_finished: _Optional[int] = ..., num_requests_failed: _Optional[int] = ..., num_steps_in_flight: _Optional[int] = ..., epoch: _Optional[str] = ..., advice: _Optional[str] = ..., max_step_tokens: _Optional[int] = ...) -> None: ...
