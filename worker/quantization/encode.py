"""Weights as trained to weights as stored, whichever the precision."""

from __future__ import annotations

from torch import Tensor

from cluster.model_spec import Precision
from worker.numerics import DTYPES
from worker.quantization import int8, nf4
from worker.stored_weight import MemoryWeight, Piece


def encode(name: str, weight: Tensor, kind: Precision) -> MemoryWeight:
    """Return `weight` `[out, in]` (any float dtype, may be memory-mapped) in stored form: one piece.

    Takes memory for the result and a few MiB. The result depends on the weight's values alone, not on the machine.
    """
    if kind is Precision.INT8:
        return int8.encode(name, weight)
    if kind is Precision.NF4:
        return nf4.encode(name, weight)
    stored = weight.to(DTYPES[kind.value]).contiguous()
    return MemoryWeight(
        name, kind, (weight.shape[0], weight.shape[1]), {}, (Piece(0, weight.shape[0], {"weight": stored}),)
    )
