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
from itertools import chain, pairwise

from cluster.errors import ConfigurationError
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes
from cluster.placement import Placement, StagePlan, WorkerInfo
from cluster.span import Span
from coordinator.memory import STREAMED_BUFFER_SHARE, Ledger, PlacementOptions, lighter_precisions

__all__ = ["PlacementOptions", "place"]

Cut = Sequence[tuple[WorkerInfo, Span]]
"""The workers in pipeline order, each with its span."""

MIN_CONTEXT = 256  # below which none is chosen on anybody's behalf, or suggested
MIN_STEP_TOKENS = 16  # likewise
FEW_SEQUENCES = 4  # as long as the context: where fewer fit beside all weights, streaming is suggested
PROCESS_NOISE_SHARE = 32  # of what a process takes before it loads anything: by that it may take more the next time

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
    cut, ledger = _first_fit(_by_node(workers), sizes, options)
    if not _fits(cut, ledger):
        raise ConfigurationError(_what_does_not_fit(cut, ledger, _help(workers, sizes, ledger.options)))
    placement = _planned(cut, _for_streaming(cut, ledger, sizes))
    if placement.is_streamed:
        placement = _roomier(placement, cut, ledger, sizes)
    return replace(placement, advice=_advice(placement, workers, sizes, options))


def _first_fit(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> tuple[Cut, Ledger]:
    """Return a cut that fits, with the longest context for which there is one if that may be chosen; without one, what
    was tried last."""
    contexts = [options.max_context]
    if not options.is_context_fixed:
        contexts += _shorter_contexts(options)
    for context in contexts:
        ledger = Ledger(sizes, replace(options, max_context=context), options.step_tokens)
        cut = _cut(workers, len(sizes.blocks), ledger)
        if _fits(cut, ledger):
            break
    return cut, ledger


def _fits(cut: Cut, ledger: Ledger) -> bool:
    return all(ledger.can_serve(worker, span) for worker, span in cut)


def _shorter_contexts(options: PlacementOptions) -> list[int]:
    return [size for size in _halves(options.max_context) if size >= MIN_CONTEXT]


def _shorter_steps(options: PlacementOptions) -> list[int]:
    return [size for size in _halves(options.step_tokens) if size >= MIN_STEP_TOKENS]


def _halves(size: int) -> list[int]:
    return [size >> shift for shift in range(1, size.bit_length())]


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


def _roomier(placement: Placement, cut: Cut, ledger: Ledger, sizes: ModelSizes) -> Placement:
    """Return a streamed placement with room for some sequences where there is one: a stage that is just not streamed
    might have room for a single one, while the others have more than enough."""
    options = replace(ledger.options, min_sequences=min(FEW_SEQUENCES, ledger.options.max_running))
    if placement.num_pages >= options.min_pages:
        return placement
    demanding = Ledger(sizes, options, options.step_tokens)
    roomy = _cut([worker for worker, _ in cut], len(sizes.blocks), demanding)
    return _planned(roomy, _for_streaming(roomy, ledger, sizes)) if _fits(roomy, demanding) else placement


def _for_streaming(cut: Cut, ledger: Ledger, sizes: ModelSizes) -> Ledger:
    """Return what the spans cost where some are streamed: others make as much room for keys and values, and steps are
    larger if nobody said how large."""
    pages = [ledger.max_pages(*stage) for stage in cut if not ledger.is_resident(*stage)]
    if not pages:
        return ledger
    options = ledger.options
    ledger = Ledger(sizes, options, options.step_tokens, min(pages))
    if options.max_step_tokens:
        return ledger
    return Ledger(sizes, options, _streamed_step_tokens(cut, ledger), min(pages))


def _streamed_step_tokens(cut: Cut, ledger: Ledger) -> int:
    """Return how many tokens a step may have where blocks are streamed: a prompt should pass them at once, so up to the
    whole context, as far as that makes no resident stage stream and takes a small share of a streamed one's memory."""
    affordable = (_affordable_tokens(worker, span, ledger) for worker, span in cut)
    return max(ledger.step_tokens, min(ledger.options.max_context, *affordable))


def _affordable_tokens(worker: WorkerInfo, span: Span, ledger: Ledger) -> int:
    budget, buffers = worker.free_memory_bytes, ledger.buffer_bytes(worker, span)
    if ledger.is_resident(worker, span):
        needed = ledger.weight_bytes(span) + ledger.wanted_kv_bytes(worker, span)
        return ledger.affordable_step_tokens(worker, span, max(buffers, budget - needed))
    asked = max(0, ledger.options.kv_memory_bytes - ledger.min_kv_bytes(worker, span))
    slack = max(0, budget - ledger.least_bytes(worker, span) - asked)
    return ledger.affordable_step_tokens(
        worker, span, min(buffers + slack, max(buffers, budget // STREAMED_BUFFER_SHARE))
    )


def _by_node(workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """Keep workers of one node adjacent, so that few hops cross the network; otherwise in the order given."""
    nodes = list(dict.fromkeys(worker.node_name for worker in workers))
    return sorted(workers, key=lambda worker: nodes.index(worker.node_name))


# --- cutting ---------------------------------------------------------------------------------------------------------


def _cut(workers: Sequence[WorkerInfo], num_blocks: int, ledger: Ledger) -> Cut:
    """Cut the blocks into one span per worker: with the least read from disk at the stage that reads most, then with
    bytes in proportion to memory, as far as whole blocks allow. Where no cut fits: the one that lacks least."""
    measure = partial(_reading, ledger)
    most, _ = _cheapest(workers, num_blocks, measure, max)
    if math.isinf(most):
        measure = partial(_strain, ledger)
        most, _ = _cheapest(workers, num_blocks, measure, max)
    _, spans = _cheapest(workers, num_blocks, partial(_bounded_unevenness, ledger, measure, most), _plus)
    return list(zip(workers, spans, strict=True))


def _reading(ledger: Ledger, worker: WorkerInfo, span: Span) -> float:
    return ledger.shortfall_bytes(worker, span) if ledger.can_serve(worker, span) else math.inf


def _strain(ledger: Ledger, worker: WorkerInfo, span: Span) -> float:
    return ledger.least_bytes(worker, span) / max(1, worker.free_memory_bytes)


def _unevenness(ledger: Ledger, worker: WorkerInfo, span: Span) -> float:
    """The sum of bytes²/memory is least where bytes are in proportion to memory."""
    held = ledger.weight_bytes(span) + ledger.min_kv_bytes(worker, span)
    return held**2 / max(1, ledger.room(worker, span))


def _bounded_unevenness(ledger: Ledger, measure: StageCost, most: float, worker: WorkerInfo, span: Span) -> float:
    return _unevenness(ledger, worker, span) if measure(worker, span) <= most else math.inf


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
                (before if math.isinf(before) else combine(before, cost(worker, Span(start, end))), [*borders, end])
                for start, (before, borders) in best.items()
                if start < end
            )
            for end in ends
        }
    least, borders = best[num_blocks]
    return least, [Span(start, end) for start, end in pairwise(borders)]


# --- words -----------------------------------------------------------------------------------------------------------


def _advice(placement: Placement, workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> str:
    """Say what would be better than a placement: a longer context, more sequences, or a precision that needs no
    streaming."""
    advice = []
    if placement.max_context < options.max_context:
        advice.append(
            f"memory allows contexts of {placement.max_context} tokens instead of {options.max_context}: --max-context "
            "asks for another length, --kv-dtype bf16 halves what it takes"
        )
    if placement.is_streamed:
        advice += _precisions_without_streaming(workers, sizes, options)
    elif not options.kv_memory_bytes:
        advice += _more_pages_by_streaming(placement, workers, sizes, options)
    return "; ".join(advice)


def _more_pages_by_streaming(
    placement: Placement, workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions
) -> list[str]:
    options = replace(options, max_context=placement.max_context, is_context_fixed=True)
    num_sequences = placement.num_pages // options.min_pages
    if num_sequences >= min(FEW_SEQUENCES, options.max_running):
        return []
    kv_bytes = max(plan.memory.kv_bytes for plan in placement.stages) // placement.num_pages * options.min_pages
    options = replace(options, kv_memory_bytes=FEW_SEQUENCES * kv_bytes)
    cut, ledger = _first_fit(_by_node(workers), sizes, options)
    more = _planned(cut, _for_streaming(cut, ledger, sizes)).num_pages // options.min_pages
    if more <= num_sequences:
        return []
    return [
        f"memory is left for {num_sequences} sequence(s) of {options.max_context} tokens at once: --kv-memory "
        f"{math.ceil(options.kv_memory_bytes / 2**20)}MiB makes room for {more}, for which weights are read from "
        "disk at every step"
    ]


def _precisions_without_streaming(
    workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions
) -> list[str]:
    for precision in lighter_precisions(options):
        ledger = Ledger(sizes, replace(options, precision=precision), options.step_tokens)
        cut = _cut(_by_node(workers), len(sizes.blocks), ledger)
        if _fits(cut, ledger) and all(ledger.is_resident(*stage) for stage in cut):
            return [f"--precision {precision.value} would fit without streaming"]
    return []


def _help(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> list[str]:
    """Name the settings of which one alone makes the model fit, each with the mildest value tried that does."""
    kv_dtypes = ["bf16"] if options.kv_dtype == "auto" else []
    settings = [
        [(f"--precision {kind.value}", replace(options, precision=kind)) for kind in lighter_precisions(options)],
        [(f"--max-context {size}", replace(options, max_context=size)) for size in _shorter_contexts(options)],
        [(f"--max-step-tokens {size}", replace(options, max_step_tokens=size)) for size in _shorter_steps(options)],
        [(f"--kv-dtype {kind}", replace(options, kv_dtype=kind)) for kind in kv_dtypes],
    ]
    help_ = [[text for text, changed in group if _can_place(workers, sizes, changed)][:1] for group in settings]
    if _can_place([*workers, *workers], sizes, options):
        help_.append(["more workers with as much memory (--workers)"])
    return list(chain.from_iterable(help_))


def _can_place(workers: Sequence[WorkerInfo], sizes: ModelSizes, options: PlacementOptions) -> bool:
    if len(workers) > len(sizes.blocks):
        return False
    measure = partial(_reading, Ledger(sizes, options, options.step_tokens))
    return not math.isinf(_cheapest(_by_node(workers), len(sizes.blocks), measure, max)[0])


def _what_does_not_fit(cut: Cut, ledger: Ledger, help_: Sequence[str]) -> str:
    """Say what every stage needs and has, and what would help."""
    lines = [_needs(stage, worker, span, ledger) for stage, (worker, span) in enumerate(cut)]
    return "\n".join(
        [
            f"the model does not fit with room for one sequence of {ledger.options.max_context} tokens, even with all "
            "that can be read from disk at every step being read:",
            *lines,
            f"what would help: {'; or '.join([*_larger_sizes(cut, ledger), *help_])}",
        ]
    )


def _larger_sizes(cut: Cut, ledger: Ledger) -> list[str]:
    """Name the sizes that are too small for the cut, each with what the stage that needs most needs."""
    least: dict[str, int] = {}
    for worker, span in cut:
        is_cpu = worker.device == "cpu"
        kv_limit = ledger.options.kv_memory_bytes
        sizes = [
            ("--memory" if is_cpu else "--gpu-memory", ledger.least_bytes(worker, span), worker.free_memory_bytes),
            ("--memory", ledger.host_bytes(worker, span), worker.free_host_bytes),
            ("--kv-memory", ledger.min_kv_bytes(worker, span) if kv_limit else 0, kv_limit),
        ]
        for flag, needed, given in sizes:
            if needed > given:
                if flag == "--memory":  # which counts the whole process, and that differs from start to start
                    needed += worker.process_bytes + worker.process_bytes // PROCESS_NOISE_SHARE
                least[flag] = max(least.get(flag, 0), needed)
    return [f"{flag} {math.ceil(size / 2**20)}MiB" for flag, size in least.items()]


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
