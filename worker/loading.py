"""The SpanLoader that loads spans into torch, and counts the parameters of a model that is not loaded.

Covers how a span is put together. Tensors come from `worker.checkpoint_weights` or `worker.store_weights`; modules over
them are `worker.part_weights`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import ModelSizes, Precision, WeightCount
from worker.architectures import Architecture, open_architecture
from worker.architectures.base import HEAD_KEY, Part
from worker.blocks import ExactActivation, count_weights
from worker.checkpoint_client import CheckpointReader
from worker.checkpoint_client import connect as connect_to_checkpoints
from worker.checkpoint_weights import CheckpointWeights, DirectWeights, needed_names
from worker.compiled_block import compile_block
from worker.executor import LoadedSpan
from worker.heap import trim_heap
from worker.kv_cache import KVCache
from worker.libraries import forget_libraries
from worker.linear import LinearNumerics
from worker.native.attention import kernels
from worker.numerics import DTYPES, choose_compute_dtype, has_native_bf16, name_of
from worker.part_weights import PartBuilder, PartTensors, RowTable
from worker.quantization.bitsandbytes import has_plain_absmaxes, is_kept
from worker.quantization.nf4 import BLOCK
from worker.sampling import Sampler
from worker.sharing.holders import Holder, Neighbours
from worker.sharing.holders import connect as connect_to_holders
from worker.sharing.offers import offer
from worker.sharing.shelf import Shelf
from worker.stage import Entrance, Exit, Stage, StageNumerics
from worker.store.key import EMBEDDING, HEAD, block_part
from worker.store_weights import StoreWeights, streamed_part, uses_disk, uses_store
from worker.stream.cuda import make_copier
from worker.stream.device_source import Copier
from worker.stream.disk_weights import DiskWeights
from worker.stream.opening import OpenSpan
from worker.weights import CheckpointSource


class TorchSpanLoader:
    """Loads spans onto one device."""

    def __init__(
        self,
        device: torch.device,
        connect: Callable[[str], CheckpointReader] = connect_to_checkpoints,
        shelf: Shelf | None = None,
        connect_holder: Callable[[str], Holder] = connect_to_holders,
        make_copier: Callable[[torch.device], Copier | None] = make_copier,
    ) -> None:
        """`connect` reaches the coordinator's checkpoint service, for a folder that only the head has. `shelf` is what
        this worker offers to others, `connect_holder` reaches those. `make_copier` makes what brings streamed weights
        to a device with memory of its own."""
        self._device, self._make_copier = device, make_copier
        self._connect, self._connect_holder = connect, connect_holder
        self._shelf = shelf or Shelf()

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        """See SpanLoader; takes no memory for weights."""
        architecture = open_architecture(config)
        table = architecture.vocab_size * architecture.hidden_size
        num_blocks = architecture.num_blocks
        block, experts, num_experts = _count_block(config, architecture)
        num_expert_rows = experts.num_rows * architecture.num_chosen_experts // max(1, num_experts)
        norm = count_weights(architecture.build_norm())
        return ModelSizes(
            blocks=(block,) * num_blocks,
            experts=(experts,) * num_blocks,
            num_experts=num_experts,
            embedding_num_parameters=table + count_weights(architecture.build_embedding()).num_parameters,
            head=norm + _count_head(config, table, architecture.vocab_size),
            kv_elements_per_token=(2 * architecture.num_kv_heads * architecture.head_dim,) * num_blocks,
            hidden_size=architecture.hidden_size,
            num_output_elements=block.num_rows - experts.num_rows + num_expert_rows,
            num_heads=architecture.num_heads,
            rotary_elements_per_token=2 * architecture.head_dim if architecture.rotary_class else 0,
        )

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        """See SpanLoader. Memory peaks at one tensor above what stays."""
        offer(self._shelf, order)
        with Neighbours(self._shelf, {address: self._connect_holder(address) for address in order.holders}) as others:
            return self._load(order, on_progress, others)

    def _load(
        self, order: LoadOrder, on_progress: Callable[[LoadProgress], None], neighbours: Neighbours
    ) -> LoadedSpan:
        architecture = open_architecture(order.config)
        _check_span(order, architecture)
        numerics = _choose_numerics(order, self._device)
        parts = architecture.parts(order.span, is_first=order.stage == 0, is_last=order.stage == order.num_stages - 1)
        progress = _Progress(order.precision, parts, on_progress)
        linear_numerics = LinearNumerics(
            numerics.compute, self._device, numerics.is_exact, order.outlier_threshold, is_checked=order.is_exact
        )
        builder = PartBuilder(linear_numerics, progress.count)
        with self._open_weights(order, architecture, parts, on_progress, neighbours) as weights:
            progress.begin()
            built = _build_span(order, architecture, parts, builder, weights, is_exact=numerics.is_exact)
        return _assemble(order, architecture, numerics, built, builder.weight_bytes)

    def _open_weights(
        self,
        order: LoadOrder,
        architecture: Architecture,
        parts: Sequence[Part],
        on_progress: Callable[[LoadProgress], None],
        neighbours: Neighbours,
    ) -> SpanWeights:
        def open_source() -> CheckpointSource:
            return CheckpointSource(order, connect=self._connect, neighbours=neighbours)

        if not uses_store(order):
            needed = needed_names(architecture, parts)
            checkpoint = open_source().fetch(needed.__contains__, on_progress)
            return DirectWeights(CheckpointWeights(order, architecture, checkpoint), order.precision)
        copier = self._make_copier(self._device) if uses_disk(order) else None
        weights = StoreWeights(order, architecture, open_source, on_progress, neighbours, copier)
        weights.fill(parts)
        if uses_disk(order):
            weights.stream(order, parts)
        return weights


def _count_block(config: Mapping[str, Any], architecture: Architecture) -> tuple[WeightCount, WeightCount, int]:
    """Return what a block has, what of that its experts have, and how many these are; all blocks have equal shapes."""
    built, prefix = architecture.build_block(0), architecture.prefix + architecture.block_key(0)
    count = count_weights(built, architecture.unquantized, lambda name: is_kept(config, prefix + name))
    if has_plain_absmaxes(config):
        count += WeightCount(num_small=count.num_linear // BLOCK)
    if not architecture.experts_name:
        return count, WeightCount(), 0
    experts, experts_key = built.get_submodule(architecture.experts_name), f"{prefix}{architecture.experts_name}."
    expert_count = count_weights(experts, (), lambda name: is_kept(config, experts_key + name))
    return count, expert_count, len(list(experts.children()))


def _count_head(config: Mapping[str, Any], num_parameters: int, num_rows: int) -> WeightCount:
    if is_kept(config, HEAD_KEY.rstrip(".")):
        return WeightCount(num_kept=num_parameters)
    return WeightCount(num_linear=num_parameters, num_rows=num_rows)


class SpanWeights(Protocol):
    """Where the parts of a span come from, open. `streams` brings what is not held in memory."""

    @property
    def streams(self) -> OpenSpan | None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def part(self, part: Part) -> PartTensors:
        """Return a part's tensors. Raises StorageError, as they do, when it is damaged."""
        ...

    def table(self) -> RowTable:
        """Return the embedding's rows; usable when this is closed."""
        ...

    def rebuild(self, part: Part, error: StorageError) -> None:
        """Make a damaged part again, or raise why that is not possible."""
        ...


@dataclass(frozen=True, slots=True)
class _BuiltSpan:
    """The modules of a span, and what brings those that are not held in memory."""

    entrance: Entrance | None
    blocks: Sequence[nn.Module]
    head: nn.Module | None
    disk_weights: DiskWeights | None
    disk_bytes_per_second: float


def _build_span(
    order: LoadOrder,
    architecture: Architecture,
    parts: Sequence[Part],
    builder: PartBuilder,
    weights: SpanWeights,
    *,
    is_exact: bool,
) -> _BuiltSpan:
    """Build everything; where weights are streamed, reading ahead begins."""
    built = {part.name: _build_part(builder, architecture, part, weights) for part in parts}
    forget_libraries()
    entrance = Entrance(_open_table(weights, parts[0]), built[EMBEDDING]) if EMBEDDING in built else None
    streams = weights.streams
    finisher = Finisher(architecture, streams, is_exact)
    blocks = [finisher.finish(name, built[name]) for name in map(block_part, order.span.blocks())]
    if streams is None:
        return _BuiltSpan(entrance, blocks, built.get(HEAD), None, 0.0)
    rebuild = Rebuilder(architecture, weights, streams, builder.again(), finisher)
    disk_weights = streams.disk_weights(rebuild, rebuild.make_again)
    return _BuiltSpan(entrance, blocks, built.get(HEAD), disk_weights, streams.bytes_per_second)


def _build_part(builder: PartBuilder, architecture: Architecture, part: Part, weights: SpanWeights) -> nn.Module:
    try:
        return builder.build(part, weights.part(part))
    except StorageError as error:
        fresh = architecture.build_part(part.name)  # the other one is half built
        weights.rebuild(fresh, error)
        return builder.build(fresh, weights.part(fresh))
    finally:
        trim_heap()


@dataclass(frozen=True, slots=True)
class Finisher:
    """What a block gets after its weights."""

    architecture: Architecture
    streams: OpenSpan | None
    is_exact: bool

    def finish(self, name: str, block: nn.Module) -> nn.Module:
        """Complete a block, which the block store calls `name`."""
        if self.is_exact:
            activation = block.get_submodule(self.architecture.activation)
            block.set_submodule(self.architecture.activation, ExactActivation(activation))
        if self.streams is not None and self.architecture.experts_name:
            owner: Any = block.get_submodule(self.architecture.experts_name.rpartition(".")[0])
            owner.arrivals = self.streams.expert_arrivals(name)
        return compile_block(block)


@dataclass(frozen=True, slots=True)
class Rebuilder:
    """Builds parts of a loaded span again, when they begin or cease to be streamed."""

    architecture: Architecture
    weights: SpanWeights
    streams: OpenSpan
    builder: PartBuilder
    finisher: Finisher

    def __call__(self, name: str, is_streamed: bool) -> nn.Module:
        """Return a block, or the head's linear layer. Raises StorageError where a damaged part cannot be made again."""
        try:
            return self._build(name, is_streamed)
        except StorageError as error:
            self.make_again(name, error)
            return self._build(name, is_streamed)

    def make_again(self, name: str, error: StorageError) -> None:
        """Make a damaged part of the store again, or raise why that is not possible."""
        self.weights.rebuild(self.architecture.build_part(name), error)

    def _build(self, name: str, is_streamed: bool) -> nn.Module:
        part = self.architecture.build_part(name)
        with self.streams.open_part(name) as file:
            built = self.builder.build(part, streamed_part(self.streams, file, is_streamed=is_streamed))
        return _head_layer(built) if name == HEAD else self.finisher.finish(name, built)


def _head_layer(head: nn.Module) -> nn.Module:
    return head.get_submodule(HEAD_KEY.rstrip("."))


def _open_table(weights: SpanWeights, embedding: Part) -> RowTable:
    try:
        return weights.table()
    except StorageError as error:
        weights.rebuild(embedding, error)
    return weights.table()


class _Progress:
    """Counts the numbers that are loaded, as bytes of the precision."""

    def __init__(
        self, precision: Precision, parts: Sequence[Part], on_progress: Callable[[LoadProgress], None]
    ) -> None:
        self._bits, self._on_progress = precision.bits_per_parameter, on_progress
        self._num_done = 0
        self._num_all = sum(count_weights(part.module).num_parameters for part in parts)

    def begin(self) -> None:
        """Announce the total."""
        self.count(0)

    def count(self, num_parameters: int) -> None:
        """Count what was loaded; a part that is loaded again counts once more, within the total."""
        self._num_done = min(self._num_all, self._num_done + num_parameters)
        done, total = (int(number * self._bits / 8) for number in (self._num_done, self._num_all))
        self._on_progress(LoadProgress("loading", done, total))


def _check_span(order: LoadOrder, architecture: Architecture) -> None:
    if order.span.end > architecture.num_blocks:
        raise ConfigurationError(
            f"stage {order.stage} was told to load blocks {order.span}, but the model has {architecture.num_blocks}"
        )


def _choose_numerics(order: LoadOrder, device: torch.device) -> StageNumerics:
    is_native = has_native_bf16()
    compute = choose_compute_dtype(order.precision, device, is_bf16_native=is_native, asked=order.compute_dtype)
    stored = compute if order.precision.is_quantized else DTYPES[order.precision.value]
    wire = DTYPES.get(order.wire_dtype, compute)
    is_exact = order.is_exact or (device.type == "cpu" and kernels() is not None)  # which cost nothing there
    return StageNumerics(stored, compute, wire, device, is_exact)


def _build_cache(order: LoadOrder, architecture: Architecture, numerics: StageNumerics) -> KVCache:
    dtype = DTYPES.get(order.kv_dtype, numerics.compute)
    num_kv_heads = (architecture.num_kv_heads,) * len(order.span)
    head_dim = (architecture.head_dim,) * len(order.span)
    return KVCache(num_kv_heads, head_dim, order.num_pages, order.page_size, dtype, numerics.device)


def _build_exit(architecture: Architecture, head: nn.Module) -> Exit:
    norm = head.get_submodule(architecture.norm_key.rstrip("."))
    return Exit(norm, _head_layer(head), Sampler(architecture.vocab_size))


def _assemble(
    order: LoadOrder, architecture: Architecture, numerics: StageNumerics, built: _BuiltSpan, part_bytes: int
) -> LoadedSpan:
    rotary = architecture.rotary_table(order.max_context, numerics.compute, numerics.device)
    weight_bytes = part_bytes + sum(table.nbytes for table in rotary or ())
    cache = _build_cache(order, architecture, numerics)
    stage = Stage(
        stage=order.stage,
        span=order.span,
        max_context=order.max_context,
        architecture=architecture,
        blocks=built.blocks,
        rotary=rotary,
        cache=cache,
        numerics=numerics,
        entrance=built.entrance,
        exit_=_build_exit(architecture, built.head) if built.head is not None else None,
        resident_bytes=weight_bytes - (built.disk_weights.shifting_bytes if built.disk_weights else 0),
        disk_weights=built.disk_weights,
    )
    return _describe(stage, weight_bytes, cache, numerics, built)


def _describe(
    stage: Stage, weight_bytes: int, cache: KVCache, numerics: StageNumerics, built: _BuiltSpan
) -> LoadedSpan:
    return LoadedSpan(
        executor=stage,
        weight_bytes=weight_bytes,
        kv_bytes=cache.size_bytes,
        compute_dtype=name_of(numerics.compute),
        wire_dtype=name_of(numerics.wire),
        kv_dtype=name_of(cache.keys[0].dtype),
        streamed_bytes=built.disk_weights.streamed_bytes if built.disk_weights else 0,
        disk_bytes_per_second=built.disk_bytes_per_second,
        is_exact=numerics.is_exact,
    )
