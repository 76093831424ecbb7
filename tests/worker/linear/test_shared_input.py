"""Layers that share an input compute once, and forget the input when all have been called."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from worker.linear.shared_input import SharedInput, SharingLinear


class Recorder:
    """Computes `x + index` for three layers and counts how often."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.error: Exception | None = None

    def multiply(self, x: Tensor) -> list[Tensor]:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return [x + index for index in range(3)]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def layers(recorder: Recorder) -> list[SharingLinear]:
    shared = SharedInput(recorder)
    return [SharingLinear(shared, index) for index in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_one_computation_serves_all_in_any_order(
    recorder: Recorder, layers: list[SharingLinear], order: tuple[int, ...]
) -> None:
    for value in (1.0, 2.0):
        x = torch.tensor([value])
        assert [layers[index](x).item() for index in order] == [value + index for index in order]
    assert recorder.num_calls == 2


def test_another_input_is_computed_anew_though_some_had_not_taken_theirs(layers: list[SharingLinear]) -> None:
    first, second = torch.tensor([1.0]), torch.tensor([10.0])
    assert layers[0](first).item() == 1
    assert layers[1](second).item() == 11
    assert layers[1](first).item() == 2
    assert layers[2](second).item() == 12


def test_asking_twice_computes_twice(recorder: Recorder, layers: list[SharingLinear]) -> None:
    x = torch.tensor([1.0])
    assert layers[0](x).item() == layers[0](x).item() == 1
    assert recorder.num_calls == 2


def test_equal_values_in_another_tensor_are_another_input(recorder: Recorder, layers: list[SharingLinear]) -> None:
    layers[0](torch.tensor([1.0]))
    layers[1](torch.tensor([1.0]))
    assert recorder.num_calls == 2


def test_nothing_is_kept_after_the_last(layers: list[SharingLinear]) -> None:
    x = torch.tensor([1.0])
    kept = weakref.ref(x)
    for layer in layers:
        layer(x)
    del x
    assert kept() is None


def test_a_failure_keeps_nothing_and_the_next_call_computes(recorder: Recorder, layers: list[SharingLinear]) -> None:
    x = torch.tensor([1.0])
    layers[0](x)
    kept = weakref.ref(x)
    del x
    recorder.error = OSError("disk")
    with pytest.raises(OSError, match="disk"):
        layers[1](torch.tensor([2.0]))
    assert kept() is None
    recorder.error = None
    assert layers[1](torch.tensor([1.0])).item() == 2
