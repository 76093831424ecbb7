"""What a request leaves unset: the model's generation_config.json decides, then neutral values.

Generation is greedy (temperature 0) unless the client sets a temperature or a filter (top-k, top-p, min-p), or the
model's generation_config.json says `do_sample`; then an unset temperature is generation_config's, else 1. The other
fields are generation_config's, else off. A seed is drawn when none is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import ConfigurationError
from cluster.request import SamplingParams
from cluster.rpc.v1 import generation_pb2 as generation

_FILTERS = ("top_k", "top_p", "min_p")


def complete_sampling(
    sampling: generation.SamplingParams,
    logprobs: generation.LogprobOptions,
    *,
    generation_config: Mapping[str, Any],
    draw_seed: Callable[[], int],
) -> SamplingParams:
    """Return every sampling setting of a request; `draw_seed` returns a number below 2**64. Values are not validated.

    Raises ConfigurationError when a value of generation_config.json is no number.
    """

    def setting(name: str, neutral: float) -> float:
        if sampling.HasField(name):
            return float(getattr(sampling, name))
        return _number(generation_config, name, neutral)

    return SamplingParams(
        temperature=setting("temperature", 1.0) if _is_sampling(sampling, generation_config) else 0.0,
        top_k=int(setting("top_k", 0)),
        top_p=setting("top_p", 1.0),
        min_p=setting("min_p", 0.0),
        repetition_penalty=setting("repetition_penalty", 1.0),
        presence_penalty=setting("presence_penalty", 0.0),
        frequency_penalty=setting("frequency_penalty", 0.0),
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed if sampling.HasField("seed") else draw_seed(),
        num_logprobs=logprobs.num_logprobs if logprobs.HasField("num_logprobs") else None,
        num_prompt_logprobs=logprobs.num_prompt_logprobs if logprobs.HasField("num_prompt_logprobs") else None,
    )


def _is_sampling(sampling: generation.SamplingParams, generation_config: Mapping[str, Any]) -> bool:
    is_asked = any(sampling.HasField(name) for name in ("temperature", *_FILTERS))
    return is_asked or bool(generation_config.get("do_sample"))


def _number(generation_config: Mapping[str, Any], name: str, neutral: float) -> float:
    value = generation_config.get(name)
    if value is None:
        return neutral
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"generation_config.json: {name} must be a number, not {value!r}")
    return float(value)
