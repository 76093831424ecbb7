"""The last stage's sampler: state from headers, tokens and log probabilities out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import InvariantError
from cluster.microbatch import Epoch, SequenceSampling, StepHeader, StepId, StepResult
from cluster.request import SamplingParams, SequenceId, TokenLogprobs
from worker import sampling
from worker.sampling import Sampler

VOCAB_SIZE, HIDDEN_SIZE = 97, 8
WEIGHT = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)) * 2
GREEDY = SamplingParams(temperature=0.0)


def head(rows: Tensor) -> Tensor:
    """A head whose rows do not depend on each other, bit for bit."""
    return torch.stack([(WEIGHT * row).sum(dim=1) for row in rows])


def hidden_of(sequence_id: int, positions: range) -> Tensor:
    """Return the hidden states of a sequence's positions, as a model would: the same in any step."""
    rows = torch.empty(len(positions), HIDDEN_SIZE)
    for row, position in zip(rows, positions, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(1000 * sequence_id + position))
    return rows


@dataclass(frozen=True)
class Part:
    """A slice of a step under test."""

    sequence_id: int
    start: int
    tokens: Sequence[int]
    sampled: bool = True
    all_rows: bool = False
    change: SequenceSampling | None = None

    @property
    def num_rows(self) -> int:
        return len(self.tokens) if self.all_rows else int(self.sampled)

    @property
    def rows(self) -> Tensor:
        end = self.start + len(self.tokens)
        return hidden_of(self.sequence_id, range(end - self.num_rows, end))


def first(
    sequence_id: int, tokens: Sequence[int], params: SamplingParams, prompt_length: int | None = None, **options: bool
) -> Part:
    """A sequence's first slice."""
    prompt_length = len(tokens) if prompt_length is None else prompt_length
    change = SequenceSampling(SequenceId(sequence_id), prompt_length, params)
    return Part(sequence_id, 0, tokens, change=change, **options)


def header_of(parts: Sequence[Part], finished: Sequence[int] = ()) -> StepHeader:
    return StepHeader(
        epoch=Epoch(1, 1),
        step_id=StepId(7),
        deadline_ms=1000,
        sequence_ids=tuple(SequenceId(part.sequence_id) for part in parts),
        start_positions=tuple(part.start for part in parts),
        lengths=tuple(len(part.tokens) for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.tokens),
        logits_rows=tuple(part.num_rows for part in parts),
        is_sampled=tuple(part.sampled for part in parts),
        sampling_changes=tuple(part.change for part in parts if part.change),
        finished_sequence_ids=tuple(map(SequenceId, finished)),
    )


def step(sampler: Sampler, *parts: Part, finished: Sequence[int] = ()) -> StepResult:
    header = header_of(parts, finished)
    sampler.apply(header)
    return sampler.sample(header, head, torch.cat([part.rows for part in parts]))


def logits_at(sequence_id: int, position: int) -> Tensor:
    """Return the logits for the token at `position`."""
    return head(hidden_of(sequence_id, range(position - 1, position)))[0]


def generate(
    sampler: Sampler, sequence_id: int, prompt: Sequence[int], params: SamplingParams, count: int
) -> list[int]:
    tokens = list(step(sampler, first(sequence_id, prompt, params)).token_ids)
    while len(tokens) < count:
        start = len(prompt) + len(tokens) - 1
        tokens += step(sampler, Part(sequence_id, start, tokens[-1:])).token_ids
    return tokens


SETTINGS = (
    GREEDY,
    SamplingParams(seed=11),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.9, seed=12),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(seed=13, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 4.0, 5: -math.inf}),
    SamplingParams(seed=14, min_p=0.1, num_logprobs=3),
    SamplingParams(temperature=0.0, num_logprobs=0),
)


def test_greedy_takes_the_best_and_of_equals_the_lowest_id() -> None:
    sampler = Sampler(VOCAB_SIZE)
    assert step(sampler, first(1, [5, 6, 7], GREEDY)).token_ids == (int(logits_at(1, 3).argmax()),)
    header = header_of([first(2, [5], GREEDY)])
    sampler.apply(header)
    tied = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert sampler.sample(header, lambda _: tied, torch.zeros(1, HIDDEN_SIZE)).token_ids == (1,)


def test_result_names_sampled_slices_in_order() -> None:
    sampler = Sampler(VOCAB_SIZE)
    result = step(sampler, first(3, [1, 2], GREEDY), first(1, [1], GREEDY, 4, sampled=False), first(2, [4], GREEDY))
    assert (result.epoch, result.step_id, result.sequence_ids) == (Epoch(1, 1), 7, (3, 2))
    assert result.token_ids == (int(logits_at(3, 2).argmax()), int(logits_at(2, 1).argmax()))
    assert result.logprobs == (None, None)
    assert result.prompt_logprobs == ()


@settings(deadline=None, max_examples=20)
@given(
    choices=st.lists(st.integers(0, len(SETTINGS) - 1), min_size=2, max_size=8),
    random=st.randoms(use_true_random=False),
)
def test_sequence_gets_the_same_tokens_in_any_company(choices: list[int], random: object) -> None:
    prompts = [list(range(i, i + 4)) for i in range(len(choices))]
    alone = [generate(Sampler(VOCAB_SIZE), i, prompts[i], SETTINGS[choice], 5) for i, choice in enumerate(choices)]
    sampler = Sampler(VOCAB_SIZE)
    tokens: list[list[int]] = [[] for _ in choices]
    while any(len(of_one) < 5 for of_one in tokens):
        pending = [i for i, of_one in enumerate(tokens) if len(of_one) < 5]
        company = random.sample(pending, random.randint(1, len(pending)))  # type: ignore[attr-defined]
        parts = [
            Part(i, 3 + len(tokens[i]), tokens[i][-1:]) if tokens[i] else first(i, prompts[i], SETTINGS[choices[i]])
            for i in company
        ]
        for i, token_id in zip(company, step(sampler, *parts).token_ids, strict=True):
            tokens[i].append(token_id)
    assert tokens == alone


@pytest.mark.parametrize("params", SETTINGS)
def test_replayed_sequence_continues_with_the_same_tokens(params: SamplingParams) -> None:
    prompt = [8, 9, 10]
    expected = generate(Sampler(VOCAB_SIZE), 1, prompt, params, 8)
    sampler = Sampler(VOCAB_SIZE)
    tokens = generate(sampler, 1, prompt, params, 4)
    sampler.clear()
    known = [*prompt, *tokens]
    step(sampler, first(1, known[:2], params, len(prompt), sampled=False))
    tokens += step(sampler, Part(1, 2, known[2:])).token_ids
    while len(tokens) < 8:
        tokens += step(sampler, Part(1, len(prompt) + len(tokens) - 1, tokens[-1:])).token_ids
    assert tokens == expected


def test_seed_and_position_alone_decide_the_randomness() -> None:
    drawn = SamplingParams(temperature=5.0, seed=42)
    assert generate(Sampler(VOCAB_SIZE), 1, [1], drawn, 20) == generate(Sampler(VOCAB_SIZE), 1, [1], drawn, 20)
    other = generate(Sampler(VOCAB_SIZE), 1, [1], replace(drawn, seed=43), 20)
    assert generate(Sampler(VOCAB_SIZE), 1, [1], drawn, 20) != other


def test_penalties_see_prompt_and_output() -> None:
    sampler = Sampler(VOCAB_SIZE)
    best = int(logits_at(1, 2).argmax())
    unliked = SamplingParams(temperature=0.0, repetition_penalty=100.0)
    assert step(sampler, first(1, [best, 2], unliked)).token_ids != (best,)
    once = SamplingParams(temperature=0.0, presence_penalty=100.0)
    assert step(sampler, first(1, [best, 2], once)).token_ids == (best,)
    assert step(sampler, first(1, [best, 2], once, prompt_length=0)).token_ids != (best,)


def test_logprobs_are_of_the_raw_logits() -> None:
    sampler = Sampler(VOCAB_SIZE)
    chosen = 4
    params = SamplingParams(temperature=0.3, logit_bias={chosen: 1000.0}, num_logprobs=3)
    (entry,) = step(sampler, first(1, [5], params)).logprobs
    expected = logits_at(1, 1).double().log_softmax(0)
    values, ids = expected.topk(3)
    assert entry is not None
    assert entry.token_id == chosen
    assert entry.logprob == pytest.approx(float(expected[chosen]), abs=1e-6)
    assert entry.top_token_ids == tuple(ids.tolist())
    assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-6)


def test_equally_likely_alternatives_are_ordered_by_id() -> None:
    sampler = Sampler(VOCAB_SIZE)
    header = header_of([first(1, [5], replace(GREEDY, num_logprobs=3))])
    sampler.apply(header)
    logits = torch.tensor([[1.0, 0.0, 2.0, 1.0, 1.0]])
    (entry,) = sampler.sample(header, lambda _: logits, torch.zeros(1, HIDDEN_SIZE)).logprobs
    assert entry is not None
    assert entry.top_token_ids == (2, 0, 3)


def test_more_alternatives_than_tokens_gives_them_all() -> None:
    sampler = Sampler(4)
    header = header_of([first(1, [1], replace(GREEDY, num_logprobs=64))])
    sampler.apply(header)
    (entry,) = sampler.sample(header, lambda _: torch.arange(4.0)[None], torch.zeros(1, HIDDEN_SIZE)).logprobs
    assert entry is not None
    assert entry.top_token_ids == (3, 2, 1, 0)


@settings(deadline=None)
@given(cuts=st.sets(st.integers(1, 9)), num_best=st.integers(0, 3))
def test_prompt_logprobs_do_not_depend_on_chunks(cuts: set[int], num_best: int) -> None:
    prompt = [(7 * i) % VOCAB_SIZE for i in range(10)]
    params = replace(GREEDY, num_prompt_logprobs=num_best)
    borders = [0, *sorted(cuts), len(prompt)]
    sampler = Sampler(VOCAB_SIZE)
    reported: list[TokenLogprobs] = []
    for start, end in pairwise(borders):
        change = SequenceSampling(SequenceId(1), len(prompt), params) if start == 0 else None
        part = Part(1, start, prompt[start:end], sampled=end == len(prompt), all_rows=True, change=change)
        result = step(sampler, part)
        (found,) = result.prompt_logprobs
        assert (found.sequence_id, found.start_position) == (1, start)
        reported += found.tokens
    assert result.token_ids == (int(logits_at(1, 10).argmax()),)
    assert reported[0] == TokenLogprobs(prompt[0], None)
    for position in range(1, 10):
        expected = logits_at(1, position).double().log_softmax(0)
        entry = reported[position]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(expected[prompt[position]]), abs=1e-6)
        assert entry.top_token_ids == tuple(expected.topk(num_best).indices.tolist())
    assert len(reported) == 10


def test_decoding_after_a_scored_prompt_reports_no_more_of_it() -> None:
    sampler = Sampler(VOCAB_SIZE)
    params = replace(GREEDY, num_prompt_logprobs=0)
    (token_id,) = step(sampler, first(1, [1, 2, 3], params, all_rows=True)).token_ids
    assert step(sampler, Part(1, 3, [token_id])).prompt_logprobs == ()


def test_replay_across_the_end_of_the_prompt_scores_the_prompt_alone() -> None:
    sampler = Sampler(VOCAB_SIZE)
    params = replace(GREEDY, num_prompt_logprobs=0)
    (found,) = step(sampler, first(1, [1, 2, 3, 4, 5], params, prompt_length=3, all_rows=True)).prompt_logprobs
    assert [entry.token_id for entry in found.tokens] == [1, 2, 3]


def test_replay_that_asks_for_the_last_row_alone_reports_no_prompt_logprobs() -> None:
    sampler = Sampler(VOCAB_SIZE)
    params = replace(GREEDY, num_prompt_logprobs=0)
    assert step(sampler, first(1, [1, 2, 3, 4], params, prompt_length=3)).prompt_logprobs == ()


def test_head_never_sees_more_rows_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_LOGITS_BYTES", 20 * 4 * VOCAB_SIZE)
    sampler = Sampler(VOCAB_SIZE)
    parts = [first(i, [1], replace(GREEDY, num_logprobs=1)) for i in range(40)]
    parts.append(first(40, [1] * 50, replace(GREEDY, num_prompt_logprobs=1), all_rows=True))
    header = header_of(parts)
    sampler.apply(header)
    sizes: list[int] = []

    def counting_head(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return head(rows)

    result = sampler.sample(header, counting_head, torch.cat([part.rows for part in parts]))
    assert sizes == [16, 16, 16, 1, 16, 16, 9]
    assert result.token_ids[:40] == tuple(int(logits_at(i, 1).argmax()) for i in range(40))
    assert len(result.prompt_logprobs[0].tokens) == 50


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=3), replace(GREEDY, num_prompt_logprobs=0)])
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_useless_logits_name_the_sequence(params: SamplingParams, bad: float) -> None:
    sampler = Sampler(VOCAB_SIZE)
    parts = [first(4, [1], GREEDY), first(5, [1, 2], params, all_rows=True)]
    header = header_of(parts)
    sampler.apply(header)

    def broken_head(rows: Tensor) -> Tensor:
        logits = head(rows)
        for row, logit in zip(rows, logits, strict=True):
            if any(row.equal(other) for other in parts[1].rows):
                logit[:] = bad
        return logits

    with pytest.raises(InvariantError, match=r"sequence 5 has no token to choose at position [12]: .*fp16"):
        sampler.sample(header, broken_head, torch.cat([part.rows for part in parts]))


def test_one_nan_is_enough_to_be_noticed() -> None:
    sampler = Sampler(VOCAB_SIZE)
    header = header_of([first(5, [1], SamplingParams(top_k=3))])
    sampler.apply(header)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 50] = math.nan
    with pytest.raises(InvariantError, match="nan"):
        sampler.sample(header, lambda _: logits, torch.zeros(1, HIDDEN_SIZE))


def test_half_precision_logits_are_sampled_in_full() -> None:
    sampler = Sampler(VOCAB_SIZE)
    header = header_of([first(1, [1], SamplingParams(seed=5, num_logprobs=1))])
    sampler.apply(header)
    logits = head(hidden_of(1, range(1))).bfloat16()
    found = sampler.sample(header, lambda _: logits, torch.zeros(1, HIDDEN_SIZE))
    assert found == sampler.sample(header, lambda _: logits.float(), torch.zeros(1, HIDDEN_SIZE))


def test_finished_sequence_is_forgotten() -> None:
    sampler = Sampler(VOCAB_SIZE)
    step(sampler, first(1, [1], GREEDY), first(2, [1], GREEDY))
    step(sampler, Part(2, 1, [3]), finished=[1, 99])
    with pytest.raises(InvariantError, match="sequence 1 asks for logits, but its sampling settings never came"):
        step(sampler, Part(1, 1, [3]))
    sampler.clear()
    with pytest.raises(InvariantError, match="sequence 2"):
        step(sampler, Part(2, 2, [3]))


def test_slice_that_needs_no_logits_needs_no_settings() -> None:
    result = step(Sampler(VOCAB_SIZE), Part(1, 0, [1, 2], sampled=False))
    assert (result.sequence_ids, result.token_ids) == ((), ())
