"""Which worker serves which span: in proportion to the workers' free memory.

`place` is the whole interface, so that a placement by measured speed can take its place. Memory is a budget: weights,
KV pages and working buffers of a stage fit into what its worker may use, or ConfigurationError says what does not and
what would help. The embedding costs nothing (its rows are read from a memory map); the last stage is charged the head.

Covers the order of workers, their spans, and how many KV pages there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from cluster.errors import ConfigurationError
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes, Precision
from cluster.placement import Placement, StagePlan, WorkerInfo
from cluster.span import Span
from coordinator.pages import num_pages_for

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What model and settings say about memory."""

    precision: Precision
    kv_dtype: str  # "auto", "fp32", "bf16" or "fp16"
    page_size: int
    max_context: int
    max_running: int
    kv_memory_bytes: int  # per stage; 0: what is left, at most what max_running x max_context needs
    generation: int
    max_step_tokens: int = 512

    @property
    def min_pages(self) -> int:
        """Pages of one sequence as long as the context."""
        return num_pages_for(self.max_context, self.page_size)


def place(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> Placement:
    """Decide spans and pages. Raises ConfigurationError, with every stage's numbers, when something does not fit."""
    num_blocks = len(sizes.blocks)
    if not 0 < len(workers) <= num_blocks:
        raise ConfigurationError(
            f"{len(workers)} workers cannot share {num_blocks} blocks, each needs at least one; "
            f"use --workers with a number from 1 to {num_blocks}"
        )
    ledger = _Ledger(sizes, options)
    ordered = _by_node(workers)
    spans = _cut(ordered, num_blocks, ledger)
    num_pages = min(ledger.max_pages(worker, span) for worker, span in zip(ordered, spans, strict=True))
    if num_pages < options.min_pages:
        raise ConfigurationError(_what_does_not_fit(ordered, spans, ledger))
    stages = tuple(
        StagePlan(
            stage,
            worker,
            span,
            options.precision,
            weight_bytes=ledger.weight_bytes(span),
            kv_bytes=num_pages * ledger.page_bytes(worker, span),
        )
        for stage, (worker, span) in enumerate(zip(ordered, spans, strict=True))
    )
    return Placement(Epoch(options.generation, 1), stages, num_pages, options.page_size, options.max_context)


class _Ledger:
    """What a span costs a worker, in bytes."""

    def __init__(self, sizes: ModelSizes, options: PlacementOptions) -> None:
        self.options = options
        self._weights = [0, *accumulate(count.resident_bytes(options.precision) for count in sizes.blocks)]
        self._kv_elements = [0, *accumulate(sizes.kv_elements_per_token)]
        self._head = sizes.head.resident_bytes(options.precision)
        self.buffer_bytes = options.max_step_tokens * sizes.num_output_elements * 4

    def weight_bytes(self, span: Span) -> int:
        """Return the bytes of the span's weights, and of the head for the last stage."""
        num_bytes = self._weights[span.end] - self._weights[span.start]
        return num_bytes + self._head if span.end == len(self._weights) - 1 else num_bytes

    def page_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes of one page over the blocks of the span."""
        elements = self._kv_elements[span.end] - self._kv_elements[span.start]
        return elements * self.options.page_size * self._kv_element_bytes(worker)

    def min_kv_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes of one sequence as long as the context."""
        return self.options.min_pages * self.page_bytes(worker, span)

    def max_pages(self, worker: WorkerInfo, span: Span) -> int:
        """Return how many pages fit beside the span's weights, of those that can be of use."""
        left = worker.free_memory_bytes - self.weight_bytes(span) - self.buffer_bytes
        if self.options.kv_memory_bytes:
            left = min(left, self.options.kv_memory_bytes)
        page_bytes = max(1, self.page_bytes(worker, span))
        return min(self.options.max_running * self.options.min_pages, left // page_bytes)

    def cost(self, worker: WorkerInfo, span: Span) -> _Cost:
        """Return what giving the span to the worker adds to a cut's cost."""
        is_misfit = self.max_pages(worker, span) < self.options.min_pages
        needed = self.weight_bytes(span) + self.buffer_bytes + self.min_kv_bytes(worker, span)
        return _Cost(is_misfit, needed**2 / max(1, worker.free_memory_bytes))

    def _kv_element_bytes(self, worker: WorkerInfo) -> int:
        """Return the size of a key's or value's element. "auto" is the compute dtype: fp32 on a CPU, where a CPU that
        computes in bf16 will use less than it is charged; on a GPU that of the weights."""
        if self.options.kv_dtype != "auto":
            return _DTYPE_BYTES[self.options.kv_dtype]
        return 4 if worker.device == "cpu" else _DTYPE_BYTES.get(self.options.precision.value, 4)


def _by_node(workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """Keep workers of one node adjacent, so that few hops cross the network; otherwise in the order given."""
    nodes = list(dict.fromkeys(worker.node_name for worker in workers))
    return sorted(workers, key=lambda worker: nodes.index(worker.node_name))


@dataclass(frozen=True, slots=True, order=True)
class _Cost:
    """What a cut costs: first whether a stage does not fit, then how far bytes are from proportional."""

    is_misfit: bool
    unevenness: float

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(self.is_misfit or other.is_misfit, self.unevenness + other.unevenness)


def _cut(workers: Sequence[WorkerInfo], num_blocks: int, ledger: _Ledger) -> list[Span]:
    """Cut the blocks into one span per worker so that bytes are in proportion to free memory, as far as whole blocks
    allow: that is where the sum of bytes²/memory is least. A cut that fits goes before any that does not.

    Exact dynamic programming: `best[end]` is the cheapest way for the workers so far to serve blocks [0, end), as its
    cost and its borders.
    """
    best = {0: (_Cost(False, 0.0), [0])}
    for index, worker in enumerate(workers):
        num_left = len(workers) - index - 1
        ends = range(index + 1, num_blocks - num_left + 1) if num_left else [num_blocks]
        best = {end: _extend(best, end, worker, ledger) for end in ends}
    return [Span(start, end) for start, end in pairwise(best[num_blocks][1])]


def _extend(
    best: Mapping[int, tuple[_Cost, list[int]]], end: int, worker: WorkerInfo, ledger: _Ledger
) -> tuple[_Cost, list[int]]:
    """Return the cheapest way to go on to `end` with a span of this worker."""
    ways = [
        (cost + ledger.cost(worker, Span(start, end)), [*borders, end])
        for start, (cost, borders) in best.items()
        if start < end
    ]
    return min(ways)


def _what_does_not_fit(workers: Sequence[WorkerInfo], spans: Sequence[Span], ledger: _Ledger) -> str:
    """Say what every stage needs and has, and what would help."""
    options = ledger.options
    lines = [
        f"  stage {stage} on {worker.node_name}, blocks {span}: weights {_size(ledger.weight_bytes(span))} + KV "
        f"{_size(ledger.min_kv_bytes(worker, span))} + buffers {_size(ledger.buffer_bytes)}, may use "
        f"{_size(worker.free_memory_bytes)}"
        for stage, (worker, span) in enumerate(zip(workers, spans, strict=True))
    ]
    helps = ["more or larger workers (--workers, --memory)", f"a context below {options.max_context} (--max-context)"]
    if options.precision is Precision.FP32:
        helps.insert(0, "half the weights (--precision bf16)")
    if options.kv_memory_bytes:
        helps.append(f"more than {_size(options.kv_memory_bytes)} of KV per stage (--kv-memory)")
    return "\n".join(
        [
            f"the model does not fit with room for one sequence of {options.max_context} tokens:",
            *lines,
            f"what would help: {', '.join(helps)}",
        ]
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"
