"""Which worker serves which span: whatever fits, with as little read from disk as possible, in proportion to memory.

`place` is the whole interface, so that a placement by measured speed can take its place. Memory is a budget: what a
stage needs fits into what its worker may use, or ConfigurationError says what does not and what would help. The
embedding costs nothing (its rows are read from a memory map); the last stage is charged the head.

Covers the order of workers, their spans, how large a step may be, and how many KV pages there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from cluster.errors import ConfigurationError
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes
from cluster.placement import Placement, StagePlan, WorkerInfo
from cluster.span import Span
from coordinator.memory import STREAMED_BUFFER_SHARE, Ledger, PlacementOptions, lighter_precisions

__all__ = ["PlacementOptions", "place"]

Cut = Sequence[tuple[WorkerInfo, Span]]
"""The workers in pipeline order, each with its span."""

MIN_CONTEXT = 256  # below which none is chosen on anybody's behalf

StageCost = Callable[[WorkerInfo, Span], float]


def place(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> Placement:
    """Decide spans, steps and pages. Raises ConfigurationError, with every stage's numbers, when something does not
    fit."""
    num_blocks = len(sizes.blocks)
    if not 0 < len(workers) <= num_blocks:
        raise ConfigurationError(
            f"{len(workers)} workers cannot share {num_blocks} blocks, each needs at least one; "
            f"use --workers with a number from 1 to {num_blocks}"
        )
    cut, ledger = _fitting(_by_node(workers), sizes, options)
    if not all(ledger.is_resident(worker, span) for worker, span in cut):
        ledger = Ledger(sizes, ledger.options, _streamed_step_tokens(cut, ledger))
    placement = _planned(cut, ledger)
    return replace(placement, advice=_advice(placement, workers, sizes, options))


def _fitting(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> tuple[Cut, Ledger]:
    """Return a cut that fits, with the longest context for which there is one if that may be chosen."""
    contexts = [options.max_context]
    while not options.is_context_fixed and contexts[-1] >= 2 * MIN_CONTEXT:
        contexts.append(contexts[-1] // 2)
    refusal = ""
    for context in contexts:
        ledger = Ledger(sizes, replace(options, max_context=context), options.max_step_tokens)
        cut = _cut(workers, len(sizes.blocks), ledger)
        if all(ledger.can_serve(worker, span) for worker, span in cut):
            return cut, ledger
        refusal = refusal or _what_does_not_fit(cut, ledger, _lighter_help(workers, sizes, options))
    raise ConfigurationError(refusal)


def _planned(cut: Cut, ledger: Ledger) -> Placement:
    options = ledger.options
    num_pages = min(ledger.max_pages(worker, span) for worker, span in cut)
    stages = tuple(
        StagePlan(stage, worker, span, options.precision, ledger.plan(worker, span, num_pages))
        for stage, (worker, span) in enumerate(cut)
    )
    return Placement(
        epoch=Epoch(options.generation, 1),
        stages=stages,
        num_pages=num_pages,
        page_size=options.page_size,
        max_context=options.max_context,
        max_step_tokens=ledger.step_tokens,
    )


def _streamed_step_tokens(cut: Cut, ledger: Ledger) -> int:
    """Return how many tokens a step may have where blocks are streamed: a prompt should pass them at once, so up to the
    whole context, as far as that makes no resident stage stream and takes a small share of a streamed one's memory."""
    affordable = (_affordable_tokens(worker, span, ledger) for worker, span in cut)
    return max(ledger.step_tokens, min(ledger.options.max_context, *affordable))


def _affordable_tokens(worker: WorkerInfo, span: Span, ledger: Ledger) -> int:
    budget, buffers = worker.free_memory_bytes, ledger.buffer_bytes(worker, span)
    if ledger.is_resident(worker, span):
        needed = ledger.weight_bytes(span) + ledger.min_kv_bytes(worker, span)
        return ledger.affordable_step_tokens(worker, span, budget - needed)
    slack = budget - ledger.least_bytes(worker, span)
    return ledger.affordable_step_tokens(
        worker, span, min(buffers + slack, max(buffers, budget // STREAMED_BUFFER_SHARE))
    )


def _by_node(workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """Keep workers of one node adjacent, so that few hops cross the network; otherwise in the order given."""
    nodes = list(dict.fromkeys(worker.node_name for worker in workers))
    return sorted(workers, key=lambda worker: nodes.index(worker.node_name))


# --- cutting ---------------------------------------------------------------------------------------------------------


def _cut(workers: Sequence[WorkerInfo], num_blocks: int, ledger: Ledger) -> Cut:
    """Cut the blocks into one span per worker: a cut that fits before any that does not, then with the least read from
    disk at the stage that reads most, then with bytes in proportion to memory, as far as whole blocks allow."""
    most, spans = _cheapest(workers, num_blocks, partial(_reading, ledger), max)
    cost = partial(_unevenness, ledger)
    if not math.isinf(most):
        cost = partial(_bounded_unevenness, ledger, most)
    _, spans = _cheapest(workers, num_blocks, cost, _plus)
    return list(zip(workers, spans, strict=True))


def _reading(ledger: Ledger, worker: WorkerInfo, span: Span) -> float:
    return ledger.shortfall_bytes(worker, span) if ledger.can_serve(worker, span) else math.inf


def _unevenness(ledger: Ledger, worker: WorkerInfo, span: Span) -> float:
    """The sum of bytes²/memory is least where bytes are in proportion to memory."""
    held = ledger.weight_bytes(span) + ledger.min_kv_bytes(worker, span)
    return held**2 / max(1, ledger.room(worker, span))


def _bounded_unevenness(ledger: Ledger, most: float, worker: WorkerInfo, span: Span) -> float:
    return _unevenness(ledger, worker, span) if _reading(ledger, worker, span) <= most else math.inf


def _plus(left: float, right: float) -> float:
    return left + right


def _cheapest(
    workers: Sequence[WorkerInfo], num_blocks: int, cost: StageCost, combine: Callable[[float, float], float]
) -> tuple[float, list[Span]]:
    """Return the least combined cost of a cut, and the spans.

    Exact dynamic programming: `best[end]` is the cheapest way for the workers so far to serve blocks [0, end), as its
    cost and its borders.
    """
    best: Mapping[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for index, worker in enumerate(workers):
        num_left = len(workers) - index - 1
        ends = range(index + 1, num_blocks - num_left + 1) if num_left else [num_blocks]
        best = {
            end: min(
                (combine(before, cost(worker, Span(start, end))), [*borders, end])
                for start, (before, borders) in best.items()
                if start < end
            )
            for end in ends
        }
    least, borders = best[num_blocks]
    return least, [Span(start, end) for start, end in pairwise(borders)]


# --- words -----------------------------------------------------------------------------------------------------------


def _advice(placement: Placement, workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> str:
    """Say what would be better than a placement: a longer context, or a precision that needs no streaming."""
    advice = []
    if placement.max_context < options.max_context:
        advice.append(
            f"memory allows contexts of {placement.max_context} tokens instead of {options.max_context}: --max-context "
            "asks for another length, --kv-dtype bf16 halves what it takes"
        )
    if placement.is_streamed:
        advice += _precisions_without_streaming(workers, sizes, options)
    return "; ".join(advice)


def _precisions_without_streaming(
    workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions
) -> list[str]:
    for precision in lighter_precisions(options):
        ledger = Ledger(sizes, replace(options, precision=precision), options.max_step_tokens)
        cut = _cut(_by_node(workers), len(sizes.blocks), ledger)
        if all(ledger.can_serve(*stage) and ledger.is_resident(*stage) for stage in cut):
            return [f"--precision {precision.value} would fit without streaming"]
    return []


def _lighter_help(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> list[str]:
    """Name the most accurate precision that fits, if another one does."""
    for precision in lighter_precisions(options):
        ledger = Ledger(sizes, replace(options, precision=precision), options.max_step_tokens)
        cut = _cut(_by_node(workers), len(sizes.blocks), ledger)
        if all(ledger.can_serve(*stage) for stage in cut):
            return [f"smaller weights (--precision {precision.value} would fit)"]
    return []


def _what_does_not_fit(cut: Cut, ledger: Ledger, help_: Sequence[str]) -> str:
    """Say what every stage needs and has, and what would help."""
    options = ledger.options
    lines = [_needs(stage, worker, span, ledger) for stage, (worker, span) in enumerate(cut)]
    helps = [
        *help_,
        "more or larger workers (--workers, --memory)",
        f"a context below {options.max_context} (--max-context)",
        f"steps of fewer than {ledger.step_tokens} tokens (--max-step-tokens)",
    ]
    if options.kv_dtype == "auto" and any(worker.device == "cpu" for worker, _ in cut):
        helps.append("keys and values in 16 bits (--kv-dtype bf16)")
    if options.kv_memory_bytes:
        helps.append(f"more than {_size(options.kv_memory_bytes)} of KV per stage (--kv-memory)")
    return "\n".join(
        [
            f"the model does not fit with room for one sequence of {options.max_context} tokens, even with all that "
            "can be read from disk at every step being read:",
            *lines,
            f"what would help: {', '.join(helps)}",
        ]
    )


def _needs(stage: int, worker: WorkerInfo, span: Span, ledger: Ledger) -> str:
    weights, kv, buffers = (
        ledger.weight_bytes(span),
        ledger.min_kv_bytes(worker, span),
        ledger.buffer_bytes(worker, span),
    )
    taken = f" beside the {_size(worker.process_bytes)} that its process takes" if worker.process_bytes else ""
    host = ""
    if worker.device != "cpu":
        host_bytes = _size(ledger.host_bytes(worker, span))
        host = f"; {host_bytes} of the machine's own memory, which may use {_size(worker.free_host_bytes)}"
    return (
        f"  stage {stage} on {worker.node_name}, blocks {span}: weights {_size(weights)} + KV {_size(kv)} + buffers "
        f"{_size(buffers)}, with streaming at least {_size(ledger.least_bytes(worker, span))} in all, may use "
        f"{_size(worker.free_memory_bytes)}{taken}{host}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"
