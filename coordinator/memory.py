"""What a span takes of a worker's memory, in bytes, before anything is loaded.

A stage holds weights, keys and values, a ring of buffers where weights are read from disk at every pass, and working
buffers. Weights that can be streamed and keys and values share one account, between which the worker shifts: where
blocks are streamed, there are as many pages as would fit were all of them streamed. Of a model of experts, experts
that do not fit are read on demand and cached; everything else stays. A GPU's ring and cache lie in the machine's own
memory, and what is used of them is copied.

Covers arithmetic on counts; `coordinator.placement` chooses spans by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cluster.load_order import GPU_SLOTS, SLICE_BYTES
from cluster.model_spec import ModelSizes, Precision
from cluster.placement import MemoryPlan, WorkerInfo
from cluster.span import Span, streaming_order
from coordinator.pages import num_pages_for

STEP_TOKENS = 512  # of the largest step, where nobody says how many
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

MIN_RING_SLOTS, MAX_RING_SLOTS = 3, 8  # one being read, one being used, one between; more smooth a disk's pauses
RING_SHARE = 32  # of the budget, beyond MIN_RING_SLOTS: what the ring takes, every pass has to read
STREAMED_BUFFER_SHARE = 8  # of the budget: for the activations of a prompt that passes streamed blocks in one step
CACHE_SHARE = 4  # of what is left goes to keys and values where it is not the worker that shifts
MIN_EXPERTS = GPU_SLOTS  # in the cache: one computed with, one being read
PADDING_BYTES = 1 << 18  # of a small slice, whose tensors are aligned

SCORE_BYTES = 3 * (4 << 20)  # attention bounds its tiles of scores: these, their mask, their exponentials
LOGITS_BYTES = 32 << 20  # of the head's output at a time
LOGITS_COPIES = 8  # that sampling takes up to, for a moment
LOGITS_TILE = 16  # rows that the head computes at least
WEIGHT_COPIES = 2  # of a weight that is read from a checkpoint: as stored, and as it is multiplied
PIECE_COPIES = 3  # of what is read at once: as stored, joined with others, and as it is multiplied
OUTLIER_FACTOR = 2  # int8 computes two more rows for every row with outliers, for the layers that share an input
PAYLOAD_COPIES = 4  # of hidden states: received, being received, being sent, and as bytes
PROCESS_BYTES = 64 << 20  # of connections, threads and what allocators keep


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What model and settings say about memory."""

    precision: Precision
    kv_dtype: str  # "auto", "fp32", "bf16" or "fp16"
    page_size: int
    max_context: int
    max_running: int
    kv_memory_bytes: int  # per stage, before weights; 0: what is left; at most what max_running x max_context needs
    generation: int
    max_step_tokens: int = 0  # 0: STEP_TOKENS, or more where blocks are streamed
    compute_dtype: str = "auto"  # likewise
    is_precision_fixed: bool = False  # the checkpoint comes in this one
    is_context_fixed: bool = True  # asked for; otherwise a shorter one is served where memory is short
    min_sequences: int = 1  # as long as the context, that there must be room for

    @property
    def step_tokens(self) -> int:
        """Tokens that the largest step must be able to have."""
        return self.max_step_tokens or STEP_TOKENS

    @property
    def min_pages(self) -> int:
        """Pages that there must be."""
        return self.min_sequences * num_pages_for(self.max_context, self.page_size)


class Ledger:
    """What the spans of one model cost. `step_tokens` is that of the largest step; for `wanted_pages`, weights are
    streamed where that costs nothing until the pages are used."""

    def __init__(self, sizes: ModelSizes, options: PlacementOptions, step_tokens: int, wanted_pages: int = 0) -> None:
        self.options, self.step_tokens, self._wanted_pages = options, step_tokens, wanted_pages
        self._sizes = sizes
        precision = options.precision
        self._large = [count.large_bytes(precision) for count in sizes.blocks]
        self._head_bytes = sizes.head.large_bytes(precision.of_head)
        self._large_sums = [0, *accumulate(self._large)]
        self._small_sums = [0, *accumulate(count.small_bytes(precision) for count in sizes.blocks)]
        self._expert_sums = [0, *accumulate(count.large_bytes(precision) for count in sizes.experts)]
        self._kv_sums = [0, *accumulate(sizes.kv_elements_per_token)]

    # --- what a span consists of -------------------------------------------------------------------------------------

    def is_last(self, span: Span) -> bool:
        return span.end == len(self._large)

    def large_bytes(self, span: Span) -> int:
        """Return the bytes of the span's linear layers, the head's for the last stage."""
        head = self._head_bytes if self.is_last(span) else 0
        return self._large_sums[span.end] - self._large_sums[span.start] + head

    def small_bytes(self, span: Span) -> int:
        """Return the bytes that stay in memory whatever is streamed: norms, biases, scales, tables of positions."""
        num_bytes = self._small_sums[span.end] - self._small_sums[span.start]
        if span.start == 0:  # what follows the embedding; its rows are read from a memory map
            num_bytes += 4 * max(
                0, self._sizes.embedding_num_parameters - self._sizes.head.num_linear - self._sizes.head.num_kept
            )
        if self.is_last(span):
            num_bytes += self._sizes.head.small_bytes(self.options.precision.of_head)
        return num_bytes + 4 * self.options.max_context * self._sizes.rotary_elements_per_token

    def weight_bytes(self, span: Span) -> int:
        """Return the bytes of all of the span's weights."""
        return self.large_bytes(span) + self.small_bytes(span)

    def expert_bytes(self, span: Span) -> int:
        """Return the bytes of the span's experts."""
        return self._expert_sums[span.end] - self._expert_sums[span.start]

    # --- what else it needs ------------------------------------------------------------------------------------------

    def page_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes of one page over the blocks of the span."""
        elements = self._kv_sums[span.end] - self._kv_sums[span.start]
        return elements * self.options.page_size * self._kv_element_bytes(worker)

    def min_kv_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes of the pages that there must be."""
        return self.options.min_pages * self.page_bytes(worker, span)

    def wanted_kv_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes of keys and values for which weights are streamed: what was asked for, or those of the pages
        that other stages have, as far as they can be of use."""
        least, wanted = self.min_kv_bytes(worker, span), self.options.kv_memory_bytes
        if not wanted and self._can_shift(worker):
            wanted = self._wanted_pages * self.page_bytes(worker, span)
        return max(least, min(wanted, self.options.max_running * least))

    def buffer_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the most that computing a step takes for a moment, or loading: the two never coincide."""
        return self._buffer_bytes(worker, span, is_resident=self.is_resident(worker, span))

    def affordable_step_tokens(self, worker: WorkerInfo, span: Span, buffer_bytes: int) -> int:
        """Return how many tokens a step may have for its buffers to stay within `buffer_bytes`."""
        fixed = self._score_bytes() + self._logits_bytes(span) + self._decoded_bytes(worker, span)
        rest = buffer_bytes - PROCESS_BYTES - fixed
        return max(0, rest // self._bytes_per_token())

    def ring_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the size of the ring of a stage that streams, in the machine's own memory. Experts need none."""
        if self._has_experts:
            return 0
        slot, share = self._slot_bytes(span), _host_bytes(worker) // RING_SHARE
        if worker.device == "cpu":  # of the rest alone: a larger budget must not make a larger ring that does not fit
            share = min(share, MIN_RING_SLOTS * slot + worker.free_memory_bytes - self._streamed_bytes(worker, span))
        return slot * min(MAX_RING_SLOTS, max(MIN_RING_SLOTS, share // slot))

    def host_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return what a worker with a GPU takes of the machine's own memory; 0 for others, whose budget that is."""
        if worker.device == "cpu":
            return 0
        passing = 0
        if not self.is_resident(worker, span):
            passing = MIN_EXPERTS * self._expert_slot_bytes() if self._has_experts else self.ring_bytes(worker, span)
        return PROCESS_BYTES + max(passing, PIECE_COPIES * self._slot_bytes(span))

    # --- what follows for a worker -----------------------------------------------------------------------------------

    def room(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes for weights, keys, values and ring."""
        return worker.free_memory_bytes - self.buffer_bytes(worker, span)

    def is_resident(self, worker: WorkerInfo, span: Span) -> bool:
        """Tell whether nothing is read from disk: all weights fit, and beside them the keys and values that are wanted,
        or as many as with all of them being read."""
        left = self._left_resident(worker, span)
        if left < self.min_kv_bytes(worker, span):
            return False
        return left >= self.wanted_kv_bytes(worker, span) or left >= self._left_streamed(worker, span)

    def least_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the least memory that the span needs: with all that can be streamed being streamed, or with nothing
        if that is less."""
        least = min(self._resident_bytes(worker, span), self._streamed_bytes(worker, span))
        return max(least, self._conversion_bytes(span))

    def can_serve(self, worker: WorkerInfo, span: Span) -> bool:
        """Tell whether the span fits, streamed as far as it must be, with one sequence as long as the context."""
        limit = self.options.kv_memory_bytes
        has_host = self.host_bytes(worker, span) <= worker.free_host_bytes
        has_pages = not limit or self.min_kv_bytes(worker, span) <= limit
        return has_pages and self.least_bytes(worker, span) <= worker.free_memory_bytes and has_host

    def shortfall_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return how much a pass reads at least, as if blocks could be divided."""
        if self.is_resident(worker, span):
            return 0
        needed = self.weight_bytes(span) + self.wanted_kv_bytes(worker, span) + self._ring_share(worker, span)
        return needed - self.room(worker, span)

    def max_pages(self, worker: WorkerInfo, span: Span) -> int:
        """Return how many pages fit beside the weights that stay, of those that can be of use."""
        if self.is_resident(worker, span):
            left = self._left_resident(worker, span)
        else:
            left = self._left_streamed(worker, span)
            if self._has_experts == (worker.device == "cpu"):  # a cache, or blocks that stay, get the rest
                left = max(min(left, self.wanted_kv_bytes(worker, span)), left // CACHE_SHARE)
        if self.options.kv_memory_bytes:
            left = min(left, self.options.kv_memory_bytes)
        page_bytes = max(1, self.page_bytes(worker, span))
        return min(self.options.max_running * self.options.min_pages, left // page_bytes)

    def plan(self, worker: WorkerInfo, span: Span, num_pages: int) -> MemoryPlan:
        """Return how the worker's memory is divided when it serves the span with so many pages."""
        kv_bytes = num_pages * self.page_bytes(worker, span)
        small, large = self.small_bytes(span), self.large_bytes(span)
        room = self.room(worker, span) - small
        ring = num_streamed = streamed = cache = 0
        if self.is_resident(worker, span):
            shared = large + kv_bytes
        elif self._has_experts:
            streamed = self.expert_bytes(span)
            shared = large - streamed + kv_bytes
            cache = room - shared if worker.device == "cpu" else self._host_cache_bytes(worker, span)
        else:
            ring = self.ring_bytes(worker, span)
            shared = room - self._ring_share(worker, span)
            held = self.min_kv_bytes(worker, span) if self._can_shift(worker) else kv_bytes
            num_streamed, streamed = self._least_streamed(span, large + held - shared)
        return MemoryPlan(
            budget_bytes=worker.free_memory_bytes,
            weight_bytes=small + large - streamed,
            small_bytes=small,
            streamed_bytes=streamed,
            num_streamed=num_streamed,
            kv_bytes=kv_bytes,
            shared_bytes=shared,
            ring_bytes=ring,
            buffer_bytes=self.buffer_bytes(worker, span),
            expert_cache_bytes=cache,
        )

    # --- details -----------------------------------------------------------------------------------------------------

    @property
    def _has_experts(self) -> bool:
        return self._sizes.num_experts > 0

    def _slot_bytes(self, span: Span) -> int:
        return min(SLICE_BYTES, self._largest_part(span) + PADDING_BYTES)

    def _ring_share(self, worker: WorkerInfo, span: Span) -> int:
        """Return what the ring takes of the worker's budget: all of it, or on a GPU what is copied there from it."""
        ring = self.ring_bytes(worker, span)
        return ring if worker.device == "cpu" else min(ring, GPU_SLOTS * self._slot_bytes(span))

    def _can_shift(self, worker: WorkerInfo) -> bool:
        """Tell whether pages take memory only once they are used, so that blocks can have it until then."""
        return worker.device == "cpu" and not self._has_experts

    def _left_resident(self, worker: WorkerInfo, span: Span) -> int:
        """Return the bytes that are left for keys and values beside all weights."""
        taken = self._buffer_bytes(worker, span, is_resident=True) + self.weight_bytes(span)
        return worker.free_memory_bytes - taken

    def _left_streamed(self, worker: WorkerInfo, span: Span) -> int:
        """Likewise, with all that can be streamed being streamed."""
        taken = self._buffer_bytes(worker, span, is_resident=False) + self._ring_share(worker, span)
        return worker.free_memory_bytes - taken - self.small_bytes(span) - self._stays_bytes(span)

    def _stays_bytes(self, span: Span) -> int:
        """Return the bytes of linear layers that are never streamed: all but experts, of which some are cached."""
        if not self._has_experts:
            return 0
        return self.large_bytes(span) - self.expert_bytes(span) + MIN_EXPERTS * self._expert_slot_bytes()

    def _expert_slot_bytes(self) -> int:
        """Return what one expert takes in the cache."""
        all_experts = max(count.large_bytes(self.options.precision) for count in self._sizes.experts)
        return all_experts // self._sizes.num_experts + PADDING_BYTES

    def _host_cache_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the experts' cache of a worker with a GPU: all of them, as far as the machine's memory goes."""
        all_bytes = len(span) * self._sizes.num_experts * self._expert_slot_bytes()
        return min(all_bytes, worker.free_host_bytes - PROCESS_BYTES)

    def _resident_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the memory that the span needs with nothing being streamed."""
        buffers = self._buffer_bytes(worker, span, is_resident=True)
        return self.weight_bytes(span) + self.min_kv_bytes(worker, span) + buffers

    def _streamed_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return the memory that the span needs with all that can be streamed being streamed, by the smallest ring."""
        slots = 0 if self._has_experts else MIN_RING_SLOTS if worker.device == "cpu" else GPU_SLOTS
        kept = self.small_bytes(span) + self._stays_bytes(span) + slots * self._slot_bytes(span)
        return self._buffer_bytes(worker, span, is_resident=False) + kept + self.min_kv_bytes(worker, span)

    def _buffer_bytes(self, worker: WorkerInfo, span: Span, *, is_resident: bool) -> int:
        """What is stored as floats and all resident is read from the checkpoint weight by weight, everything else from
        the block store piece by piece."""
        computing = self.step_tokens * self._bytes_per_token() + self._score_bytes() + self._logits_bytes(span)
        computing += self._decoded_bytes(worker, span)
        loading = PIECE_COPIES * min(SLICE_BYTES, self._largest_part(span))
        if is_resident and not self.options.precision.is_quantized:
            loading = max(loading, WEIGHT_COPIES * self._largest_weight(span))
        return PROCESS_BYTES + max(computing, loading)

    def _conversion_bytes(self, span: Span) -> int:
        """Return what encoding the largest weight takes, before anything is loaded."""
        return PROCESS_BYTES + self._largest_weight(span)

    def _largest_weight(self, span: Span) -> int:
        """Return the bytes of the largest weight: the head, or at most half a block."""
        return max(self._head_bytes if self.is_last(span) else 0, max(self._large[span.start : span.end]) // 2)

    def _least_streamed(self, span: Span, excess_bytes: int) -> tuple[int, int]:
        """Return how many parts to stream, in streaming order, to be rid of `excess_bytes`; and their bytes."""
        parts = [self._large[span.start + index] for index in streaming_order(len(span))]
        if self.is_last(span):
            parts.append(self._head_bytes)
        for count, streamed in enumerate(accumulate(parts), start=1):
            if streamed >= excess_bytes:
                return count, streamed
        return len(parts), sum(parts)

    def _largest_part(self, span: Span) -> int:
        largest = max(self._large[span.start : span.end])
        return max(largest, self._head_bytes) if self.is_last(span) else largest

    def _bytes_per_token(self) -> int:
        sizes = self._sizes
        factor = OUTLIER_FACTOR if self.options.precision is Precision.INT8 else 1
        return 4 * (factor * sizes.num_output_elements + PAYLOAD_COPIES * sizes.hidden_size)

    def _score_bytes(self) -> int:
        return max(SCORE_BYTES, 3 * 4 * self._sizes.num_heads * self.options.max_context)

    def _logits_bytes(self, span: Span) -> int:
        if not self.is_last(span):
            return 0
        row_bytes = 4 * self._sizes.head.num_rows
        rows = max(self.options.max_running, self.options.max_context)
        return LOGITS_COPIES * min(rows * row_bytes, max(LOGITS_BYTES, LOGITS_TILE * row_bytes))

    def _decoded_bytes(self, worker: WorkerInfo, span: Span) -> int:
        """Return what a piece of a 4-bit weight becomes on a GPU before it meets many rows: floats, two per byte."""
        if worker.device == "cpu" or self.options.precision is not Precision.NF4:
            return 0
        return 2 * DTYPE_BYTES.get(self.options.compute_dtype, 2) * min(SLICE_BYTES, self._largest_weight(span))

    def _kv_element_bytes(self, worker: WorkerInfo) -> int:
        """Return the size of a key's or value's element. "auto" is the compute dtype: fp32 on a CPU, where a CPU that
        computes in bf16 will use less than it is charged; on a GPU that of 16-bit weights, else bf16."""
        named = self.options.kv_dtype if self.options.kv_dtype != "auto" else self.options.compute_dtype
        if named != "auto":
            return DTYPE_BYTES[named]
        return 4 if worker.device == "cpu" else DTYPE_BYTES.get(self.options.precision.value, 2)


def _host_bytes(worker: WorkerInfo) -> int:
    return worker.free_memory_bytes if worker.device == "cpu" else worker.free_host_bytes


def lighter_precisions(options: PlacementOptions) -> Sequence[Precision]:
    """Return the precisions that take less memory than that of the options, the most accurate first."""
    if options.is_precision_fixed:
        return ()
    order = (Precision.BF16, Precision.INT8, Precision.NF4)
    return [other for other in order if other.bits_per_parameter < options.precision.bits_per_parameter]
