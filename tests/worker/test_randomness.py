"""Counter-based random numbers, against published vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.randomness import philox, uniforms

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, expected
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
WORD64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_generator_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert tuple(words[:, 0].tolist()) == expected


def test_number_is_made_of_the_first_two_words() -> None:
    w0, w1, _, _ = KNOWN_ANSWERS[0][2]
    assert uniforms([0], [0]).tolist() == [(w0 * 2**32 + w1) // 2**11 / 2**53]


@given(st.lists(st.tuples(WORD64, st.integers(0, 2**32)), min_size=1, max_size=20))
def test_number_does_not_depend_on_its_company(pairs: list[tuple[int, int]]) -> None:
    together = uniforms([seed for seed, _ in pairs], [position for _, position in pairs])
    alone = [uniforms([seed], [position])[0] for seed, position in pairs]
    assert together.tolist() == alone
    assert all(0 <= number < 1 for number in alone)


def test_every_bit_of_the_seed_matters() -> None:
    seeds = [0, *(1 << bit for bit in range(64))]
    assert len(set(uniforms(seeds, [5] * len(seeds)).tolist())) == len(seeds)


def test_numbers_of_neighbouring_seeds_and_positions_are_uniform() -> None:
    positions, seeds = np.divmod(np.arange(100_000), 1000)
    numbers = uniforms(seeds.tolist(), positions.tolist())
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = float(((counts - 1000.0) ** 2 / 1000.0).sum())
    assert 55 < chi_square < 160  # 99 degrees of freedom: outside with probability below 0.001
    assert abs(float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])) < 0.01
