"""Sampling flags, shared by `generate` and `chat`. What they mean is said in `cluster.client.options`."""

from __future__ import annotations

from typing import Any

from cluster.cli.parameters import Given, OptionSpec

SAMPLING_FLAGS = (
    OptionSpec("max_tokens", int, "Most tokens to write. [default: 256]"),
    OptionSpec("temperature", float, "0: always the likeliest token. [default: the model's]"),
    OptionSpec("top_k", int, "Choose among the k likeliest tokens; 0: all."),
    OptionSpec("top_p", float, "Choose among the likeliest tokens up to this probability."),
    OptionSpec("min_p", float, "Choose among tokens at least this fraction as likely as the best."),
    OptionSpec("repetition_penalty", float, "Above 1: fewer words of prompt and answer again."),
    OptionSpec("presence_penalty", float, "Above 0: fewer words of the answer again."),
    OptionSpec("frequency_penalty", float, "Above 0: the same, the more often they came."),
    OptionSpec("seed", int, "Same seed, same text."),
    OptionSpec("stop", str, "End before this text; \\n and \\t are understood."),
    OptionSpec("ignore_eos", bool, "Go on after the model's end-of-text token."),
)


def client_options(given: Given) -> dict[str, Any]:
    """Return keyword arguments of the client for the flags that were given."""
    options = dict(given)
    if "stop" in options:
        options["stop"] = str(options["stop"]).replace("\\n", "\n").replace("\\t", "\t")
    return options
