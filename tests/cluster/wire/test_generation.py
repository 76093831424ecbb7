import pytest

from cluster.request import FinishReason, SamplingParams
from cluster.rpc.v1 import generation_pb2 as pb
from cluster.wire.generation import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    logprob_options_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)

PARAMS = SamplingParams(
    temperature=0.0,
    top_k=5,
    top_p=0.5,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-1.0,
    frequency_penalty=2.0,
    logit_bias={7: float("-inf"), 9: 1.5},
    seed=2**64 - 1,
    num_logprobs=0,
    num_prompt_logprobs=None,
)


def test_sampling_settings_survive_the_wire():
    assert sampling_from_proto(sampling_to_proto(PARAMS), logprob_options_to_proto(PARAMS)) == PARAMS


def test_every_field_of_the_settings_that_are_sent_is_set():
    message = sampling_to_proto(SamplingParams())
    unset = [f.name for f in pb.SamplingParams.DESCRIPTOR.fields if f.has_presence and not message.HasField(f.name)]
    assert unset == []


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_finish_reason_survives_the_wire(reason):
    assert finish_reason_from_proto(finish_reason_to_proto(reason)) is reason


def test_every_finish_reason_of_the_schema_is_known():
    known = {finish_reason_to_proto(reason) for reason in FinishReason}
    assert known == set(pb.FinishReason.values()) - {pb.FINISH_REASON_UNSPECIFIED}
