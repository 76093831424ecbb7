"""The SpanLoader that reads checkpoints into torch.

Covers which tensors a span needs, their conversion to the stored precision, and the parameter counts of a model that
is not loaded. Fetching and opening files is `worker.weights`' business, names are `worker.architectures`'.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import ConfigurationError
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import ModelSizes, WeightCount
from worker.architectures import Architecture, open_architecture
from worker.architectures.base import HEAD_KEY
from worker.blocks import ExactActivation, count_weights, materialize
from worker.checkpoint_client import CheckpointReader
from worker.checkpoint_client import connect as connect_to_checkpoints
from worker.executor import LoadedSpan
from worker.kv_cache import KVCache
from worker.linear import LinearNumerics, Scratch, build_linears
from worker.numerics import DTYPES, choose_compute_dtype, has_native_bf16
from worker.sampling import Sampler
from worker.stage import Entrance, Exit, Stage, StageNumerics
from worker.stored_weight import MemoryWeight, Piece
from worker.weights import Checkpoint, fetch_checkpoint

READABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TorchSpanLoader:
    """Loads spans onto one device."""

    def __init__(
        self, device: torch.device, connect: Callable[[str], CheckpointReader] = connect_to_checkpoints
    ) -> None:
        """`connect` reaches the coordinator's checkpoint service, for a folder that only the head has."""
        self._device = device
        self._connect = connect

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        """See SpanLoader; takes no memory for weights."""
        architecture = open_architecture(config)
        table = architecture.vocab_size * architecture.hidden_size
        blocks = range(architecture.num_blocks)
        built = architecture.build_block(0)  # the blocks of every family served have equal shapes
        count = count_weights(built, architecture.unquantized)
        experts = [child for name, child in built.named_modules() if name == architecture.experts_name]
        expert_count = sum((count_weights(child) for child in experts), WeightCount())
        num_experts = len(list(experts[0].children())) if experts else 0
        num_chosen = architecture.num_chosen_experts
        norm = count_weights(architecture.build_norm())
        return ModelSizes(
            blocks=(count,) * len(blocks),
            experts=(expert_count,) * len(blocks),
            num_experts=num_experts,
            embedding_num_parameters=table + count_weights(architecture.build_embedding()).num_parameters,
            head=norm + WeightCount(num_linear=table, num_rows=architecture.vocab_size),
            kv_elements_per_token=(2 * architecture.num_kv_heads * architecture.head_dim,) * len(blocks),
            hidden_size=architecture.hidden_size,
            num_output_elements=count.num_rows
            - expert_count.num_rows
            + expert_count.num_rows * num_chosen // max(1, num_experts),
        )

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        """See SpanLoader. Memory peaks at one tensor above what stays."""
        architecture = open_architecture(order.config)
        _check_span(order, architecture)
        numerics = _choose_numerics(order, self._device)
        is_first, is_last = order.stage == 0, order.stage == order.num_stages - 1
        parts = architecture.parts(order.span, is_first=is_first, is_last=is_last)
        needed = _needed_names(architecture, parts, is_first=is_first)
        with fetch_checkpoint(order, needed.__contains__, on_progress, connect=self._connect) as checkpoint:
            weights = SpanWeights(order, architecture, checkpoint, numerics, on_progress)
            weights.expect(sum(count_weights(part).num_parameters for part in parts.values()))
            loaded = {key: _load_part(part, key, weights) for key, part in parts.items()}
            entrance = Entrance(weights.embedding_table(), loaded[""]) if is_first else None
        rotary = architecture.rotary_table(order.max_context, numerics.compute, numerics.device)
        cache = _build_cache(order, architecture, numerics)
        stage = Stage(
            stage=order.stage,
            span=order.span,
            max_context=order.max_context,
            architecture=architecture,
            blocks=[_finish(architecture, loaded, block, numerics) for block in order.span.blocks()],
            rotary=rotary,
            cache=cache,
            numerics=numerics,
            entrance=entrance,
            exit_=_build_exit(architecture, loaded) if is_last else None,
        )
        weight_bytes = weights.weight_bytes + sum(table.nbytes for table in rotary or ())
        return _describe(stage, weight_bytes, cache, numerics)


class SpanWeights:
    """The WeightSource of one span: finds tensors, checks them, converts them, counts bytes."""

    def __init__(
        self,
        order: LoadOrder,
        architecture: Architecture,
        checkpoint: Checkpoint,
        numerics: StageNumerics,
        on_progress: Callable[[LoadProgress], None],
    ) -> None:
        self._order, self._architecture, self._checkpoint = order, architecture, checkpoint
        self._names, self._numerics, self._on_progress = checkpoint.names(), numerics, on_progress
        self._scratch = Scratch()
        self._bytes_done = self._bytes_total = 0
        self.weight_bytes = 0  # held in memory so far

    def expect(self, num_parameters: int) -> None:
        """Announce how many numbers will be loaded: progress is measured against them."""
        self._bytes_total = num_parameters * self._numerics.stored.itemsize
        self._advance(0)

    def linear(self, key: str, shape: tuple[int, int], *, has_bias: bool, is_transposed: bool) -> nn.Module:
        """See WeightSource."""
        stored_shape = shape[::-1] if is_transposed else shape
        weight = self._find(key + "weight", stored_shape)
        copy = self._copy(key + "weight", weight.t() if is_transposed else weight, self._numerics.stored)
        stored = MemoryWeight(key, self._order.precision, shape, {}, (Piece(0, shape[0], {"weight": copy}),))
        bias = self.tensor(key + "bias", torch.Size(shape[:1])) if has_bias else None
        numerics = LinearNumerics(self._numerics.compute, self._numerics.device, self._numerics.is_exact)
        built = build_linears([stored], [bias], numerics, self._scratch)[0]
        self.weight_bytes += weight.numel() * self._numerics.stored.itemsize
        self._advance(weight.numel())
        return built

    def tensor(self, key: str, shape: torch.Size) -> Tensor:
        """See WeightSource. Its values are rounded to the stored precision as those of linear layers are."""
        found = self._find(key, tuple(shape))
        loaded = self._copy(key, found.to(self._numerics.stored), self._numerics.compute)
        self.weight_bytes += loaded.nbytes
        self._advance(found.numel())
        return loaded

    def buffer(self, value: Tensor) -> Tensor:
        """See WeightSource."""
        return value.to(self._numerics.device)

    def embedding_table(self) -> Tensor:
        """Return the embedding as it lies in the checkpoint."""
        shape = (self._architecture.vocab_size, self._architecture.hidden_size)
        return self._find(self._architecture.embedding_key, shape)

    def _find(self, key: str, shape: tuple[int, ...]) -> Tensor:
        names = self._architecture.checkpoint_keys(key)
        name = next((name for name in names if name in self._names), None)
        if name is None:
            raise ConfigurationError(f"the checkpoint lacks tensor {' or '.join(names)}: not in {self._files_text()}")
        found = self._checkpoint.tensor(name)
        file = self._order.weight_map.get(name) or self._files_text()
        if tuple(found.shape) != shape:
            raise ConfigurationError(
                f"tensor {name} in {file} has shape {list(found.shape)}, but config.json implies {list(shape)}: "
                "they belong to different models"
            )
        if found.dtype not in READABLE_DTYPES:
            raise ConfigurationError(
                f"tensor {name} in {file} holds {str(found.dtype).removeprefix('torch.')} numbers, which only mean "
                "something together with a quantization scheme: serve the original 16-bit or 32-bit checkpoint"
            )
        return found

    def _files_text(self) -> str:
        files = [file.name for file in self._order.weight_files]
        return files[0] if len(files) == 1 else f"any of its {len(files)} weight files"

    def _copy(self, key: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy out of the memory map, since resident weights must not depend on the page cache."""
        copy = torch.empty(source.shape, dtype=dtype, device=self._numerics.device).copy_(source)
        if self._numerics.stored is torch.float16 and not bool(copy.isfinite().all()):
            raise ConfigurationError(f"tensor {key} has values that do not fit fp16: serve with --precision bf16")
        return copy

    def _advance(self, num_parameters: int) -> None:
        self._bytes_done += num_parameters * self._numerics.stored.itemsize
        self._on_progress(LoadProgress("loading", self._bytes_done, self._bytes_total))


def _load_part(part: nn.Module, key: str, weights: SpanWeights) -> nn.Module:
    loaded = materialize(part, key, weights)
    _trim_heap()
    return loaded


def _trim_heap() -> None:
    """Give freed memory back to the system. glibc would keep what converting took, where tensors are below its mapping
    threshold: half as much again as the weights of TinyLlama's shape in bf16."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _check_span(order: LoadOrder, architecture: Architecture) -> None:
    if order.span.end > architecture.num_blocks:
        raise ConfigurationError(
            f"stage {order.stage} was told to load blocks {order.span}, but the model has {architecture.num_blocks}"
        )


def _choose_numerics(order: LoadOrder, device: torch.device) -> StageNumerics:
    compute = choose_compute_dtype(order.precision, device, is_bf16_native=has_native_bf16())
    automatic = torch.float32 if compute is torch.float32 else torch.bfloat16
    wire = DTYPES.get(order.wire_dtype, automatic)
    return StageNumerics(DTYPES[order.precision.value], compute, wire, device, order.is_exact)


def _needed_names(architecture: Architecture, parts: Mapping[str, nn.Module], *, is_first: bool) -> frozenset[str]:
    keys = [key + name for key, part in parts.items() for name, _ in part.named_parameters()]
    if is_first:
        keys.append(architecture.embedding_key)
    return frozenset(name for key in keys for name in architecture.checkpoint_keys(key))


def _build_cache(order: LoadOrder, architecture: Architecture, numerics: StageNumerics) -> KVCache:
    dtype = DTYPES.get(order.kv_dtype, numerics.compute)
    num_kv_heads = (architecture.num_kv_heads,) * len(order.span)
    head_dim = (architecture.head_dim,) * len(order.span)
    return KVCache(num_kv_heads, head_dim, order.num_pages, order.page_size, dtype, numerics.device)


def _finish(
    architecture: Architecture, loaded: Mapping[str, nn.Module], block: int, numerics: StageNumerics
) -> nn.Module:
    built = loaded[architecture.block_key(block)]
    if numerics.is_exact:
        activation = built.get_submodule(architecture.activation)
        built.set_submodule(architecture.activation, ExactActivation(activation))
    return built


def _build_exit(architecture: Architecture, loaded: Mapping[str, nn.Module]) -> Exit:
    return Exit(loaded[architecture.norm_key], loaded[HEAD_KEY], Sampler(architecture.vocab_size))


def _describe(stage: Stage, weight_bytes: int, cache: KVCache, numerics: StageNumerics) -> LoadedSpan:
    return LoadedSpan(
        executor=stage,
        weight_bytes=weight_bytes,
        kv_bytes=cache.size_bytes,
        compute_dtype=_name(numerics.compute),
        wire_dtype=_name(numerics.wire),
        kv_dtype=_name(cache.keys[0].dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)
