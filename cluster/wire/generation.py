"""Sampling, stop rules and log probabilities: domain values to protobuf and back. Needs neither torch nor ray."""

from __future__ import annotations

from cluster.request import FinishReason, SamplingParams, TokenLogprobs
from cluster.rpc.v1 import generation_pb2 as pb

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}
_FINISH_REASONS_BACK = {value: reason for reason, value in _FINISH_REASONS.items()}


def finish_reason_to_proto(reason: FinishReason) -> pb.FinishReason:
    return _FINISH_REASONS[reason]


def finish_reason_from_proto(value: pb.FinishReason) -> FinishReason:
    """Return the reason; STOP for one that a newer server may have added."""
    return _FINISH_REASONS_BACK.get(value, FinishReason.STOP)


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Return the message with every field set."""
    return pb.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
    )


def logprob_options_to_proto(params: SamplingParams) -> pb.LogprobOptions:
    return pb.LogprobOptions(num_logprobs=params.num_logprobs, num_prompt_logprobs=params.num_prompt_logprobs)


def sampling_from_proto(message: pb.SamplingParams, logprobs: pb.LogprobOptions) -> SamplingParams:
    """Return the value of a message with every field set."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        num_logprobs=logprobs.num_logprobs if logprobs.HasField("num_logprobs") else None,
        num_prompt_logprobs=logprobs.num_prompt_logprobs if logprobs.HasField("num_prompt_logprobs") else None,
    )


def logprobs_to_proto(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=entry.top_token_ids,
        top_logprobs=entry.top_logprobs,
    )


def logprobs_from_proto(message: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_token_ids=tuple(message.top_token_ids),
        top_logprobs=tuple(message.top_logprobs),
    )
