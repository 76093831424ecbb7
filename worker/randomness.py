"""Counter-based random numbers: the number at (seed, position) is a pure function of the two.

Nothing is stored and nothing advances, so a sequence's randomness does not depend on its company, on preemption or on
replay. The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; known-answer vectors from its reference implementation, Random123).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit words, kept in 64 bits so that products do not wrap

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_NUM_ROUNDS = 10


def philox(counter: Words, key: Words) -> Words:
    """Return `[4, n]` random words for counters `[4, n]` under keys `[2, n]`; all words below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> _WORD_BITS) ^ c1 ^ k0, (product0 >> _WORD_BITS) ^ c3 ^ k1
        c1, c3 = product1 & _LOW_WORD, product0 & _LOW_WORD
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW_WORD, (k1 + _KEY_INCREMENTS[1]) & _LOW_WORD
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return one number in [0, 1), a multiple of 2**-53, for each (seed, position); 0 <= seed, position < 2**64."""
    key = _words(seeds)
    counter = np.concatenate((_words(positions), np.zeros_like(key)))
    w0, w1, _, _ = philox(counter, key)
    bits = ((w0 << _WORD_BITS) | w1) >> np.uint64(11)
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers


def _words(values: Sequence[int]) -> Words:
    wide = np.array(values, dtype=np.uint64)
    return np.stack((wide & _LOW_WORD, wide >> _WORD_BITS))
