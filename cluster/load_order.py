"""What a worker is told to load, and what it says meanwhile and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.model_spec import CheckpointFile, ModelSource, Precision
from cluster.span import Span

SLICE_BYTES = 64 << 20
"""The most that is read from the block store at once: a slot of the ring holds it, and so does a transient copy."""

GPU_SLOTS = 2
"""Of the most that is read at once, on a GPU of a stage that streams: one being computed with, one arriving."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Where a worker keeps what it converts and downloads, and how much of it. Empty folders: the defaults."""

    store_folder: str = ""
    download_folder: str = ""
    is_source_discarded: bool = False  # delete each downloaded file once everything that it holds is converted
    quota_bytes: int = 0  # of the block store; 0: none
    reserve_bytes: int = 0  # of the disk that must stay free


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Everything a worker needs to load its span. `token` is a hub token: never log it."""

    stage: int
    num_stages: int
    span: Span
    config: Mapping[str, Any]  # config.json
    source: ModelSource
    checkpoint_service: str  # host:port of the coordinator's; empty when every worker reaches the source itself
    weight_files: tuple[CheckpointFile, ...]
    weight_map: Mapping[str, str]  # tensor → file; empty for a single file
    precision: Precision
    kv_dtype: str  # "auto", "fp32", "bf16" or "fp16"
    wire_dtype: str  # likewise
    num_pages: int
    page_size: int
    max_context: int
    is_exact: bool
    token: str = field(default="", repr=False)
    store: StoreOptions = field(default_factory=StoreOptions)
    holders: tuple[str, ...] = ()  # host:port of stage services that may hold converted parts or downloaded files
    compute_dtype: str = "auto"  # "auto", "fp32", "bf16" or "fp16"
    outlier_threshold: float = 6.0  # of int8: larger inputs keep 16 bits, and so do those that stand out; 0: none do
    num_streamed: int = 0  # the first of `streaming_order` are read from disk at every step
    ring_bytes: int = 0  # of buffers for them
    memory_bytes: int = 0  # for resident weights and keys and values together, between which the stage may shift
    expert_cache_bytes: int = 0  # for experts that are read on demand; 0: all experts are resident


LoadPhase = Literal["downloading", "converting", "verifying", "loading"]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A sign of life while loading. `bytes_total` 0 means unknown."""

    phase: LoadPhase
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class LoadedReport:
    """What a worker holds after loading."""

    weight_bytes: int  # in memory
    kv_bytes: int
    compute_dtype: str
    wire_dtype: str
    kv_dtype: str
    streamed_bytes: int = 0  # read from disk at every step
    disk_bytes_per_second: float = 0.0  # what a short probe of that disk gave
    is_exact: bool = False  # sums have a fixed order
