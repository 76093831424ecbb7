"""What storing weights in fewer bits costs: perplexity on public text, beside bitsandbytes on the same weights.

    python benchmarks/quality.py --model "$(python tests/fetch_smollm2.py)" --text moby-dick
    python benchmarks/quality.py --model cluster/models/bloom-tiny --text state-of-the-union

The text is cut into windows of equal length, each scored by itself: every token but a window's first counts. Ours is
one stage in this process; transformers and bitsandbytes run in an environment of their own, installed on first use
(--cache). bitsandbytes leaves the head as it is, ours keeps it in 8 bits beside int8 and NF4; "nf4-head" is
bitsandbytes with the head in NF4, too. (bloom-tiny was trained on the State of the Union.)
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

import corpora
from cluster.errors import ConfigurationError
from cluster.hub.resolve import resolve
from cluster.model_spec import ModelSpec, Precision
from command_line import Parser, checkpoint, names, run_script
from measures import describe_machine
from peers import environment
from peers.environment import HUGGING_FACE
from resident import DEFAULT_CACHE
from stage import Driver, load

OURS = ("fp32", "bf16", "int8", "nf4")
THEIRS = ("fp32", "bf16", "int8", "nf4", "nf4-bf16", "nf4-head")


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a system found the windows."""

    system: str
    weights: str
    nats: float  # sum of negative log probabilities
    num_tokens: int
    detail: str = ""

    @property
    def perplexity(self) -> float:
        """e to the mean negative log probability."""
        return math.exp(self.nats / self.num_tokens)


def cut(token_ids: Sequence[int], num_tokens: int, window: int) -> list[list[int]]:
    """Return windows of equal length that together predict at least `num_tokens`, spread evenly over the text.

    Raises ConfigurationError for a text that is too short.
    """
    needed = -(-num_tokens // (window - 1))
    starts = range(0, len(token_ids) - window + 1, window)
    if len(starts) < needed:
        raise ConfigurationError(f"{len(token_ids)} tokens of text are too few for {needed} windows of {window}")
    chosen = [starts[index * len(starts) // needed] for index in range(needed)]
    return [list(token_ids[start : start + window]) for start in chosen]


def score_ours(spec: ModelSpec, precision: str, windows: Sequence[Sequence[int]], cache: Path) -> Score:
    """Score with one stage in this process."""
    length = len(windows[0]) + 1  # the stage samples a token after the last one
    store = str(cache / "store")
    loaded = load(spec, Precision(precision), num_sequences=1, max_context=length, store=store)
    driver = Driver(loaded.executor, max_context=length)
    nats = -sum(sum(driver.score(window)) for window in windows)
    loaded.executor.close()
    return Score("Spanwise", precision, nats, _num_predicted(windows), f"computes in {loaded.compute_dtype}")


def score_theirs(model: str, scheme: str, windows: Sequence[Sequence[int]], cache: Path, num_threads: int) -> Score:
    """Score with transformers in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(windows, file)
        file.flush()
        options = [model, scheme, file.name, "--threads", str(num_threads)]
        command = HUGGING_FACE.command(cache, "transformers_score", options)
        variables = environment.variables(HUGGING_FACE, num_threads)
        answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables).stdout)
    detail = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    system = "transformers" if scheme in ("fp32", "bf16") else "bitsandbytes"
    return Score(system, scheme, answer["nats"], answer["num_tokens"], detail)


def _num_predicted(windows: Sequence[Sequence[int]]) -> int:
    return sum(len(window) - 1 for window in windows)


def make_markdown(scores: Sequence[Score]) -> str:
    """Return a table, each score beside the first one of fp32."""
    base = next((score for score in scores if score.weights == "fp32"), scores[0])
    lines = ["| weights | system | perplexity | against fp32 |", "|---|---|---|---|"]
    for score in scores:
        change = score.perplexity / base.perplexity - 1
        lines.append(f"| {score.weights} | {score.system} | {score.perplexity:.3f} | {change:+.2%} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, type=checkpoint, help="folder of a checkpoint with tokenizer.json")
    parser.add_argument("--text", default="moby-dick", help=f"{', '.join(corpora.PACKAGES)}, or a file")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to predict, at least")
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument("--ours", type=names(OURS), default=",".join(OURS), help="our weights' precisions; - for none")
    parser.add_argument("--theirs", type=names(THEIRS), default=",".join(THEIRS), help="theirs; - for none")
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the environment, texts, the store")
    return parser.parse_measurement(quick="--tokens 2000")


def measure(arguments: argparse.Namespace, spec: ModelSpec, windows: Sequence[Sequence[int]]) -> list[Score]:
    """Return all scores, telling each as it comes."""
    scores = []
    for name, is_ours in [(name, True) for name in arguments.ours] + [(name, False) for name in arguments.theirs]:
        if is_ours:
            score = score_ours(spec, name, windows, arguments.cache)
        else:
            score = score_theirs(str(arguments.model), name, windows, arguments.cache, arguments.threads)
        print(f"{score.system} {score.weights}: {score.perplexity:.4f}", file=sys.stderr)
        scores.append(score)
    return scores


def main() -> None:
    arguments = parse_arguments()
    spec = resolve(str(arguments.model))
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    token_ids = tokenizer.encode(corpora.fetch(arguments.text, arguments.cache), add_special_tokens=False).ids
    windows = cut(token_ids, arguments.tokens, arguments.window)
    scores = measure(arguments, spec, windows)
    report = {
        "machine": machine,
        "benchmark": shlex.join(sys.argv),
        "text": arguments.text,
        "num_tokens": _num_predicted(windows),
        "window": arguments.window,
        "scores": [asdict(score) | {"perplexity": score.perplexity} for score in scores],
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(machine, f"{report['num_tokens']} tokens of {arguments.text}, windows of {arguments.window}\n")
        print(make_markdown(scores))


if __name__ == "__main__":
    run_script(main)
