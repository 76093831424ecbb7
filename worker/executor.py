"""The seam between a worker's transport and its arithmetic.

`worker.relay` moves payloads and calls an Executor on its one compute thread; `worker.stage` is the real one,
`cluster.testing` has a fake. Covers the interface only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cluster.load_order import LoadOrder, LoadProgress
from cluster.microbatch import StepHeader, StepResult, WeightTraffic
from cluster.model_spec import ModelSizes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a step leaves behind at a stage: tensors for the next stage, or the result at the last one executed."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # name → [num_tokens, hidden_size], on the CPU
    result: StepResult | None = None
    traffic: WeightTraffic = field(default_factory=WeightTraffic)


class Executor(Protocol):
    """A loaded span. Every method is called from the compute thread, one at a time."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the span: what progress is measured against."""
        ...

    def execute(
        self, header: StepHeader, tensors: Mapping[str, Tensor], on_block: Callable[[int], None]
    ) -> StageOutput:
        """Run one step. `tensors` is what the stage before sent (empty at stage 0, which embeds token ids).

        Calls `on_block(blocks_done)` after every block. Applies the header's page deltas, sampling changes and finished
        sequences first. Raises a SpanwiseError, or whatever torch raises; the cached keys and values of the step's
        sequences are then undefined.
        """
        ...

    def open_epoch(self) -> None:
        """Forget every sequence: page tables and sampling states."""
        ...

    def close(self) -> None:
        """Stop what runs beside the compute thread and free what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """What a worker holds after loading."""

    executor: Executor
    weight_bytes: int
    kv_bytes: int
    compute_dtype: str
    wire_dtype: str
    kv_dtype: str
    streamed_bytes: int = 0  # read from disk at every step
    disk_bytes_per_second: float = 0.0  # what a short probe of that disk gave
    is_exact: bool = False  # sums have a fixed order


class SpanLoader(Protocol):
    """Loads spans and measures models; `worker.loading` has the real one. Called from the compute thread."""

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        """Count parameters from config.json alone. Raises ConfigurationError for an unsupported architecture."""
        ...

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        """Download and load. Raises ConfigurationError, NotFoundError, PermissionDeniedError, StageUnavailableError."""
        ...
