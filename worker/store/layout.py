"""Decides where each tensor of a part lies in its file: from names, kinds and shapes alone, so alike on every machine.

Covers the arithmetic of pieces, slices and offsets; writing is `worker.store.writer`'s. A weight that fits in a slice
is one piece; a larger one is cut into as few pieces as do fit, of nearly equal numbers of rows. Slices are filled in
order of use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.errors import ConfigurationError
from cluster.load_order import SLICE_BYTES
from cluster.model_spec import Precision
from worker.store.manifest import (
    ALIGNMENT,
    SMALL_ALIGNMENT,
    PartManifest,
    PiecePlace,
    SlicePlace,
    TensorPlace,
    WeightPlace,
)

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
NF4_BLOCK = 64  # parameters that share an absmax
NF4_NESTED_BLOCK = 256  # absmaxes that share one of their own
_ROW_STEP = 64  # pieces hold multiples of it where they can: products work on tiles of rows
_FLOAT_DTYPES = {Precision.FP32: "F32", Precision.BF16: "BF16", Precision.FP16: "F16"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor before it has a place."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A linear layer's weight before it has a place. `expert` is the number of the expert it belongs to, or None."""

    name: str
    kind: Precision
    shape: tuple[int, int]  # (out, in)
    expert: int | None = None
    absmax_dtype: str = "U8"  # of NF4; "F32" where a checkpoint that comes quantized has them quantized only once


def piece_specs(kind: Precision, num_rows: int, num_columns: int, absmax_dtype: str = "U8") -> dict[str, TensorSpec]:
    """Return the large tensors of `num_rows` rows, by role (see worker.stored_weight)."""
    if kind is Precision.INT8:
        return {"weight": TensorSpec("I8", (num_rows, num_columns))}
    if kind is Precision.NF4:
        num_parameters = num_rows * num_columns
        codes, absmax = -(-num_parameters // 2), -(-num_parameters // NF4_BLOCK)
        return {"weight": TensorSpec("U8", (codes,)), "absmax": TensorSpec(absmax_dtype, (absmax,))}
    return {"weight": TensorSpec(_FLOAT_DTYPES[kind], (num_rows, num_columns))}


def small_specs(kind: Precision, shape: tuple[int, int], absmax_dtype: str = "U8") -> dict[str, TensorSpec]:
    """Return the tensors of a whole weight that stay in memory, by role."""
    if kind is Precision.INT8:
        return {"scale": TensorSpec("F32", shape[:1])}
    if kind is Precision.NF4 and absmax_dtype == "U8":
        num_nested = -(-shape[0] * shape[1] // (NF4_BLOCK * NF4_NESTED_BLOCK))
        return {"nested_absmax": TensorSpec("F32", (num_nested,)), "nested_offset": TensorSpec("F32", ())}
    return {}


def plan_part(
    part: str,
    precision: Precision,
    small: Mapping[str, TensorSpec],
    weights: Sequence[WeightSpec],
    slice_bytes: int = SLICE_BYTES,
) -> PartManifest:
    """Return where everything goes: a manifest whose checksums are empty. `weights` are in order of use.

    Raises ConfigurationError for a row that no slice holds.
    """
    leading = _Leading()
    placed_small = {name: leading.place(small[name]) for name in sorted(small)}
    weight_small = [
        leading.place_all(small_specs(weight.kind, weight.shape, weight.absmax_dtype)) for weight in weights
    ]
    small_bytes = _round_up(leading.end, ALIGNMENT)
    slices = _Slices(small_bytes, slice_bytes)
    placed = [
        WeightPlace(weight.name, weight.kind.value, weight.shape, tensors, slices.place(weight))
        for weight, tensors in zip(weights, weight_small, strict=True)
    ]
    slices.close()
    return PartManifest(
        part, precision.value, slices.end, small_bytes, placed_small, tuple(placed), tuple(slices.closed)
    )


@dataclass(slots=True)
class _Leading:
    """The segment of small tensors as it grows."""

    end: int = 0

    def place(self, spec: TensorSpec) -> TensorPlace:
        offset = _round_up(self.end, SMALL_ALIGNMENT)
        self.end = offset + spec.num_bytes
        return TensorPlace(spec.dtype, spec.shape, offset, spec.num_bytes, "")

    def place_all(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorPlace]:
        return {role: self.place(spec) for role, spec in specs.items()}


@dataclass(slots=True)
class _Slices:
    """The slices as they fill. `end` is where the next piece goes, `start` where the open slice began."""

    end: int
    max_bytes: int
    start: int = field(init=False)
    expert: int | None = None
    closed: list[SlicePlace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.end

    def place(self, weight: WeightSpec) -> tuple[PiecePlace, ...]:
        return tuple(
            self._place_piece(weight, first_row, num_rows) for first_row, num_rows in cut_rows(weight, self.max_bytes)
        )

    def close(self) -> None:
        if self.end > self.start:
            self.closed.append(SlicePlace(self.start, self.end - self.start, self.expert))
        self.start = self.end

    def _place_piece(self, weight: WeightSpec, first_row: int, num_rows: int) -> PiecePlace:
        specs = piece_specs(weight.kind, num_rows, weight.shape[1], weight.absmax_dtype)
        is_full = self.end - self.start + _aligned_bytes(specs) > self.max_bytes
        if is_full or weight.expert != self.expert:
            self.close()
        self.expert = weight.expert
        return PiecePlace(first_row, num_rows, len(self.closed), {role: self._append(s) for role, s in specs.items()})

    def _append(self, spec: TensorSpec) -> TensorPlace:
        place = TensorPlace(spec.dtype, spec.shape, self.end, spec.num_bytes, "")
        self.end = _round_up(self.end + spec.num_bytes, ALIGNMENT)
        return place


def cut_rows(weight: WeightSpec, slice_bytes: int) -> list[tuple[int, int]]:
    """Return (first row, number of rows) of the pieces of a weight."""
    num_rows = weight.shape[0]
    if _fits(weight, num_rows, slice_bytes):
        return [(0, num_rows)]
    step = _row_step(weight, slice_bytes)
    num_steps, max_steps = -(-num_rows // step), 1
    while _fits(weight, (max_steps + 1) * step, slice_bytes):
        max_steps += 1
    num_pieces = -(-num_steps // max_steps)
    bounds = [min(num_rows, index * num_steps // num_pieces * step) for index in range(num_pieces + 1)]
    return [(start, end - start) for start, end in pairwise(bounds)]


def _row_step(weight: WeightSpec, slice_bytes: int) -> int:
    """Return what a piece's rows are a multiple of: whole blocks of NF4, and _ROW_STEP unless so many do not fit."""
    columns = weight.shape[1]
    smallest = NF4_BLOCK // math.gcd(columns, NF4_BLOCK) if weight.kind is Precision.NF4 else 1
    step = _ROW_STEP
    while step > smallest and not _fits(weight, step, slice_bytes):
        step //= 2
    if not _fits(weight, step, slice_bytes):
        raise ConfigurationError(
            f"{weight.name} has rows of {columns:,} parameters, of which {step} do not fit the {slice_bytes:,} bytes "
            "that the block store reads at once: Spanwise cannot serve such a model"
        )
    return step


def _fits(weight: WeightSpec, num_rows: int, slice_bytes: int) -> bool:
    return _aligned_bytes(piece_specs(weight.kind, num_rows, weight.shape[1], weight.absmax_dtype)) <= slice_bytes


def _aligned_bytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(_round_up(spec.num_bytes, ALIGNMENT) for spec in specs.values())


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
