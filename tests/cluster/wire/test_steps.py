from hypothesis import given
from hypothesis import strategies as st

from cluster.microbatch import (
    Epoch,
    PageDelta,
    PromptLogprobs,
    SequenceSampling,
    StageTiming,
    StepFailure,
    StepHeader,
    StepId,
    StepProgress,
    StepResult,
)
from cluster.request import SamplingParams, SequenceId, TokenLogprobs
from cluster.rpc.v1 import stage_pb2
from cluster.wire.steps import (
    failure_from_proto,
    failure_to_proto,
    header_from_proto,
    header_to_proto,
    progress_from_proto,
    progress_to_proto,
    result_from_proto,
    result_to_proto,
)

EPOCH = Epoch(1_790_000_000_000, 3)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
floats = st.floats(width=32, allow_nan=False)
timings = st.builds(StageTiming, uint32, uint64, uint64, uint64, uint64)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 2**31 - 1),
    logit_bias=st.dictionaries(uint32, st.floats(allow_nan=False), max_size=3),
    seed=uint64,
    num_logprobs=st.none() | st.integers(0, 64),
    num_prompt_logprobs=st.none() | st.integers(0, 64),
)
token_logprobs = st.builds(
    TokenLogprobs,
    token_id=uint32,
    logprob=floats,
    top_token_ids=st.tuples(uint32, uint32),
    top_logprobs=st.tuples(floats, floats),
)


@st.composite
def headers(draw):
    lengths = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    column = {"min_size": len(lengths), "max_size": len(lengths)}
    num_tokens = sum(lengths)
    return StepHeader(
        epoch=EPOCH,
        step_id=StepId(draw(uint64)),
        deadline_ms=draw(uint32),
        sequence_ids=tuple(draw(st.lists(uint64, **column))),
        start_positions=tuple(draw(st.lists(uint32, **column))),
        lengths=lengths,
        token_ids=tuple(draw(st.lists(uint32, min_size=num_tokens, max_size=num_tokens))),
        logits_rows=tuple(draw(st.lists(uint32, **column))),
        is_sampled=tuple(draw(st.lists(st.booleans(), **column))),
        page_deltas=draw(st.tuples(st.builds(PageDelta, uint64, uint32, st.tuples(uint32, uint32), uint32))),
        sampling_changes=draw(st.tuples(st.builds(SequenceSampling, uint64, uint32, params))),
        finished_sequence_ids=draw(st.tuples(uint64)),
        last_stage=draw(uint32),
        timings=draw(st.tuples(timings, timings)),
    )


@st.composite
def results(draw):
    num_sampled = draw(st.integers(0, 3))
    column = {"min_size": num_sampled, "max_size": num_sampled}
    return StepResult(
        epoch=EPOCH,
        step_id=StepId(draw(uint64)),
        sequence_ids=tuple(draw(st.lists(uint64, **column))),
        token_ids=tuple(draw(st.lists(uint32, **column))),
        logprobs=tuple(draw(st.lists(st.none() | token_logprobs, **column))),
        prompt_logprobs=draw(st.tuples(st.builds(PromptLogprobs, uint64, uint32, st.tuples(token_logprobs)))),
        timings=draw(st.tuples(timings)),
    )


@given(headers())
def test_a_header_survives_the_wire(header):
    message = stage_pb2.StepHeader.FromString(header_to_proto(header).SerializeToString())
    assert header_from_proto(message) == header


@given(results())
def test_a_result_survives_the_wire(result):
    message = stage_pb2.StepResult.FromString(result_to_proto(result).SerializeToString())
    assert result_from_proto(message) == result


def test_a_prompts_first_token_has_no_log_probability():
    first = PromptLogprobs(SequenceId(1), 0, (TokenLogprobs(5, None),))
    result = StepResult(EPOCH, StepId(1), (), (), (), prompt_logprobs=(first,))
    assert result_from_proto(result_to_proto(result)).prompt_logprobs == (first,)


def test_a_result_without_log_probabilities_sends_none():
    result = StepResult(EPOCH, StepId(1), (SequenceId(1),) * 3, (7, 8, 9), (None,) * 3)
    assert len(result_to_proto(result).logprobs) == 0


def test_a_failure_survives_the_wire():
    failure = StepFailure(EPOCH, StepId(9), 2, "StageTimeoutError", "stage 2 was late", is_stage_lost=True)
    assert failure_from_proto(failure_to_proto(failure)) == failure


def test_progress_survives_the_wire():
    progress = StepProgress(EPOCH, StepId(9), 2, 3, 24)
    assert progress_from_proto(progress_to_proto(progress)) == progress
