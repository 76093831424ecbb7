"""Layers that multiply the same input: the first one called computes them all, the others hand out.

transformers' blocks call such layers one after the other with the same tensor. Covers that bookkeeping only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class LinearGroup(Protocol):
    """Layers that are computed together."""

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Map `[..., in]` to one result per layer."""
        ...


class SharedInput:
    """Keeps the results of one input until each layer has taken its own, and the input as long, to recognise it."""

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        self._input: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return the result of layer `index`; each is given once, so asking again computes again."""
        if x is not self._input or index not in self._results:
            self._input, self._results = None, {}
            self._results = dict(enumerate(self.group.multiply(x)))
            self._input = x
        result = self._results.pop(index)
        if not self._results:
            self._input = None
        return result


class SharingLinear(nn.Module):
    """One of the layers of a SharedInput."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self._index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return self.shared.take(self._index, x)
