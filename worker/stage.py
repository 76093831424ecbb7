"""A loaded span: the Executor that computes with torch.

Covers one step from what the stage before sent to what the next one gets, or to sampled tokens. What a block computes
is `worker.blocks`' and `worker.architectures`' business; moving the payload is the relay's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from cluster.errors import ConfigurationError, InvariantError, StorageError
from cluster.microbatch import StepHeader, StepResult, WeightTraffic
from cluster.span import Span
from worker.architectures import Architecture
from worker.blocks import StepContext
from worker.executor import StageOutput
from worker.kv_cache import KVCache
from worker.part_weights import RowTable
from worker.sampling import Sampler
from worker.stream.disk_weights import DiskWeights

HIDDEN_STATES = "hidden_states"
"""Name of the tensor that travels between stages, `[num_tokens, hidden_size]`."""


@dataclass(frozen=True, slots=True)
class StageNumerics:
    """In what a stage stores, computes and sends."""

    stored: torch.dtype  # weights have its values everywhere, also where they are held in `compute`
    compute: torch.dtype
    wire: torch.dtype
    device: torch.device
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Entrance:
    """How stage 0 turns token ids into hidden states."""

    table: RowTable  # [vocab_size, hidden_size] on the disk: only rows that are looked up are read
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Exit:
    """How the last stage turns hidden states into tokens."""

    norm: nn.Module
    head: nn.Module
    sampler: Sampler

    def logits(self, rows: Tensor) -> Tensor:
        """Map hidden states `[num_rows, hidden_size]` to logits `[num_rows, vocab_size]`."""
        logits: Tensor = self.head(self.norm(rows))
        return logits


class Stage:
    """The Executor of one span. Not thread-safe: one compute thread calls it."""

    def __init__(
        self,
        *,
        stage: int,
        span: Span,
        max_context: int,
        architecture: Architecture,
        blocks: Sequence[nn.Module],
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache,
        numerics: StageNumerics,
        entrance: Entrance | None,
        exit_: Exit | None,
        resident_bytes: int = 0,
        disk_weights: DiskWeights | None = None,
    ) -> None:
        """`entrance` is given to the first stage and `exit_` to the last; a model of one stage has both.

        `resident_bytes` are those of weights that stay in memory; `disk_weights` brings the others, if there are any.
        """
        self._stage, self._span, self._max_context, self._architecture = stage, span, max_context, architecture
        self._blocks, self._rotary, self._cache, self._numerics = list(blocks), rotary, cache, numerics
        self._entrance, self._exit = entrance, exit_
        self._resident_bytes, self._disk_weights = resident_bytes, disk_weights

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @torch.inference_mode()
    def execute(
        self, header: StepHeader, tensors: Mapping[str, Tensor], on_block: Callable[[int], None]
    ) -> StageOutput:
        """See Executor. Rows of all slices are packed: hidden states are `[1, num_tokens, hidden_size]`, unpadded."""
        self._check_positions(header)
        self._cache.apply(header)
        if self._exit:
            self._exit.sampler.apply(header)
        if self._disk_weights is None:
            output = self._compute(header, tensors, on_block)
            return replace(output, traffic=WeightTraffic(resident_bytes=self._resident_bytes))
        self._disk_weights.begin_pass(self._cache, self._place)
        try:
            with _no_collection():
                output = self._compute_from_disk(self._disk_weights, header, tensors, on_block)
        finally:
            traffic = self._disk_weights.end_pass(self._resident_bytes)
        return replace(output, traffic=traffic)

    def open_epoch(self) -> None:
        self._cache.clear()
        if self._exit:
            self._exit.sampler.clear()

    def close(self) -> None:
        """See Executor."""
        if self._disk_weights is not None:
            self._disk_weights.close()

    def _compute(
        self, header: StepHeader, tensors: Mapping[str, Tensor], on_block: Callable[[int], None]
    ) -> StageOutput:
        positions = _positions(header, self._numerics.device)
        hidden = self._enter(header, tensors, positions)
        step = self._step_context(header, positions)
        for blocks_done, block in enumerate(self._blocks, start=1):
            hidden = self._architecture.run_block(block, hidden, step)
            on_block(blocks_done)
        return self._leave(header, hidden[0])

    def _compute_from_disk(
        self,
        disk_weights: DiskWeights,
        header: StepHeader,
        tensors: Mapping[str, Tensor],
        on_block: Callable[[int], None],
    ) -> StageOutput:
        """Compute, once more if damaged weights could be made again: writing a position twice is harmless."""
        try:
            return self._compute(header, tensors, on_block)
        except StorageError as error:
            disk_weights.repair(error)
            return self._compute(header, tensors, on_block)

    def _place(self, index: int, module: nn.Module) -> None:
        """Replace a block, or the head, by one whose weights are held elsewhere."""
        if index < len(self._blocks):
            self._blocks[index] = module
        elif self._exit:
            self._exit = replace(self._exit, head=module)

    def _check_positions(self, header: StepHeader) -> None:
        """Raise before a rotary angle or a learned row that is not there is looked up, which a GPU does not survive."""
        for sequence_id, start, length in zip(header.sequence_ids, header.start_positions, header.lengths, strict=True):
            if start + length > self._max_context:
                raise InvariantError(
                    f"sequence {sequence_id} reaches position {start + length}, but stage {self._stage} was loaded for "
                    f"contexts of {self._max_context} tokens: coordinator and stage disagree; please report"
                )

    def _enter(self, header: StepHeader, tensors: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        numerics = self._numerics
        if self._entrance is None:
            return tensors[HIDDEN_STATES].to(numerics.device, numerics.compute).unsqueeze(0)
        rows = self._entrance.table[torch.tensor(header.token_ids)]
        rows = rows.to(numerics.stored).to(numerics.device, numerics.compute)
        hidden: Tensor = self._entrance.module(rows, positions)
        return hidden.unsqueeze(0)

    def _step_context(self, header: StepHeader, positions: Tensor) -> StepContext:
        rotary = None
        if self._rotary is not None:
            cos, sin = self._rotary
            rotary = (cos[positions].unsqueeze(0), sin[positions].unsqueeze(0))
        layout = self._cache.layout(header)
        return StepContext(self._cache, layout, self._span.start, rotary, self._numerics.is_exact)

    def _leave(self, header: StepHeader, hidden: Tensor) -> StageOutput:
        if self._exit:
            rows = hidden[torch.tensor(_asked_rows(header), dtype=torch.int64, device=hidden.device)]
            return StageOutput(result=self._exit.sampler.sample(header, self._exit.logits, rows))
        if header.last_stage == self._stage:  # a replay that needs no later stage
            return StageOutput(result=StepResult(header.epoch, header.step_id, (), (), ()))
        return StageOutput({HIDDEN_STATES: self._to_wire(hidden)})

    def _to_wire(self, hidden: Tensor) -> Tensor:
        sent = hidden.to("cpu", self._numerics.wire)
        if sent.dtype is torch.float16 and not bool(sent.isfinite().all()):
            setting = "--compute-dtype" if self._numerics.compute is torch.float16 else "--wire-dtype"
            raise ConfigurationError(
                f"the hidden states that stage {self._stage} (blocks {self._span}) sends do not fit fp16: "
                f"serve with {setting} bf16 or fp32"
            )
        return sent


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage: a pass makes few objects, and the readers would wait meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _positions(header: StepHeader, device: torch.device) -> Tensor:
    """Return the position of each token of a step `[num_tokens]`."""
    slices = zip(header.start_positions, header.lengths, strict=True)
    return torch.tensor([p for start, length in slices for p in range(start, start + length)], device=device)


def _asked_rows(header: StepHeader) -> list[int]:
    """Return the rows whose logits the step asks for: the last `logits_rows[i]` of each slice, in order."""
    stops = accumulate(header.lengths)
    return [row for stop, asked in zip(stops, header.logits_rows, strict=True) for row in range(stop - asked, stop)]
