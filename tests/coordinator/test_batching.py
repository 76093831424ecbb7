"""A step's slices and columns."""

from __future__ import annotations

from cluster.microbatch import Epoch, PageDelta, StepHeader, StepId
from cluster.request import SequenceId
from coordinator.batching import Chunk, Microbatch
from coordinator.sequences import RequestRecord, SequenceRecord
from tests.coordinator.requests import make_request


def sequence(number: int, prompt: int, *, num_scheduled: int = 0, output: tuple[int, ...] = ()) -> SequenceRecord:
    request = make_request(str(number), prompt)
    owner = RequestRecord(request, frozenset(), arrived_at=0.0)
    record = SequenceRecord(SequenceId(number), owner, 0, request.sampling, extents=(range(4, 6), range(9, 10)))
    record.num_scheduled = num_scheduled
    record.output_token_ids.extend(output)
    return record


def by_id(*records: SequenceRecord) -> dict[SequenceId, SequenceRecord]:
    return {record.sequence_id: record for record in records}


def header_of(microbatch: Microbatch) -> StepHeader:
    return microbatch.header(Epoch(1, 1), StepId(5), deadline_ms=9, last_stage=1, finished_sequence_ids=[SequenceId(8)])


def test_decodes_are_taken_longest_ready_first() -> None:
    ready = by_id(*(sequence(number, 2, num_scheduled=2, output=(number,)) for number in (3, 1, 2)))
    microbatch = Microbatch()
    microbatch.add_decodes(ready, 2)
    assert [record.sequence_id for record in microbatch.decodes] == [3, 1]
    assert list(ready) == [2]


def test_chunks_fill_the_budget_and_a_prompt_leaves_when_it_is_scheduled() -> None:
    first, second = sequence(1, 5), sequence(2, 9)
    prefilling = by_id(first, second)
    microbatch = Microbatch()
    microbatch.add_chunks(prefilling, 8)
    assert microbatch.chunks == [Chunk(first, 0, 5), Chunk(second, 0, 3)]
    assert list(prefilling) == [2]
    assert microbatch.sampled == [first]


def test_no_budget_takes_no_chunk() -> None:
    microbatch = Microbatch()
    microbatch.add_chunks(by_id(sequence(1, 5)), 0)
    assert not microbatch


def test_decodes_come_before_chunks_in_every_column() -> None:
    decode, partial, new = (
        sequence(1, 4, num_scheduled=5, output=(77, 78)),
        sequence(2, 6, num_scheduled=4),
        sequence(3, 9),
    )
    microbatch = Microbatch()
    microbatch.add_decodes(by_id(decode), 9)
    microbatch.add_chunks(by_id(partial, new), 5)
    assert header_of(microbatch) == StepHeader(
        epoch=Epoch(1, 1),
        step_id=StepId(5),
        deadline_ms=9,
        sequence_ids=(SequenceId(1), SequenceId(2), SequenceId(3)),
        start_positions=(5, 4, 0),
        lengths=(1, 2, 3),
        token_ids=(78, 15, 16, 11, 12, 13),
        logits_rows=(1, 1, 0),
        is_sampled=(True, True, False),
        page_deltas=(PageDelta(SequenceId(3), 0, (4, 5, 9)),),
        sampling_changes=header_of(microbatch).sampling_changes,
        finished_sequence_ids=(SequenceId(8),),
        last_stage=1,
    )
    (change,) = header_of(microbatch).sampling_changes
    assert (change.sequence_id, change.prompt_length, change.params) == (3, 9, new.sampling)
    microbatch.advance()
    assert [record.num_scheduled for record in (decode, partial, new)] == [6, 6, 3]
