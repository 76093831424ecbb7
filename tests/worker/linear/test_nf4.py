"""Linear layers over NF4 weights: right, the same streamed as resident, and a row the same in any company."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.model_spec import Precision
from worker.linear.base import LinearNumerics
from worker.linear.nf4 import CompiledNf4Linear, CudaNf4Linear, TiledNf4Linear, build_nf4
from worker.native import library as native
from worker.quantization.nf4 import decode, encode, rows_per_tile
from worker.stored_weight import MemoryWeight, Piece

CPU = torch.device("cpu")
COMPUTE = [torch.float32, torch.bfloat16]
SHAPES = [(96, 128), (97, 64), (40, 192), (50, 48), (7, 100), (33, 51), (600, 4096)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
BUILDS = [
    path
    for path in Path(native.__file__).parent.glob("_*.so")
    if path.name.startswith(tuple(f"_{name}." for name in native._builds()))
]


@pytest.fixture(params=BUILDS, ids=lambda path: path.name.partition(".")[0])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a build of the compiled kernels that this CPU runs."""
    library = ctypes.CDLL(str(request.param))
    monkeypatch.setattr(native, "library", lambda: library)


@dataclass(frozen=True, slots=True)
class StreamedWeight:
    """A weight whose pieces lose their content when the next one is asked for, as those in a ring do."""

    whole: MemoryWeight
    name: str = "streamed"
    is_streamed: bool = True

    @property
    def kind(self) -> Precision:
        return self.whole.kind

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape

    @property
    def small(self) -> dict[str, Tensor]:
        return dict(self.whole.small)

    def pieces(self) -> Iterator[Piece]:
        for piece in self.whole.held:
            copies = {role: tensor.clone() for role, tensor in piece.tensors.items()}
            yield Piece(piece.first_row, piece.num_rows, copies)
            for tensor in copies.values():
                tensor.fill_(0xAB)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(weight: MemoryWeight, num_rows: int) -> MemoryWeight:
    """Return the same weight in pieces of about `num_rows`."""
    total, num_columns = weight.shape
    step = rows_per_tile(num_columns, num_rows * num_columns)
    tensors = weight.held[0].tensors
    pieces = []
    for first in range(0, total, step):
        last = min(first + step, total)
        codes = tensors["weight"][first * num_columns // 2 : -(-last * num_columns // 2)]
        absmax = tensors["absmax"][first * num_columns // 64 : -(-last * num_columns // 64)]
        pieces.append(Piece(first, last - first, {"weight": codes, "absmax": absmax}))
    return MemoryWeight(weight.name, weight.kind, weight.shape, weight.small, tuple(pieces))


def numerics(compute: torch.dtype, *, is_exact: bool = False) -> LinearNumerics:
    return LinearNumerics(compute, CPU, is_exact)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_multiplies_with_the_decoded_weight(shape: tuple[int, int], compute: torch.dtype, has_bias: bool) -> None:
    weight = encode("weight", random(*shape))
    bias = random(shape[0], seed=2).to(compute) if has_bias else None
    x = random(2, 5, shape[1], seed=3).to(compute)
    expected = x.float() @ decode(weight).T + (bias.float() if bias is not None else 0)
    for source in (weight, cut(weight, 40)):
        out = build_nf4(source, bias, numerics(compute))(x)
        assert out.dtype == compute
        tolerance = 1e-5 if compute is torch.float32 else 6e-3
        assert (out.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_exact", [False, True])
def test_streamed_equals_resident_bit_for_bit(shape: tuple[int, int], compute: torch.dtype, is_exact: bool) -> None:
    weight = cut(encode("weight", random(*shape)), 40)
    bias = random(shape[0], seed=2).to(compute)
    resident = build_nf4(weight, bias, numerics(compute, is_exact=is_exact))
    streamed = build_nf4(StreamedWeight(weight), bias, numerics(compute, is_exact=is_exact))
    for num_rows in (1, 3, 16, 70):
        x = random(num_rows, shape[1], seed=num_rows).to(compute)
        assert torch.equal(streamed(x), resident(x))


@pytest.mark.parametrize("compute", COMPUTE)
def test_without_compiled_kernels_tiles_are_multiplied(compute: torch.dtype) -> None:
    weight = encode("weight", random(97, 128))
    linear = TiledNf4Linear(cut(weight, 40), None, numerics(compute, is_exact=True))
    x = random(5, 128, seed=3).to(compute)
    expected = x.float() @ decode(weight).T
    assert (linear(x).float() - expected).norm() <= 6e-3 * expected.norm()
    assert torch.equal(linear(x[:1]), linear(x)[:1])


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_s_layer_multiplies_with_the_decoded_weight_wherever_pieces_are_cut(
    shape: tuple[int, int], compute: torch.dtype
) -> None:
    weight, bias = encode("weight", random(*shape)), random(shape[0], seed=2).to(compute)
    pieces = cut(weight, 40)
    resident, streamed = (CudaNf4Linear(w, bias, numerics(compute)) for w in (pieces, StreamedWeight(pieces)))
    for num_rows in (1, 16):
        x = random(num_rows, shape[1], seed=num_rows).to(compute)
        expected = x.float() @ decode(weight).T + bias.float()
        assert (resident(x).float() - expected).norm() <= 6e-3 * expected.norm()
        assert torch.equal(streamed(x), resident(x))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(COMPUTE), st.integers(1, 100), st.sampled_from([48, 64, 192, 100]))
def test_exact_rows_have_the_same_bits_in_any_company(
    data: st.DataObject, compute: torch.dtype, num_out: int, num_in: int
) -> None:
    linear = build_nf4(encode("weight", random(num_out, num_in)), None, numerics(compute, is_exact=True))
    x = random(40, num_in, seed=5).to(compute)
    order = torch.tensor(data.draw(st.permutations(range(40))))[: data.draw(st.integers(1, 40))]
    assert torch.equal(linear(x[order]), linear(x)[order])


@pytest.mark.usefixtures("build")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 12),
    st.sampled_from(COMPUTE),
    st.booleans(),
    st.integers(0, 9),
)
def test_compiled_products_are_those_of_the_decoded_weight(
    num_rows: int, num_out: int, num_blocks: int, compute: torch.dtype, has_bias: bool, seed: int
) -> None:
    weight = encode("weight", random(num_out, 64 * num_blocks, seed=seed))
    bias = random(num_out, seed=seed + 1).to(compute) if has_bias else None
    x = random(num_rows, 64 * num_blocks, seed=seed + 2).to(compute)
    products, shift = x.double() @ decode(weight).double().T, 0.0 if bias is None else bias.double()
    size = x.double().norm(dim=1)[:, None] * decode(weight).double().norm(dim=1)
    error = CompiledNf4Linear(weight, bias)(x).double() - products - shift
    assert bool((error.abs() <= TOLERANCE[compute] * (size + products.abs() + torch.as_tensor(shift).abs())).all())


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("compute", COMPUTE)
def test_compiled_bits_depend_neither_on_company_nor_on_threads_nor_on_pieces(compute: torch.dtype) -> None:
    weight = encode("weight", random(333, 704))
    layers = [CompiledNf4Linear(source, None) for source in (weight, cut(weight, 7), cut(weight, 100))]
    x = random(130, 704, seed=4).to(compute)
    expected, before = layers[0](x), torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for start, stop in [(0, 1), (1, 3), (5, 9), (60, 72), (3, 19), (0, 64), (1, 129)]:
            for layer in layers:
                assert torch.equal(layer(x[start:stop]), expected[start:stop]), (start, stop)
    torch.set_num_threads(before)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("compute", COMPUTE)
def test_compiled_products_take_rows_that_do_not_follow_each_other_in_memory(compute: torch.dtype) -> None:
    linear = CompiledNf4Linear(encode("weight", random(20, 64)), None)
    x = random(64, 5).to(compute).t()
    assert torch.equal(linear(x), linear(x.contiguous()))


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("compute", COMPUTE)
def test_what_is_no_number_stays_in_its_row(compute: torch.dtype) -> None:
    linear = CompiledNf4Linear(encode("weight", random(20, 128)), None)
    x = random(14, 128).to(compute)
    expected = linear(x)
    x[3, 5] = torch.nan
    out = linear(x)
    assert bool(out[3].isnan().all())
    assert torch.equal(out[4:], expected[4:])


def test_the_layer_follows_library_dtype_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = encode("weight", random(32, 64))
    kind = CompiledNf4Linear if native.library() else TiledNf4Linear
    for compute in COMPUTE:
        assert isinstance(build_nf4(weight, None, numerics(compute)), kind)
    assert isinstance(build_nf4(weight, None, numerics(torch.float16)), TiledNf4Linear)
    assert isinstance(build_nf4(encode("weight", random(32, 48)), None, numerics(torch.bfloat16)), TiledNf4Linear)
    monkeypatch.setattr("worker.native.nf4.library", lambda: None)
    assert isinstance(build_nf4(weight, None, numerics(torch.float32)), TiledNf4Linear)


@pytest.mark.parametrize("compute", COMPUTE)
def test_absmaxes_quantized_once_are_multiplied_too(compute: torch.dtype) -> None:
    weight = encode("weight", random(48, 128))
    (piece,) = weight.held
    absmax = random(96, seed=8).abs()
    plain = MemoryWeight("weight", Precision.NF4, (48, 128), {}, (Piece(0, 48, {**piece.tensors, "absmax": absmax}),))
    x = random(3, 128, seed=1).to(compute)
    expected = x.float() @ decode(plain).T
    out = build_nf4(plain, None, numerics(compute))(x).float()
    assert (out - expected).norm() <= 6e-3 * expected.norm()
