"""The ways to multiply 8-bit codes give the same bits."""

from __future__ import annotations

import pytest
import torch

from worker.linear.int8_products import multiply_floats, multiply_on_gpu


@pytest.mark.parametrize("shape", [(64, 128), (8, 8), (100, 128), (64, 100), (33, 51), (16, 4096)])
@pytest.mark.parametrize("num_rows", [1, 5, 32, 70])
def test_a_gpu_s_product_is_exact_for_any_number_of_rows_and_columns(num_rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    signed = torch.randint(-128, 128, (num_rows, shape[1]), generator=generator).to(torch.int8)
    weight = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    expected = (signed.long() @ weight.long().T).float()
    assert torch.equal(multiply_on_gpu(signed, weight), expected)
    assert torch.equal(multiply_floats(signed, weight), expected)
