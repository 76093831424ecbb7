"""Linear layers over weights as stored.

Covers which product computes them; what brings weights is `worker.stored_weight`'s seam, and `worker.numerics` chooses
dtypes.
"""

from worker.linear.base import Linear, LinearNumerics, Scratch
from worker.linear.build import build_linears

__all__ = ["Linear", "LinearNumerics", "Scratch", "build_linears"]
