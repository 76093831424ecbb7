"""A span of arithmetic simple enough to check by head: for tests of transport, coordinator and command.

Stage 0 turns every token id into a row of that number, every block adds 1, the last stage samples the last row's value.
So a pipeline of B blocks answers token t with t + B. The outputs have the shape of `worker.executor`'s values; the
relay's tests run on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from cluster.load_order import LoadOrder, LoadProgress
from cluster.microbatch import StepHeader, StepResult, WeightTraffic
from cluster.model_spec import ModelSizes, WeightCount

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN_STATES = "hidden_states"

OnExecute = Callable[[int, StepHeader], None]
"""Called in the compute thread with the stage and the header before a step is computed; may block or raise."""


def do_nothing(_stage: int, _header: StepHeader) -> None:
    """Compute at once."""


@dataclass(frozen=True, slots=True)
class FakeOutput:
    """As worker.executor.StageOutput."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    result: StepResult | None = None
    traffic: WeightTraffic = field(default_factory=WeightTraffic)


class FakeExecutor:
    """Counts blocks instead of computing them. `steps` are the ids of the steps begun in the open epoch."""

    def __init__(
        self, stage: int, num_blocks: int, *, hidden_size: int = 8, on_execute: OnExecute = do_nothing
    ) -> None:
        self.num_blocks = num_blocks
        self.steps: list[int] = []
        self.num_epochs = 0
        self.is_closed = False
        self._stage = stage
        self._hidden_size = hidden_size
        self._on_execute = on_execute

    def execute(self, header: StepHeader, tensors: Mapping[str, Tensor], on_block: Callable[[int], None]) -> FakeOutput:
        """Add the number of this span's blocks to every row."""
        self.steps.append(header.step_id)
        on_block(0)
        self._on_execute(self._stage, header)
        rows = (tensors[HIDDEN_STATES] if tensors else self._embed(header)) + self.num_blocks
        on_block(self.num_blocks)
        if header.last_stage == self._stage:
            return FakeOutput(result=_sample(header, rows))
        return FakeOutput({HIDDEN_STATES: rows})

    def open_epoch(self) -> None:
        """Forget the steps."""
        self.steps.clear()
        self.num_epochs += 1

    def close(self) -> None:
        """Note it."""
        self.is_closed = True

    def _embed(self, header: StepHeader) -> Tensor:
        import torch

        ids = torch.tensor(header.token_ids, dtype=torch.float32)
        return ids[:, None].repeat(1, self._hidden_size)


@dataclass(frozen=True, slots=True)
class FakeLoadedSpan:
    """As worker.executor.LoadedSpan."""

    executor: FakeExecutor
    weight_bytes: int
    kv_bytes: int
    compute_dtype: str = "fp32"
    wire_dtype: str = "fp32"
    kv_dtype: str = "fp32"
    streamed_bytes: int = 0
    disk_bytes_per_second: float = 0.0
    is_exact: bool = False


@dataclass
class FakeSpanLoader:
    """Loads fake spans at once; `loaded` keeps each stage's executor."""

    hidden_size: int = 8
    on_execute: OnExecute = do_nothing
    on_load: Callable[[LoadOrder], None] = lambda _order: None  # in the compute thread; may block or raise
    num_begun: int = 0
    loaded: dict[int, FakeExecutor] = field(default_factory=dict)  # by stage

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        """Count ten parameters per block."""
        num_blocks = int(config["n_layer"])
        return ModelSizes(
            blocks=(WeightCount(num_linear=10),) * num_blocks,
            experts=(WeightCount(),) * num_blocks,
            num_experts=0,
            embedding_num_parameters=20,
            head=WeightCount(num_linear=20),
            kv_elements_per_token=(2 * self.hidden_size,) * num_blocks,
            hidden_size=self.hidden_size,
            num_output_elements=self.hidden_size,
        )

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> FakeLoadedSpan:
        """Say that half is loaded, then that all is."""
        self.num_begun += 1
        total = 10 * len(order.span)
        on_progress(LoadProgress("loading", total // 2, total))
        self.on_load(order)
        on_progress(LoadProgress("loading", total, total))
        executor = FakeExecutor(order.stage, len(order.span), hidden_size=self.hidden_size, on_execute=self.on_execute)
        self.loaded[order.stage] = executor
        return FakeLoadedSpan(executor, weight_bytes=4 * total, kv_bytes=order.num_pages * order.page_size)


def _sample(header: StepHeader, rows: Tensor) -> StepResult:
    ends = list(accumulate(header.lengths))
    sampled = [i for i, is_sampled in enumerate(header.is_sampled) if is_sampled]
    return StepResult(
        epoch=header.epoch,
        step_id=header.step_id,
        sequence_ids=tuple(header.sequence_ids[i] for i in sampled),
        token_ids=tuple(int(rows[ends[i] - 1, 0]) for i in sampled),
        logprobs=(None,) * len(sampled),
    )
