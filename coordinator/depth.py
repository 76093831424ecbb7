"""How deep to fill the pipeline: measured step times, and what follows from them.

Three questions are answered from one model of the pipeline, seconds by step size, measured per stage:

* how many steps to have in flight (`depth`): enough that the slowest stage is busy, that is at least
  (sum of stage times + hops) / slowest stage time. It may exceed the number of stages (hops count), and it falls to 1
  where splitting costs more than it gains (a stage that reads its blocks from disk is as slow for 1 token as for 16);
* how large a step may be while others decode (`largest_step`);
* how large a piece of the prompts a step should take (`prompt_chunk`): small pieces fill and drain the pipeline
  quickly, large ones compute efficiently.

Covers arithmetic on numbers handed in; reads no clock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from operator import mul, truediv

from cluster.microbatch import StageTiming

NANOSECONDS = 1e-9
EWMA_WEIGHT = 0.2  # of a new measurement: five steps to forget most of an old load
TOLERANCE = 0.02  # another depth than one step per stage must promise more than this
MEMORY_STEPS = 500  # a size not seen for so long is as good as unmeasured: a bad moment must not stick for ever
MAX_DEPTH_PER_STAGE = 4  # bounds what a lost epoch throws away and what the relays must buffer


class StepCurve:
    """Seconds by number of tokens: a moving average per power of two, linear in between and beyond.

    More tokens take no less time: a small step that happened to be slow counts as no slower than a larger one. And a
    token takes no more time among more of them: otherwise noise would cut work into small steps. Beyond what has been
    measured the nearest piece goes on, never to more than proportionally more. A single measurement is taken as
    proportional; of a stage that reads its blocks from disk (`is_streamed`), as the same for any number.
    """

    def __init__(self, *, is_streamed: bool = False) -> None:
        self._is_streamed = is_streamed
        self._num_observed = 0
        # power of two → (average tokens, average seconds, when it was last observed)
        self._points: dict[int, tuple[float, float, int]] = {}
        self._tokens: list[float] = []
        self._seconds: list[float] = []

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Account for one measured step."""
        bucket = num_tokens.bit_length()
        tokens, average, _ = self._points.get(bucket, (num_tokens, seconds, 0))
        self._num_observed += 1
        self._points[bucket] = (
            tokens + EWMA_WEIGHT * (num_tokens - tokens),
            average + EWMA_WEIGHT * (seconds - average),
            self._num_observed,
        )
        oldest = self._num_observed - MEMORY_STEPS
        self._points = {bucket: point for bucket, point in self._points.items() if point[2] > oldest}
        points = sorted(self._points.values())
        self._tokens = [tokens for tokens, _, _ in points]
        falling = accumulate((seconds for _, seconds, _ in reversed(points)), min)
        growing = list(falling)[::-1]
        per_token = accumulate(map(truediv, growing, self._tokens), min)
        self._seconds = list(map(mul, per_token, self._tokens))

    def seconds(self, num_tokens: float) -> float:
        """Return the expected seconds; 0 before anything was measured."""
        if not self._tokens:
            return 0.0
        last = len(self._tokens) - 1
        right = bisect_left(self._tokens, num_tokens)
        nearest = min(right, last)
        proportional = self._seconds[nearest] * num_tokens / self._tokens[nearest]
        if last == 0:
            return self._seconds[0] if self._is_streamed else proportional
        right = min(max(right, 1), last)
        low, high = self._tokens[right - 1], self._tokens[right]
        share = (num_tokens - low) / (high - low)
        line = self._seconds[right - 1] * (1 - share) + self._seconds[right] * share
        return line if 0 <= share <= 1 else sorted((proportional, line, self._seconds[nearest]))[1]


class PipelineTimes:
    """What an epoch's stages and the hops between them have been measured to take.

    With `is_streamed`, where a stage reads its blocks from disk at every step, a single step in flight is preferred
    to one per stage.
    """

    def __init__(self, num_stages: int, *, is_streamed: bool = False) -> None:
        self.num_stages = num_stages
        self.is_measured = False
        self._preferred_depth = 1 if is_streamed else num_stages
        self._stages = [StepCurve(is_streamed=is_streamed) for _ in range(num_stages)]
        self._hops = StepCurve()  # all of a step's time that no stage accounts for

    def observe(self, num_tokens: int, timings: Sequence[StageTiming], elapsed_seconds: float) -> None:
        """Account for a step that took `elapsed_seconds` from coordinator to coordinator."""
        if len(timings) != self.num_stages:
            return
        for curve, timing in zip(self._stages, timings, strict=True):
            curve.observe(num_tokens, (timing.finished_ns - timing.started_ns) * NANOSECONDS)
        at_stages = sum(timing.finished_ns - timing.received_ns for timing in timings) * NANOSECONDS
        self._hops.observe(num_tokens, max(0.0, elapsed_seconds - at_stages))
        self.is_measured = True

    def round_seconds(self, depth: int, num_tokens: float) -> float:
        """Return the seconds between two steps of one sequence, with `depth` steps of `num_tokens` in flight."""
        stages = [curve.seconds(num_tokens) for curve in self._stages]
        return max(depth * max(stages), sum(stages) + self._hops.seconds(num_tokens), NANOSECONDS)

    def depth(self, num_active_tokens: int, max_step_tokens: int) -> int:
        """Return how many steps should be in flight for so many tokens to compute: decodes and prompt tokens.

        Of the depths within TOLERANCE of the best rate the one closest to the preferred one, which is also the answer
        while nothing has been measured.
        """
        if not self.is_measured:
            return self._preferred_depth
        rates = []
        for depth in range(1, min(MAX_DEPTH_PER_STAGE * self.num_stages, num_active_tokens) + 1):
            num_tokens = min(max_step_tokens, num_active_tokens / depth)
            rates.append(num_tokens * depth / self.round_seconds(depth, num_tokens))
        good_enough = max(rates, default=0.0) * (1 - TOLERANCE)
        good = [depth for depth, rate in enumerate(rates, 1) if rate >= good_enough]
        return min(good, key=lambda depth: abs(depth - self._preferred_depth), default=1)

    def largest_step(self, depth: int, num_decodes: int, target_seconds: float, max_step_tokens: int) -> int:
        """Return how many tokens a step with `num_decodes` may have for decoding sequences to wait at most
        `target_seconds` for their next token, were all `depth` steps as large.

        Where decoding alone takes more than half of that, prompts may double it: they must advance, and a stage that
        is as slow for one token as for many should see them in few pieces.
        """
        allowed = max(target_seconds, 2 * self.round_seconds(depth, num_decodes))
        sizes = range(max_step_tokens + 1)
        largest = bisect_right(sizes, allowed, key=lambda size: self.round_seconds(depth, size)) - 1
        return max(largest, num_decodes + 1)

    def prompt_chunk(self, num_prompt_tokens: int, page_size: int, max_step_tokens: int) -> int:
        """Return how many prompt tokens a step should have for all of them to pass the pipeline soonest.

        n equal pieces take n + (stages - 1) times the slowest stage's time for one. Whole pages, and the most of what
        is within TOLERANCE of the best; before anything was measured, one piece per stage.
        """
        largest = min(max_step_tokens, _round_up(num_prompt_tokens, page_size))
        if not self.is_measured:
            return min(largest, _round_up(num_prompt_tokens / self.num_stages, page_size))

        def makespan(size: int) -> float:
            pieces = max(1.0, num_prompt_tokens / size)
            return (pieces + self.num_stages - 1) * max(curve.seconds(size) for curve in self._stages)

        makespans = {size: makespan(size) for size in range(page_size, largest + 1, page_size)}
        good_enough = min(makespans.values(), default=0.0) * (1 + TOLERANCE)
        return max((size for size, seconds in makespans.items() if seconds <= good_enough), default=largest)


def _round_up(number: float, multiple: int) -> int:
    return max(1, ceil(number / multiple)) * multiple
