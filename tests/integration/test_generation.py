"""What a client gets, through real gRPC from end to end, against transformers on the same checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
import torch

from cluster.catalogue import shipped_folder
from cluster.client import AsyncClient, FinishReason, TokenLogprobs
from cluster.client.values import Piece
from tests.integration.local_cluster import LocalCluster, local_cluster
from tests.worker.references import generate, load_reference

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "bloom-tiny"
MAX_CONTEXT = 320
CHUNK = 64  # so that prompts of several chunks are short
PROMPT = "Fellow citizens of the Senate and of the House of Representatives"
LONG_TEXT = " ".join(f"In the year {year} the people of the United States were at peace." for year in range(1801, 1821))
EOS_ID = 2


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(shipped_folder(MODEL))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    async with local_cluster(MODEL, max_context=MAX_CONTEXT, max_step_tokens=CHUNK) as running:
        yield running
        async with running.client() as client:
            await running.wait_until_pages_are_free(client)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as connected:
        yield connected


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prompts(client: AsyncClient) -> list[tuple[int, ...]]:
    """Sixteen prompts, from one token to four chunks."""
    token_ids = await client.tokenize(LONG_TEXT)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 63, 64, 65, 89, 128, 144, 200]
    assert len(token_ids) >= lengths[-1]
    return [token_ids[7 * index % 9 :][:length] for index, length in enumerate(lengths)]


def log_softmax(reference: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([list(token_ids)])).logits[0], dim=-1)


def assert_logprobs(found: Sequence[TokenLogprobs], expected: torch.Tensor, num_top: int) -> None:
    """`expected` `[num_tokens, vocab_size]` predicts the tokens of `found`."""
    for entry, row in zip(found, expected, strict=True):
        best = row.topk(num_top)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert entry.top_token_ids == tuple(best.indices.tolist())
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_greedy_tokens_are_those_of_transformers(num_stages: int, reference: Any) -> None:
    async with local_cluster(MODEL, num_stages, max_step_tokens=CHUNK) as cluster, cluster.client() as client:
        token_ids = await client.tokenize(LONG_TEXT)
        for prompt in (PROMPT, LONG_TEXT, token_ids[:1]):
            completion = await client.complete(prompt, max_tokens=24, temperature=0, ignore_eos=True)
            ids = await client.tokenize(prompt) if isinstance(prompt, str) else prompt
            assert list(completion.token_ids) == generate(reference, ids, 24).token_ids
        assert len(completion.timings.stages) == num_stages


async def test_sixteen_requests_that_arrive_at_different_moments_get_the_tokens_of_transformers(
    client: AsyncClient, prompts: list[tuple[int, ...]], reference: Any
) -> None:
    """Each request starts with the third token of the one before, so that prompts and answers overlap."""
    starts = [asyncio.Event() for _ in range(len(prompts) + 1)]
    starts[0].set()
    lengths = [12 + 3 * index % 11 for index in range(len(prompts))]

    async def run(index: int) -> list[int]:
        await starts[index].wait()
        token_ids: list[int] = []
        async for piece in client.generate(prompts[index], max_tokens=lengths[index], temperature=0, ignore_eos=True):
            token_ids += piece.token_ids
            if len(token_ids) >= 3:
                starts[index + 1].set()
        return token_ids

    found = await asyncio.gather(*map(run, range(len(prompts))))
    for prompt, max_tokens, token_ids in zip(prompts, lengths, found, strict=True):
        assert token_ids == generate(reference, prompt, max_tokens).token_ids


async def test_sixteen_requests_at_once_get_the_tokens_of_transformers(
    client: AsyncClient, prompts: list[tuple[int, ...]], reference: Any
) -> None:
    completions = await client.complete_many(prompts, max_tokens=8, temperature=0, ignore_eos=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == generate(reference, prompt, 8).token_ids


async def test_text_and_its_token_ids_are_the_same_prompt(client: AsyncClient) -> None:
    token_ids = await client.tokenize(PROMPT)
    by_text = await client.complete(PROMPT, max_tokens=8)
    by_ids = await client.complete(token_ids, max_tokens=8)
    assert by_ids.text == by_text.text
    assert by_ids.usage == by_text.usage


async def test_seed_decides_the_text_alone_and_in_company(client: AsyncClient, prompts: list[tuple[int, ...]]) -> None:
    options: Any = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = await client.complete(PROMPT, **options)
    company = client.complete_many(prompts, max_tokens=24, temperature=1.0)
    together = await asyncio.gather(company, *(client.complete(PROMPT, **options) for _ in range(2)))
    assert [completion.token_ids for completion in together[1:]] == [alone.token_ids] * 2
    other = await client.complete(PROMPT, **{**options, "seed": 8})
    assert other.token_ids != alone.token_ids


async def test_completion_i_has_the_seed_plus_i(client: AsyncClient) -> None:
    options: Any = {"max_tokens": 12, "temperature": 1.0}
    several = await client.complete(PROMPT, **options, seed=40, num_completions=3)
    singles = [await client.complete(PROMPT, **options, seed=40 + index) for index in range(3)]
    assert [choice.token_ids for choice in several.choices] == [single.token_ids for single in singles]
    assert len({choice.token_ids for choice in several.choices}) == 3
    assert several.usage.num_completion_tokens == sum(len(choice.token_ids) for choice in several.choices)


async def test_logprobs_are_those_of_transformers(client: AsyncClient, reference: Any) -> None:
    completion = await client.complete(PROMPT, max_tokens=10, temperature=1.0, seed=3, logprobs=4)
    prompt = await client.tokenize(PROMPT)
    expected = log_softmax(reference, [*prompt, *completion.token_ids])
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    assert_logprobs(completion.logprobs, expected[len(prompt) - 1 : -1], 4)


async def test_echo_gives_the_prompt_with_its_logprobs(
    client: AsyncClient, prompts: list[tuple[int, ...]], reference: Any
) -> None:
    prompt = prompts[-1]  # of several chunks
    completion = await client.complete(prompt, max_tokens=2, echo=True, prompt_logprobs=2)
    assert completion.prompt is not None
    assert completion.prompt.text == await client.detokenize(prompt)
    assert completion.prompt.token_ids == tuple(prompt)
    first, *others = completion.prompt.logprobs
    assert (first.token_id, first.logprob) == (prompt[0], None)
    assert [entry.token_id for entry in others] == list(prompt[1:])
    assert_logprobs(others, log_softmax(reference, prompt)[:-1], 2)


async def test_logit_bias_forbids_and_forces(client: AsyncClient) -> None:
    greedy = await client.complete(PROMPT, max_tokens=1, temperature=0)
    forbidden = await client.complete(
        PROMPT, max_tokens=12, temperature=0, logit_bias={greedy.token_ids[0]: float("-inf")}
    )
    assert greedy.token_ids[0] not in forbidden.token_ids
    forced = await client.complete(PROMPT, max_tokens=3, temperature=1.0, logit_bias={77: 1000.0})
    assert forced.token_ids == (77, 77, 77)


async def test_stop_string_across_tokens_ends_the_text_before_it(client: AsyncClient) -> None:
    whole = await client.complete(PROMPT, max_tokens=16, temperature=0)
    head = await client.detokenize(whole.token_ids[:8])
    stop = whole.text[len(head) - 2 : len(head) + 2]
    stopped = await client.complete(PROMPT, max_tokens=16, temperature=0, stop=["not in there", stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.choices[0].stop_string) == (FinishReason.STOP, stop)
    assert len(stopped.token_ids) < 16


async def test_stop_token_ends_the_completion_and_is_no_text(client: AsyncClient) -> None:
    whole = await client.complete(PROMPT, max_tokens=16, temperature=0)
    stop = whole.token_ids[9]
    kept = whole.token_ids[: whole.token_ids.index(stop)]
    stopped = await client.complete(PROMPT, max_tokens=16, temperature=0, stop_token_ids=[stop])
    assert stopped.token_ids == (*kept, stop)
    assert stopped.text == await client.detokenize(kept)
    assert stopped.finish_reason is FinishReason.STOP


async def test_eos_ends_the_completion_unless_ignored(client: AsyncClient) -> None:
    bias = {EOS_ID: 1000.0}
    ended = await client.complete(PROMPT, max_tokens=5, logit_bias=bias)
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((EOS_ID,), "", FinishReason.STOP)
    ignored = await client.complete(PROMPT, max_tokens=5, logit_bias=bias, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ((EOS_ID,) * 5, FinishReason.LENGTH)


async def test_unset_max_tokens_ends_with_the_context(client: AsyncClient) -> None:
    prompt = (await client.tokenize(LONG_TEXT + LONG_TEXT))[: MAX_CONTEXT - 6]
    completion = await client.complete(prompt, ignore_eos=True)
    assert len(completion.token_ids) == 6
    assert completion.finish_reason is FinishReason.LENGTH


async def test_pieces_make_up_the_decoded_whole(client: AsyncClient) -> None:
    """At a high temperature bytes of different characters follow each other."""
    for seed in range(4):
        pieces: list[Piece] = []
        async for piece in client.generate(PROMPT, max_tokens=32, temperature=4.0, seed=seed, ignore_eos=True):
            pieces.append(piece)  # noqa: PERF401 - one at a time, as they come
        token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        assert len(token_ids) == 32
        assert len([piece for piece in pieces if piece.text]) > 8
        assert "".join(piece.text for piece in pieces) == await client.detokenize(token_ids)


async def test_summary_tells_usage_times_and_what_computed(client: AsyncClient, cluster: LocalCluster) -> None:
    completion = await client.complete(PROMPT, max_tokens=6, ignore_eos=True)
    assert completion.usage.num_prompt_tokens == len(await client.tokenize(PROMPT))
    assert completion.usage.num_completion_tokens == 6
    timings = completion.timings
    assert timings.queue_seconds >= 0
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0
    assert [(stage.stage, stage.compute_seconds > 0) for stage in timings.stages] == [(0, True), (1, True), (2, True)]
    fingerprint = completion.fingerprint
    assert (fingerprint.model, fingerprint.revision) == (MODEL, cluster.spec.revision)
    ends = [stage.end_block for stage in fingerprint.stages]
    assert [stage.first_block for stage in fingerprint.stages] == [0, *ends[:-1]]
    assert ends[-1] == cluster.spec.num_blocks
    assert {(stage.precision, stage.compute_dtype, stage.kv_dtype) for stage in fingerprint.stages} == {("fp32",) * 3}
