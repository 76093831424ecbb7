"""What is known about a model before any weight is read: its config, its files, its sizes."""

from __future__ import annotations

import math
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
    """How weights of linear layers are stored. INT8: one scale per output row. NF4: as bitsandbytes stores it."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    NF4 = "nf4"

    @property
    def is_quantized(self) -> bool:
        return self in (Precision.INT8, Precision.NF4)

    @property
    def of_head(self) -> Precision:
        """How the head is stored: in 8 bits beside NF4 blocks, since an error of its weights is one of the logits."""
        return Precision.INT8 if self is Precision.NF4 else self

    @property
    def bits_per_parameter(self) -> float:
        """Bits of one parameter of a linear layer, scales of NF4's blocks included, those of rows aside."""
        return {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}[self.value]


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
    sha256: str = ""  # of its content, in hex, where the hub tells


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
    stored_precision: Precision | None = None  # of a checkpoint that comes quantized, or of a converted one

    @property
    def revision(self) -> str:
        """The commit, or the folder's digest: what a fingerprint names."""
        return self.source.commit if isinstance(self.source, HubSource) else self.source.digest


@dataclass(frozen=True, slots=True)
class WeightCount:
    """What a part of a model consists of, in numbers."""

    num_linear: int = 0  # parameters of linear layers, which are stored in the placement's precision
    num_rows: int = 0  # output rows of those layers: each has a scale in int8
    num_kept: int = 0  # parameters of linear layers that a quantized checkpoint left in 16 bits
    num_small: int = 0  # norms, biases and the like, held in the compute dtype

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_kept + self.num_small

    def __add__(self, other: WeightCount) -> WeightCount:
        return WeightCount(
            self.num_linear + other.num_linear,
            self.num_rows + other.num_rows,
            self.num_kept + other.num_kept,
            self.num_small + other.num_small,
        )

    def large_bytes(self, precision: Precision) -> int:
        """Return the bytes that a pass reads when the part is streamed."""
        return math.ceil(self.num_linear * precision.bits_per_parameter / 8) + 2 * self.num_kept

    def small_bytes(self, precision: Precision) -> int:
        """Return the bytes that stay in memory even when the part is streamed."""
        return 4 * self.num_small + (8 * self.num_rows if precision is Precision.INT8 else 0)

    def resident_bytes(self, precision: Precision) -> int:
        """Return the bytes of the part when it is held in memory."""
        return self.large_bytes(precision) + self.small_bytes(precision)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model consists of, from the block definitions themselves (a worker counts them on torch's meta device)."""

    blocks: tuple[WeightCount, ...]  # per block, experts included
    experts: tuple[WeightCount, ...]  # per block: all of its experts together; empty counts where there are none
    num_experts: int  # per block that has any
    embedding_num_parameters: int
    head: WeightCount  # final norm and head, tied or not: the last stage holds its own
    kv_elements_per_token: tuple[int, ...]  # per block: keys and values of one token
    hidden_size: int
    num_output_elements: int  # per token: the outputs of all linear layers that one block computes, at most
    num_heads: int = 0  # of queries
    rotary_elements_per_token: int = 0  # of the table of angles that a stage holds for every position
