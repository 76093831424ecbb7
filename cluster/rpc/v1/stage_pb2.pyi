from cluster.rpc.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Epoch(_message.Message):
    __slots__ = ("generation", "number")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    generation: int
    number: int
    def __init__(self, generation: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class PageDelta(_message.Message):
    __slots__ = ("sequence_id", "first_page", "page_ids", "cache_group")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_GROUP_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    first_page: int
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_group: int
    def __init__(self, sequence_id: _Optional[int] = ..., first_page: _Optional[int] = ..., page_ids: _Optional[_Iterable[int]] = ..., cache_group: _Optional[int] = ...) -> None: ...

class SequenceSampling(_message.Message):
    __slots__ = ("sequence_id", "prompt_length", "params", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    prompt_length: int
    params: _generation_pb2.SamplingParams
    logprobs: _generation_pb2.LogprobOptions
    def __init__(self, sequence_id: _Optional[int] = ..., prompt_length: _Optional[int] = ..., params: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., logprobs: _Optional[_Union[_generation_pb2.LogprobOptions, _Mapping]] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("stage", "received_ns", "started_ns", "finished_ns", "received_bytes", "read_bytes", "stall_ns", "resident_bytes")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALL_NS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    received_ns: int
    started_ns: int
    finished_ns: int
    received_bytes: int
    read_bytes: int
    stall_ns: int
    resident_bytes: int
    def __init__(self, stage: _Optional[int] = ..., received_ns: _Optional[int] = ..., started_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ..., received_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., stall_ns: _Optional[int] = ..., resident_bytes: _Optional[int] = ...) -> None: ...

class StepHeader(_message.Message):
    __slots__ = ("epoch", "step_id", "deadline_ms", "sequence_ids", "start_positions", "lengths", "token_ids", "logits_rows", "is_sampled", "page_deltas", "sampling_changes", "finished_sequence_ids", "last_stage", "timings")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    START_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_ROWS_FIELD_NUMBER: _ClassVar[int]
    IS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    PAGE_DELTAS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_CHANGES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    LAST_STAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    step_id: int
    deadline_ms: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    start_positions: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logits_rows: _containers.RepeatedScalarFieldContainer[int]
    is_sampled: _containers.RepeatedScalarFieldContainer[bool]
    page_deltas: _containers.RepeatedCompositeFieldContainer[PageDelta]
    sampling_changes: _containers.RepeatedCompositeFieldContainer[SequenceSampling]
    finished_sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    last_stage: int
    timings: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step_id: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., start_positions: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logits_rows: _Optional[_Iterable[int]] = ..., is_sampled: _Optional[_Iterable[bool]] = ..., page_deltas: _Optional[_Iterable[_Union[PageDelta, _Mapping]]] = ..., sampling_changes: _Optional[_Iterable[_Union[SequenceSampling, _Mapping]]] = ..., finished_sequence_ids: _Optional[_Iterable[int]] = ..., last_stage: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("sequence_id", "start_position", "tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    start_position: int
    tokens: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprobs]
    def __init__(self, sequence_id: _Optional[int] = ..., start_position: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step_id", "sequence_ids", "token_ids", "logprobs", "prompt_logprobs", "timings")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    step_id: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    timings: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step_id: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class StepFailure(_message.Message):
    __slots__ = ("epoch", "step_id", "stage", "reason", "message", "is_stage_lost")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_STAGE_LOST_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    step_id: int
    stage: int
    reason: str
    message: str
    is_stage_lost: bool
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step_id: _Optional[int] = ..., stage: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., is_stage_lost: bool = ...) -> None: ...

class StepProgress(_message.Message):
    __slots__ = ("epoch", "step_id", "stage", "num_blocks_done", "num_blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    step_id: int
    stage: int
    num_blocks_done: int
    num_blocks: int
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step_id: _Optional[int] = ..., stage: _Optional[int] = ..., num_blocks_done: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorPiece(_message.Message):
    __slots__ = ("tensor_index", "offset", "data")
    TENSOR_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor_index: int
    offset: int
    data: bytes
    def __init__(self, tensor_index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class HubSource(_message.Message):
    __slots__ = ("repo_id", "commit", "endpoint", "token")
    REPO_ID_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    repo_id: str
    commit: str
    endpoint: str
    token: str
    def __init__(self, repo_id: _Optional[str] = ..., commit: _Optional[str] = ..., endpoint: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class FolderSource(_message.Message):
    __slots__ = ("path", "digest", "checkpoint_service")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SERVICE_FIELD_NUMBER: _ClassVar[int]
    path: str
    digest: str
    checkpoint_service: str
    def __init__(self, path: _Optional[str] = ..., digest: _Optional[str] = ..., checkpoint_service: _Optional[str] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
