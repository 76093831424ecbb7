"""NF4 weights: the same bits as bitsandbytes gives, fast and on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.model_spec import Precision
from worker.quantization import nf4
from worker.quantization.nf4 import decode, dynamic_map, encode
from worker.stored_weight import MemoryWeight, Piece


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, since bitsandbytes' sum over absmaxes depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_bitsandbytes(weight: Tensor) -> None:
    codes, state = bitsandbytes.quantize_4bit(
        weight.float().contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = encode("weight", weight)
    (piece,) = ours.held
    assert torch.equal(piece.tensors["weight"], codes.flatten())
    assert torch.equal(ours.small["nested_offset"], state.offset)
    assert torch.equal(piece.tensors["absmax"], state.absmax)
    assert torch.equal(ours.small["nested_absmax"], state.state2.absmax)


SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 200))


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e20]))
@example((1, 1), 0, 1.0)
@example((6, 64), 0, 1.0)
def test_encodes_random_weights_as_bitsandbytes_does(shape: tuple[int, int], seed: int, size: float) -> None:
    assert_equals_bitsandbytes(random(*shape, seed=seed) * size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200))
def test_encodes_any_floats_as_bitsandbytes_does(values: list[float]) -> None:
    assert_equals_bitsandbytes(torch.tensor(values)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encodes_large_weights_of_every_dtype_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    assert_equals_bitsandbytes((random(1500, 1000) * 0.02).to(dtype))
    assert_equals_bitsandbytes((random(600, 3008) * 0.02).t().to(dtype))


def test_midpoints_and_their_neighbours_get_the_codes_that_bitsandbytes_gives() -> None:
    values = torch.tensor(nf4.VALUES)
    ties = (values[1:] + values[:-1]) / 2
    around = [ties, ties.nextafter(torch.tensor(-2.0)), ties.nextafter(torch.tensor(2.0)), values, -values]
    rows = torch.cat([torch.nn.functional.pad(row, (64 - row.numel(), 0), value=1.0)[None] for row in around])
    for factor in (1.0, 0.37, 3e-5):
        assert_equals_bitsandbytes(rows * factor)


def test_blocks_of_zeros_and_of_the_smallest_floats_are_encoded_as_bitsandbytes_does() -> None:
    weight = torch.zeros(20, 64)
    assert_equals_bitsandbytes(weight)
    weight[3], weight[5, 7], weight[9, 1] = 1e-42, -1e-45, -3e38
    assert_equals_bitsandbytes(weight)


def test_bytes_do_not_depend_on_threads() -> None:
    weight = random(2100, 1030)
    alone = encode("weight", weight)
    torch.set_num_threads(2)
    among = encode("weight", weight)
    for one, other in zip(tensors_of(alone), tensors_of(among), strict=True):
        assert torch.equal(one, other)


def tensors_of(weight: MemoryWeight) -> list[Tensor]:
    return [*weight.small.values(), *weight.held[0].tensors.values()]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6))
def test_decodes_as_bitsandbytes_does(num_rows: int, num_blocks: int) -> None:
    weight = random(num_rows, num_blocks * 64, seed=num_rows)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(decode(encode("weight", weight)), bitsandbytes.dequantize_4bit(codes, state))


def test_pieces_decode_as_the_whole_does() -> None:
    whole = encode("weight", random(700, 48))
    pieces = tuple(rows_of(whole, first, min(first + 348, 700)) for first in (0, 348, 696))
    cut = MemoryWeight("weight", Precision.NF4, whole.shape, whole.small, pieces)
    assert torch.equal(decode(cut), decode(whole))


def rows_of(whole: MemoryWeight, first: int, last: int) -> Piece:
    tensors, num_columns = whole.held[0].tensors, whole.shape[1]
    codes = tensors["weight"][first * num_columns // 2 : last * num_columns // 2]
    absmax = tensors["absmax"][first * num_columns // 64 : last * num_columns // 64]
    return Piece(first, last - first, {"weight": codes, "absmax": absmax})


def test_absmaxes_quantized_once_are_taken_as_they_are() -> None:
    weight = random(30, 128)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    piece = Piece(0, 30, {"weight": codes.flatten(), "absmax": state.absmax})
    stored = MemoryWeight("weight", Precision.NF4, (30, 128), {}, (piece,))
    assert torch.equal(decode(stored), bitsandbytes.dequantize_4bit(codes, state))


def test_the_map_of_nested_codes_is_bitsandbytes_own() -> None:
    assert torch.equal(dynamic_map(), bitsandbytes.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.VALUES), bitsandbytes.get_4bit_type("nf4", device="cpu"))
