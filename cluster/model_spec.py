"""What is known about a model before any weight is read: its config, its files, its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

SUPPORTED_ARCHITECTURES = (
    "bloom",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
)
"""`model_type` values with an adapter in `worker.architectures` and a parity test."""


class Precision(Enum):
    """How weights are stored in a worker's memory."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def bytes_per_parameter(self) -> float:
        return {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}[self.value]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the hub, pinned to one commit."""

    repo_id: str
    commit: str  # 40 hexadecimal digits
    endpoint: str  # e.g. what HF_ENDPOINT said where the name was resolved


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A checkpoint folder on the head. A worker that sees the same files at the same path reads them itself; any
    other asks the coordinator's checkpoint service for the byte ranges of its span."""

    path: str
    digest: str  # of file names, sizes and small files' contents: tells whether two machines see the same folder


ModelSource = HubSource | FolderSource


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file of the checkpoint, by its path relative to the repository's root."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A resolved model. `config` is config.json as read; the other fields are derived from it and the files."""

    name: str  # as the user wrote it, or the alias; what clients pass as `model`
    source: ModelSource
    architecture: str  # config.json's model_type
    config: Mapping[str, Any]
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_context: int  # longest context the architecture allows, in tokens
    eos_token_ids: frozenset[int]
    weight_files: tuple[CheckpointFile, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)  # tensor → file, from the index; empty: one file
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> str:
        """The commit, or the folder's digest: what a fingerprint names."""
        return self.source.commit if isinstance(self.source, HubSource) else self.source.digest


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Parameter counts, from the block definitions themselves (a worker counts them on torch's meta device)."""

    block_num_parameters: tuple[int, ...]  # per block
    embedding_num_parameters: int
    head_num_parameters: int  # final norm and head, tied or not: the last stage holds its own
    kv_elements_per_token: tuple[int, ...]  # per block: keys and values of one token
    hidden_size: int
