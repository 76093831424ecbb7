"""Layers of 32-bit and 16-bit weights: streamed ones have the bits of resident ones, however they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from cluster.model_spec import Precision
from worker.linear import LinearNumerics, Scratch, build_linears
from worker.linear.floating import FixedRowsLinear, PlainLinear
from worker.numerics import DTYPES
from worker.quantization.encode import encode
from worker.stored_weight import MemoryWeight, Piece

CPU = torch.device("cpu")
FORMS = [
    *((Precision(name), torch.float32) for name in DTYPES),
    (Precision.BF16, torch.bfloat16),
    (Precision.FP32, torch.bfloat16),
    (Precision.FP16, torch.float16),
]


@dataclass(frozen=True, slots=True)
class ReusingWeight(MemoryWeight):
    """A streamed weight: each piece overwrites the memory of the one before."""

    @property
    def is_streamed(self) -> bool:
        return True

    def pieces(self) -> Iterator[Piece]:
        ring = torch.zeros(max(piece.num_rows for piece in self.held), self.shape[1], dtype=DTYPES[self.kind.value])
        for piece in self.held:
            yield replace(piece, tensors={"weight": ring[: piece.num_rows].copy_(piece.tensors["weight"])})
            ring.fill_(torch.nan)


def cut(weight: MemoryWeight, rows_per_piece: int) -> tuple[Piece, ...]:
    parts = torch.split(weight.held[0].tensors["weight"], rows_per_piece)
    firsts = range(0, weight.shape[0], rows_per_piece)
    return tuple(Piece(first, len(part), {"weight": part}) for first, part in zip(firsts, parts, strict=True))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("precision", "compute"), FORMS)
@pytest.mark.parametrize("shape", [(100, 72), (17, 33), (1000, 3000), (1030, 2048)])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("is_exact", [False, True])
def test_streamed_layers_have_the_bits_of_resident_ones(
    precision: Precision, compute: torch.dtype, shape: tuple[int, int], num_threads: int, is_exact: bool
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    weight, bias = encode("layer", random(*shape), precision), random(shape[0], seed=1)
    forms: list[MemoryWeight] = [
        weight,
        MemoryWeight(weight.name, weight.kind, weight.shape, {}, cut(weight, 64)),
        ReusingWeight(weight.name, weight.kind, weight.shape, {}, cut(weight, 64)),
        ReusingWeight(weight.name, weight.kind, weight.shape, {}, cut(weight, 512)),
    ]
    numerics = LinearNumerics(compute, CPU, is_exact)
    resident, *others = [build_linears([form], [bias], numerics, Scratch())[0] for form in forms]
    for num_rows in (0, 1, 2, 3, 4, 16, 65):
        x = random(num_rows, shape[1], seed=num_rows).to(compute)
        for other in others:
            assert torch.equal(other(x), resident(x)), num_rows
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [PlainLinear, FixedRowsLinear])
def test_without_onednn_streamed_layers_compute_what_resident_ones_do(kind: type[PlainLinear]) -> None:
    weight, bias, x = encode("layer", random(96, 64), Precision.BF16), random(96, seed=1), random(5, 64, seed=2)
    numerics = LinearNumerics(torch.float32, CPU, is_exact=True)
    streamed = ReusingWeight(weight.name, weight.kind, weight.shape, {}, cut(weight, 32))
    layers: list[nn.Module] = [kind(form, bias, numerics) for form in (weight, streamed)]
    wanted = x @ weight.held[0].tensors["weight"].float().T + bias
    for layer in layers:
        torch.testing.assert_close(layer(x), wanted)
