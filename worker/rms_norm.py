"""RMS norms in one operation.

transformers writes an RMS norm as seven operations, whose calls take longer than their arithmetic at few rows. torch's
own takes the same steps with the same bits; the compiled kernel sums in another order, and takes a tenth of the time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from worker.native.rows import rms_norm


class RMSNorm(nn.Module):
    """Any family's RMS norm, which it takes its weight and epsilon from."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = original.weight, original.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to the same shape."""
        out = rms_norm(x, self.weight, self.epsilon)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon) if out is None else out


def replace_rms_norms(module: nn.Module) -> None:
    """Replace every RMS norm of transformers' within `module`; a norm by another definition keeps its place."""
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            setattr(module, name, RMSNorm(child))
        else:
            replace_rms_norms(child)
