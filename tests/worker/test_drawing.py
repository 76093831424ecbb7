"""Filters against transformers' warpers; draws against exact probabilities."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.request import SamplingParams
from worker import drawing
from worker.drawing import draw, log_normalizers, masses
from worker.randomness import uniforms

NUM_DRAWS = 20_000


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draw_many(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return NUM_DRAWS tokens from one row of logits."""
    chances = torch.from_numpy(uniforms([params.seed] * NUM_DRAWS, range(NUM_DRAWS)))
    return draw(logits.expand(NUM_DRAWS, -1), [params] * NUM_DRAWS, chances)


def reference_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return what transformers samples from."""
    warpers: list[transformers.LogitsProcessor] = [transformers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(transformers.MinPLogitsWarper(params.min_p))
    scores = logits.clone()
    for warper in warpers:
        scores = warper(torch.empty(1, 0, dtype=torch.int64), scores)
    return scores.double().softmax(dim=1)


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Return the statistic over tokens expected at least 5 times (the rest pooled), and its degrees of freedom."""
    expected = probabilities * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    common = expected >= 5
    pairs = [(observed[common], expected[common])]
    if expected[~common].sum() >= 5:
        pairs.append((observed[~common].sum()[None], expected[~common].sum()[None]))
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in pairs)
    return statistic, sum(len(o) for o, _ in pairs) - 1


SETTINGS = (
    SamplingParams(seed=1),
    SamplingParams(temperature=0.5, seed=2),
    SamplingParams(temperature=3.0, seed=3),
    SamplingParams(top_k=7, seed=4),
    SamplingParams(top_p=0.8, seed=5),
    SamplingParams(min_p=0.05, seed=6),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, seed=7),
)


@pytest.mark.parametrize("params", SETTINGS)
def test_draws_follow_the_probabilities_of_transformers(params: SamplingParams) -> None:
    logits = random_logits(1, 60)
    probabilities = reference_probabilities(logits, params)[0]
    tokens = draw_many(logits, params)
    assert not probabilities[tokens].eq(0).any()
    statistic, freedom = chi_square(tokens, probabilities)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 5


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(2, 3000),
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(0), st.integers(1, 4000)),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_the_tokens_that_transformers_keeps(
    seed: int, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(1, vocab_size, seed)
    expected = reference_probabilities(logits, params)[0]
    mass = masses(logits, torch.tensor([temperature]))
    drawing._apply_filters(mass, [params])
    actual = mass[0].double() / mass.sum()
    if (actual > 0).sum() == (expected > 0).sum():
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    else:  # one token at a border may fall to either side: sums of transformers are rounded, ours are exact
        assert abs(int((actual > 0).sum() - (expected > 0).sum())) == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, len(SETTINGS) - 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_token_of_a_row_is_the_same_in_any_company(choices: list[int], random: object) -> None:
    vocab_size = 1111
    params = [SETTINGS[choice] for choice in choices]
    logits = random_logits(len(params), vocab_size)
    chances = torch.from_numpy(uniforms([p.seed for p in params], range(len(params))))
    together = draw(logits, params, chances).tolist()
    order = list(range(len(params)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = draw(logits[order], [params[row] for row in order], chances[order]).tolist()
    alone = [draw(logits[[row]], params[row : row + 1], chances[[row]]).item() for row in order]
    assert shuffled == alone == [together[row] for row in order]


def test_tiles_do_not_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, chances = random_logits(40, 500), torch.linspace(0, 0.999, 40, dtype=torch.float64)
    params = [SETTINGS[row % len(SETTINGS)] for row in range(40)]
    whole = draw(logits, params, chances)
    monkeypatch.setattr(drawing, "_TILE_ELEMENTS", 1500)
    assert draw(logits, params, chances).equal(whole)


def test_masses_do_not_depend_on_where_a_row_stands_in_memory() -> None:
    logits = random_logits(9, 1237)
    temperatures = torch.full((9,), 0.7)
    whole = masses(logits, temperatures)
    for row in range(9):
        assert masses(logits[row : row + 1].clone(), temperatures[:1]).equal(whole[row : row + 1])


def test_wide_nucleus_is_found_without_being_among_the_best_256() -> None:
    logits = torch.zeros(2, 5000)
    logits[0] -= torch.arange(5000) * 1e-4
    logits[1, 17] = 50.0
    kept = masses(logits, torch.ones(2))
    drawing._apply_filters(kept, [SamplingParams(top_p=0.5), SamplingParams(top_p=0.5)])
    probabilities = logits[0].double().softmax(0)
    assert (kept[0] > 0).sum() == int((probabilities.cumsum(0) - probabilities < 0.5).sum())
    assert (kept[1] > 0).nonzero()[:, 0].tolist() == [17]


def test_ties_at_a_border_are_all_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.7), SamplingParams(min_p=0.36)):
        kept = masses(logits, torch.ones(1))
        drawing._apply_filters(kept, [params])
        assert (kept[0] > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-300, 1e-10, 1e-3])
def test_coldest_temperatures_take_the_best_token(temperature: float) -> None:
    logits = random_logits(5, 100)
    tokens = draw(logits, [SamplingParams(temperature=temperature)] * 5, torch.full((5,), 0.999, dtype=torch.float64))
    assert tokens.equal(logits.argmax(dim=1))


def test_forbidden_and_vanishing_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -200.0, 0.0, -torch.inf]])
    for chance, token in ((0.0, 1), (0.4999999, 1), (0.5, 4), (1 - 2**-53, 4)):
        drawn = draw(logits, [SamplingParams()], torch.tensor([chance], dtype=torch.float64))
        assert drawn.tolist() == [token]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 4096, 4097, 262_144])
def test_sum_of_masses_fits_even_if_all_tokens_are_equally_likely(vocab_size: int) -> None:
    mass = masses(torch.zeros(1, vocab_size), torch.ones(1))
    assert int(mass.sum()) == vocab_size * int(mass[0, 0]) <= 2**62
    last = draw(torch.zeros(1, vocab_size), [SamplingParams()], torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert last.tolist() == [vocab_size - 1]


def test_normalizers_are_those_of_log_softmax() -> None:
    logits = random_logits(4, 5000)
    actual = logits.double() - log_normalizers(logits)[:, None]
    torch.testing.assert_close(actual, logits.double().log_softmax(dim=1), rtol=0, atol=1e-6)
