"""8-bit layers: the same bits in any company and on every path, and what happens to outliers, zeros and infinities."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.model_spec import Precision
from worker.linear import LinearNumerics, Scratch, build_linears, int8, int8_products
from worker.linear.int8 import RowQuantizer
from worker.quantization.encode import encode
from worker.stored_weight import MemoryWeight, Piece, StoredWeight

NUMERICS = LinearNumerics(torch.float32, torch.device("cpu"), is_exact=True)
SHAPES = [(1, 1), (3, 5), (48, 64), (17, 33), (100, 130), (96, 1030), (256, 2048)]
PATHS = ["resident", "streamed", "fallback"]


@dataclass(frozen=True, slots=True)
class ReusingWeight(MemoryWeight):
    """A streamed weight: each piece overwrites the memory of the one before."""

    @property
    def is_streamed(self) -> bool:
        return True

    def pieces(self) -> Iterator[Piece]:
        ring = torch.zeros(max(piece.num_rows for piece in self.held), self.shape[1], dtype=torch.int8)
        for piece in self.held:
            view = ring[: piece.num_rows].copy_(piece.tensors["weight"])
            yield replace(piece, tensors={"weight": view})
            ring.fill_(99)


def stored(num_rows: int, num_columns: int, seed: int = 0) -> MemoryWeight:
    """Return an encoded weight with random parameters."""
    return encode("layer", random(num_rows, num_columns, seed=seed), Precision.INT8)


def streamed(weight: MemoryWeight, rows_per_piece: int) -> ReusingWeight:
    """Return the same weight, as if it came from a disk in pieces."""
    codes = weight.held[0].tensors["weight"]
    pieces = [
        Piece(first, len(part), {"weight": part})
        for first, part in zip(range(0, len(codes), rows_per_piece), torch.split(codes, rows_per_piece), strict=True)
    ]
    return ReusingWeight(weight.name, weight.kind, weight.shape, weight.small, tuple(pieces))


def build(path: str, weights: list[MemoryWeight], biases: list[Tensor | None] | None = None) -> list[nn.Module]:
    """Return the layers of one path."""
    biases = biases or [None] * len(weights)
    with pytest.MonkeyPatch.context() as patch:
        if path == "fallback":
            patch.setattr(int8_products, "has_correct_packs", lambda: False)
        taken: Sequence[StoredWeight] = [streamed(weight, 7) for weight in weights] if path == "streamed" else weights
        return build_linears(taken, biases, NUMERICS, Scratch())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Return inputs of which every third row has outliers, every fifth is zero."""
    x = random(num_rows, num_columns, seed=seed)
    x[::3, seed % num_columns] *= 100
    x[::6, -1] = -3e4
    x[::5] = 0
    return x


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_a_product_differs_from_the_float_one_by_the_inputs_rounding(path: str) -> None:
    weight, x = stored(100, 512), random(20, 512, seed=1)
    dense = weight.held[0].tensors["weight"].double() * weight.small["scale"].double()[:, None]
    (layer,) = build(path, [weight])
    wanted = x.double() @ dense.T
    assert ((layer(x) - wanted).norm() / wanted.norm()).item() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 15, 16, 17, 70, 300])
@pytest.mark.usefixtures("num_threads")
def test_streamed_and_fallback_have_the_bits_of_resident(shape: tuple[int, int], num_rows: int) -> None:
    weight, x = stored(*shape), with_outliers(num_rows, shape[1])
    (wanted,) = [layer(x) for layer in build("resident", [weight])]
    assert wanted.shape == (num_rows, shape[0])
    for path in ("streamed", "fallback"):
        assert torch.equal(build(path, [weight])[0](x), wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("num_threads")
def test_sums_of_extremes_do_not_saturate(path: str) -> None:
    num_columns = 57344  # BLOOM-176B's longest sums
    codes = torch.full((9, num_columns), 127, dtype=torch.int8)
    codes[::2] = -127
    weight = MemoryWeight(
        "layer", Precision.INT8, (9, num_columns), {"scale": torch.ones(9)}, (Piece(0, 9, {"weight": codes}),)
    )
    (layer,) = build(path, [weight])
    wanted = torch.full((1, 9), 127.0 * 127 * num_columns)
    wanted[:, ::2] *= -1
    assert torch.equal(layer(torch.full((1, num_columns), 127 / 64.0)), wanted / 64)
    assert torch.equal(layer(torch.full((5, num_columns), -127 / 64.0)), -wanted.expand(5, -1) / 64)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATHS), st.integers(1, 300), st.integers(1, 140), st.integers(0, 10**6), st.data())
def test_a_row_has_the_same_bits_alone_as_among_others(
    path: str, num_rows: int, num_columns: int, seed: int, data: st.DataObject
) -> None:
    x = random(num_rows, num_columns, seed=seed)
    magnitudes = st.sampled_from([0.0, 1e-38, 1e-25, 1.0, 5.99, 6.0, 40.0, 3e4, 1e30])
    for row in data.draw(st.lists(st.integers(0, num_rows - 1), max_size=4)):
        x[row, data.draw(st.integers(0, num_columns - 1))] = data.draw(magnitudes)
        x[data.draw(st.integers(0, num_rows - 1))] *= data.draw(magnitudes)
    (layer,) = build(path, [stored(40, num_columns)])
    whole = layer(x)
    for row in data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=3)):
        assert torch.equal(layer(x[row : row + 1])[0].nan_to_num(7), whole[row].nan_to_num(7))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_own_row_only(path: str, bad: float) -> None:
    (layer,) = build(path, [stored(40, 64)])
    x = with_outliers(6, 64)
    clean = layer(x)
    x[2, 9] = bad
    out = layer(x)
    assert not out[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("path", PATHS)
def test_columns_brought_by_unit_rows_give_the_bits_of_digits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = [stored(48, 64, 1), stored(16, 64, 2)], random(60, 64)
    x[:, 3], x[::2, 40] = 17.0, -500.0
    num_rows = []
    outs = []
    for cost in (0, 10**6):
        monkeypatch.setattr(int8, "UNIT_COST", cost)
        layers = build(path, weights)
        outs.append([layer(x) for layer in layers])
        num_rows.append(len(RowQuantizer(NUMERICS, 64, 4, can_divide=True).quantize(x).codes))
    assert num_rows == [62, 180]
    for units, digits in zip(*outs, strict=True):
        assert torch.equal(units, digits)


def test_outliers_keep_their_precision_and_leave_the_others_theirs() -> None:
    weight, x = stored(300, 512), random(4, 512, seed=2)
    x[:, 7], x[:, 100] = 300.0, -1000.0
    dense = weight.held[0].tensors["weight"].double() * weight.small["scale"].double()[:, None]
    errors = {}
    for threshold in (6.0, 0.0, torch.inf):
        (layer,) = build_linears([weight], [None], replace(NUMERICS, outlier_threshold=threshold), Scratch())
        errors[threshold] = (layer(x) - x.double() @ dense.T).norm().item()
    assert errors[0.0] == errors[torch.inf]
    assert errors[6.0] < errors[0.0] / 50


@pytest.mark.parametrize("path", PATHS)
def test_what_stands_out_of_its_row_keeps_its_precision_below_the_threshold_too(path: str) -> None:
    weight, x = stored(300, 512), random(4, 512, seed=2) / 100
    x[1:, 7], x[2:, 100] = 3.0, -5.0
    dense = weight.held[0].tensors["weight"].double() * weight.small["scale"].double()[:, None]
    (layer,) = build(path, [weight])
    x[:, 7] += 1e-3  # which 8 bits of the row would lose
    errors = (layer(x) - x.double() @ dense.T).norm(dim=1)
    assert (errors[1:] < 1.5 * errors[0]).all()


def test_rows_of_zeros_give_the_bias() -> None:
    bias = random(40, seed=3)
    (layer,) = build("resident", [stored(40, 64)], [bias])
    assert torch.equal(layer(torch.zeros(2, 3, 64)), bias.expand(2, 3, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_layers_that_share_an_input_have_the_bits_of_layers_alone(path: str, num_rows: int) -> None:
    weights = [stored(48, 64, 1), stored(16, 64, 2), stored(33, 64, 3)]
    biases = [random(48), None, random(33)]
    x = with_outliers(num_rows, 64)
    together = build(path, weights, biases)
    for layer, weight, bias in zip(together, weights, biases, strict=True):
        (alone,) = build("resident", [weight], [bias])
        assert torch.equal(layer(x), alone(x))


def test_large_weights_are_packed_in_parts_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = [stored(48, 64, 1), stored(80, 64, 2)], with_outliers(5, 64)
    wanted = [layer(x) for layer in build("resident", weights)]
    monkeypatch.setattr(int8_products, "PACK_BYTES", 20 * 64)
    held = [MemoryWeight(w.name, w.kind, w.shape, w.small, streamed(w, 16).held) for w in weights]
    for layer, out in zip(build("resident", held), wanted, strict=True):
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("num_rows", [1, 40])
def test_bf16_inputs_give_bf16_outputs(num_rows: int) -> None:
    weight, x = stored(48, 64), with_outliers(num_rows, 64).bfloat16()
    (layer,) = build_linears([weight], [None], replace(NUMERICS, compute=torch.bfloat16), Scratch())
    (wide,) = build("resident", [weight])
    assert torch.equal(layer(x), wide(x.float()).bfloat16())


@pytest.mark.parametrize("magnitude", [6.0, 6.5, 1e3, 1e30])
def test_two_digits_hold_outliers_to_sixteen_bits(magnitude: float) -> None:
    x = torch.zeros(1, 64)
    x[0, :5] = torch.tensor([1.0, -1.0, 0.5, -0.37, 0.2501]) * magnitude
    quantized = RowQuantizer(replace(NUMERICS, outlier_threshold=1.0), 64, 4, can_divide=True).quantize(x)
    assert quantized.outliers is not None
    high, low = (quantized.codes[1:].double() - 128).unbind()
    restored = (256 * high + low) * quantized.outliers.scale.double()
    torch.testing.assert_close(restored, x.double(), rtol=0, atol=magnitude / 60_000)


def test_a_thousand_passes_leave_nothing_behind() -> None:
    layers = build("resident", [stored(48, 64, 1), stored(16, 64, 2)])
    x = with_outliers(9, 64)
    counts = []
    for _ in range(2):
        for _ in range(500):
            for layer in layers:
                layer(x)
        gc.collect()
        counts.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert counts[0] == counts[1]
