"""The compiled 8-bit layers against those of torch's operators, which they must equal bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.linear import int8_compiled
from worker.linear.base import LinearNumerics
from worker.linear.int8 import Int8Group
from worker.linear.int8_compiled import CompiledInt8Group, has_correct_kernel, is_compiled
from worker.native import library as native
from worker.native.library import library
from worker.quantization import int8
from worker.stored_weight import MemoryWeight, Piece

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built here")
CPU = torch.device("cpu")
NUMERICS = LinearNumerics(torch.float32, CPU, is_exact=False)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.integers(2, 300),
    st.sampled_from([0.1, 1.0, 3.0, 50.0]),
    st.sampled_from([6.0, 0.0, 0.5]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_compiled_layers_equal_those_of_torch_bit_for_bit(
    num_rows: int, sizes: list[int], num_columns: int, size: float, threshold: float, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [int8.encode("w", random(generator, num_out, num_columns)) for num_out in sizes]
    biases = [random(generator, num_out) if has_bias else None for num_out in sizes]
    numerics = LinearNumerics(torch.float32, CPU, is_exact=True, outlier_threshold=threshold)
    x = random(generator, 1, num_rows, num_columns) * size * random(generator, num_columns).exp()
    compiled = CompiledInt8Group(weights, biases, numerics).multiply(x)
    expected = Int8Group(weights, biases, numerics).multiply(x)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("num_columns", [2, 63, 64, 65, 2048])
@pytest.mark.parametrize("codes", [(127, -127), (-127, -127), (127, 127)])
def test_extremes_are_summed_exactly(num_columns: int, codes: tuple[int, int]) -> None:
    weight = torch.full((17, num_columns), codes[0], dtype=torch.int8)
    held = MemoryWeight("w", int8.Precision.INT8, (17, num_columns), {"scale": torch.ones(17)}, (piece(weight),))
    x = torch.full((3, num_columns), codes[1] / 127 * 5.0)
    (out,) = CompiledInt8Group([held], [None], NUMERICS).multiply(x)
    scale = torch.tensor(5.0) / 127
    assert torch.equal(out, (torch.tensor(float(codes[0] * codes[1] * num_columns)) * scale).expand(3, 17))


def piece(codes: Tensor) -> Piece:
    return Piece(0, len(codes), {"weight": codes})


def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    group = CompiledInt8Group([int8.encode("w", random(generator, 100, 2000))], [None], NUMERICS)
    x = random(generator, 70, 2000) * 4
    (among,) = group.multiply(x)
    alone = torch.cat([group.multiply(row[None])[0] for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (on_three,) = group.multiply(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(among, alone)
    assert torch.equal(among, on_three)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_spoils_its_own_row_only(value: float) -> None:
    generator = torch.Generator().manual_seed(2)
    group = CompiledInt8Group([int8.encode("w", random(generator, 20, 100))], [None], NUMERICS)
    x = random(generator, 15, 100)
    (expected,) = group.multiply(x)
    x[3, 7] = value
    (out,) = group.multiply(x)
    assert out[3].isnan().all()
    others = [row for row in range(15) if row != 3]
    assert torch.equal(out[others], expected[others])


def test_pieces_are_packed_as_one_weight() -> None:
    codes = torch.arange(-64, 63, dtype=torch.int8).repeat(5)[:600].view(20, 30).contiguous()
    small = {"scale": torch.linspace(1, 2, 20)}
    pieces = (Piece(0, 7, {"weight": codes[:7]}), Piece(7, 13, {"weight": codes[7:]}))
    whole = MemoryWeight("w", int8.Precision.INT8, (20, 30), small, (piece(codes),))
    cut = MemoryWeight("w", int8.Precision.INT8, (20, 30), small, pieces)
    x = torch.linspace(-3, 3, 60).view(2, 30)
    results = [CompiledInt8Group([weight], [None], NUMERICS).multiply(x)[0] for weight in (whole, cut)]
    assert torch.equal(*results)


def test_rows_that_do_not_follow_each_other_in_memory_are_taken() -> None:
    group = CompiledInt8Group([int8.encode("w", torch.eye(8))], [None], NUMERICS)
    x = torch.arange(32.0).view(8, 4).t()
    assert torch.equal(group.multiply(x)[0], group.multiply(x.contiguous())[0])


@pytest.mark.parametrize("path", sorted(Path(native.__file__).parent.glob("_*.so")), ids=lambda path: path.name[:8])
def test_every_build_that_this_machine_runs_gives_the_same_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not path.name.startswith(tuple(f"_{name}." for name in native._builds())):
        pytest.skip("not for this CPU")
    monkeypatch.setattr(native, "library", lambda: ctypes.CDLL(str(path)))
    generator = torch.Generator().manual_seed(3)
    weight = int8.encode("w", random(generator, 77, 130))
    compiled, expected = (group([weight], [None], NUMERICS) for group in (CompiledInt8Group, Int8Group))
    for num_rows in (1, 2, 3, 12, 13, 64):
        x = random(generator, num_rows, 130) * 3
        assert torch.equal(compiled.multiply(x)[0], expected.multiply(x)[0])


def test_the_kernel_is_correct_here_and_taken_for_resident_fp32() -> None:
    weight = int8.encode("w", torch.ones(4, 8))
    assert has_correct_kernel()
    assert is_compiled(weight, NUMERICS) is not torch.cpu._is_amx_tile_supported()
    assert not is_compiled(weight, LinearNumerics(torch.bfloat16, CPU, is_exact=False))


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongGroup(CompiledInt8Group):
        def multiply(self, x: Tensor) -> list[Tensor]:
            return [one + 1e-6 for one in super().multiply(x)]

    monkeypatch.setattr(int8_compiled, "CompiledInt8Group", WrongGroup)
    assert not has_correct_kernel.__wrapped__()
