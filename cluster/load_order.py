"""What a worker is told to load, and what it says meanwhile and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.model_spec import CheckpointFile, ModelSource, Precision
from cluster.span import Span


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


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A sign of life while loading. `bytes_total` 0 means unknown."""

    phase: Literal["downloading", "loading"]
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class LoadedReport:
    """What a worker holds after loading."""

    weight_bytes: int
    kv_bytes: int
    compute_dtype: str
    wire_dtype: str
    kv_dtype: str
