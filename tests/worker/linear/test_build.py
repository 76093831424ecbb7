"""Linear layers of every precision against float64 products, and the independence of their rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.errors import ConfigurationError
from cluster.model_spec import Precision
from worker.linear import Linear, LinearNumerics, Scratch, build_linears
from worker.linear.build import check_rows
from worker.linear.floating import SCRATCH_BYTES, FixedRowsLinear, PieceLinear, PlainLinear
from worker.numerics import DTYPES, choose_compute_dtype, has_native_bf16
from worker.quantization.encode import encode

PRECISIONS = [Precision.FP32, Precision.BF16, Precision.FP16]
CPU = torch.device("cpu")
SHAPES = [(96, 64), (100, 72), (1, 16), (17, 33), (576, 1536), (2048, 2048)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(
    weight: Tensor, bias: Tensor | None, precision: Precision, *, is_exact: bool = False, is_bf16_native: bool = False
) -> tuple[nn.Module, torch.dtype]:
    compute = choose_compute_dtype(precision, CPU, is_bf16_native=is_bf16_native)
    numerics = LinearNumerics(compute, CPU, is_exact)
    (built,) = build_linears([encode("layer", weight, precision)], [bias], numerics, Scratch())
    return built, compute


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_computes_the_product_of_the_rounded_weights(
    precision: Precision, shape: tuple[int, int], has_bias: bool
) -> None:
    weight = random(*shape, seed=1)
    bias = random(shape[0], seed=2) if has_bias else None
    built, _ = build(weight, bias, precision)
    x = random(2, 5, shape[1], seed=3)
    expected = x.double() @ weight.to(DTYPES[precision.value]).double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(built(x), expected.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5])
def test_keeps_leading_dimensions_for_any_number_of_rows(precision: Precision, num_rows: int) -> None:
    built, compute = build(random(12, 8), random(12), precision)
    assert built(torch.zeros(num_rows, 8, dtype=compute)).shape == (num_rows, 12)
    assert built(torch.zeros(1, num_rows, 8, dtype=compute)).shape == (1, num_rows, 12)


@pytest.mark.skipif(not has_native_bf16(), reason="this CPU has no native bf16")
def test_computes_in_bf16_where_the_processor_does() -> None:
    weight, x = random(96, 64, seed=1), random(5, 64, seed=2)
    built, compute = build(weight, None, Precision.BF16, is_bf16_native=True)
    assert compute == torch.bfloat16
    out = built(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x @ weight.T, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("compute", DTYPES.values())
@pytest.mark.parametrize("shape", [(96, 64), (33, 51)])
@pytest.mark.parametrize("is_exact", [False, True])
def test_weights_of_every_precision_are_computed_with_in_every_dtype(
    precision: Precision, compute: torch.dtype, shape: tuple[int, int], is_exact: bool
) -> None:
    weight, bias, x = random(*shape, seed=1), random(shape[0], seed=2), random(5, shape[1], seed=3).to(compute)
    numerics = LinearNumerics(compute, CPU, is_exact)
    (built,) = build_linears([encode("layer", weight, precision)], [bias], numerics, Scratch())
    out, expected = built(x), x.float() @ weight.T + bias
    assert out.dtype == compute
    error = 0.15 if precision is Precision.NF4 else 0.02
    assert (out.float() - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("num_threads")
def test_exact_rows_have_the_same_bits_in_any_company(precision: Precision, shape: tuple[int, int]) -> None:
    is_native = has_native_bf16()
    built, compute = build(random(*shape), random(shape[0]), precision, is_exact=True, is_bf16_native=is_native)
    x = random(130, shape[1], seed=4).to(compute)
    whole = built(x)
    for start, stop in [(0, 1), (1, 3), (5, 8), (7, 11), (60, 69), (3, 19), (100, 117), (0, 64), (1, 129)]:
        assert torch.equal(built(x[start:stop]), whole[start:stop]), (start, stop)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(PRECISIONS), st.integers(1, 80), st.integers(1, 80))
def test_exact_rows_do_not_depend_on_where_the_packing_cuts(
    data: st.DataObject, precision: Precision, num_out: int, num_in: int
) -> None:
    built, _ = build(random(num_out, num_in), None, precision, is_exact=True)
    x = random(40, num_in, seed=5)
    order = torch.tensor(data.draw(st.permutations(range(40))))
    count = data.draw(st.integers(1, 40))
    assert torch.equal(built(x[order[:count]]), built(x)[order[:count]])


def test_fixed_rows_make_any_library_exact() -> None:
    weight, bias, numerics = encode("layer", random(96, 64), Precision.FP32), random(96), numerics_of(is_exact=True)
    fixed, x = FixedRowsLinear(weight, bias, numerics), random(150, 64, seed=6)
    torch.testing.assert_close(fixed(x), PlainLinear(weight, bias, numerics)(x))
    for count in (1, 2, 17, 64, 65, 130):
        assert torch.equal(fixed(x[:count]), fixed(x)[:count])


def test_refuses_exactness_where_the_library_rounds_by_company() -> None:
    class Uneven(Linear):
        def multiply(self, rows: Tensor) -> Tensor:
            return rows + 1e-6 * rows.shape[0]

    with pytest.raises(ConfigurationError, match="without --exact"):
        check_rows(Uneven(8, None), torch.zeros(1, 8))


def test_layers_share_one_scratch_of_bounded_size() -> None:
    scratch = Scratch()
    weights = [encode("layer", random(rows, 1024), Precision.BF16) for rows in (100, 3000)]
    for layer in build_linears(weights, [None, None], numerics_of(), scratch):
        layer(torch.ones(1, 1024))
        assert isinstance(layer, PieceLinear)
        assert layer.scratch is scratch
    assert scratch.take(1, 1, torch.float32).untyped_storage().nbytes() == SCRATCH_BYTES


def numerics_of(*, is_exact: bool = False) -> LinearNumerics:
    return LinearNumerics(torch.float32, CPU, is_exact)
