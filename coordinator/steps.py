"""The steps of one epoch: when to form one, what goes into it, which are in flight.

Everything here ends with the epoch: step ids, times, steps in flight, and the finished sequences that stages still
have to be told of. Covers the numbers; `batching` fills a step, `scheduler` decides what a result means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.microbatch import Epoch, StageTiming, StepHeader, StepId, StepResult
from cluster.request import SequenceId
from coordinator.admission import Limits
from coordinator.batching import Microbatch
from coordinator.depth import NANOSECONDS, PipelineTimes
from coordinator.sequences import RequestRecord, RunningSequences
from coordinator.story import Story

GATHER_SECONDS = 0.05
"""How long a pipeline that reads its weights from disk waits for company of the first request: each pass takes many
times that, and whoever misses one waits for the next."""


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was sent and has not ended."""

    header: StepHeader
    microbatch: Microbatch
    sent_at: float


class EpochSteps:
    """Forms steps while fewer are in flight than keep the slowest stage busy, and takes their results in order."""

    def __init__(self, epoch: Epoch, num_stages: int, limits: Limits, story: Story) -> None:
        self.epoch = epoch
        self.in_flight: deque[StepInFlight] = deque()
        self._num_stages = num_stages
        self._limits = limits
        self._story = story
        self._times = PipelineTimes(num_stages, is_streamed=limits.is_streamed)
        self._num_formed = 0
        self._finished: list[SequenceId] = []  # to be told with the next step
        self._is_gathering = False

    def forget(self, sequence_id: SequenceId) -> None:
        """Have the next step tell the stages that a sequence has ended."""
        self._finished.append(sequence_id)

    def begin_gathering(self, running: RunningSequences) -> bool:
        """Tell whether to wait for more requests from now on, until `end_gathering`: weights are read from disk at
        every step, and there is nothing to compute but prompts that have just come."""
        if self._is_gathering or self.in_flight or running.num_decoding or not running.prefilling:
            return False
        self._is_gathering = self._limits.is_streamed
        return self._is_gathering

    def end_gathering(self) -> None:
        """Let steps be formed again."""
        self._is_gathering = False

    def form(self, running: RunningSequences, now: float) -> Iterator[StepHeader]:
        """Take from the running sequences as many steps as should be sent now."""
        if self._is_gathering:
            return
        while len(self.in_flight) < (depth := self.depth(running)):
            microbatch = self._next_microbatch(running, depth)
            if not microbatch:
                return
            yield self._send(microbatch, now)

    def depth(self, running: RunningSequences) -> int:
        """Return how many steps should be in flight for what there is to compute."""
        num_active_tokens = running.num_decoding + self._prompt_backlog(running)
        return self._times.depth(num_active_tokens, self._limits.max_step_tokens)

    def complete(self, result: StepResult, now: float) -> Microbatch:
        """Take the oldest step's result and return what the step was made of.

        Raises InvariantError when the result is not that step's.
        """
        if not self.in_flight or self.in_flight[0].header.step_id != result.step_id:
            expected = self.in_flight[0].header.step_id if self.in_flight else "none"
            raise self._story.error(f"result of step {result.step_id} while the oldest in flight is {expected}")
        step = self.in_flight.popleft()
        sampled = tuple([sequence.sequence_id for sequence in step.microbatch.sampled])
        if result.sequence_ids != sampled or len(result.token_ids) != len(sampled):
            raise self._story.error(
                f"step {result.step_id} was to sample {sampled}, its result has {len(result.token_ids)} tokens "
                f"for {result.sequence_ids}"
            )
        self._times.observe(step.header.num_tokens, result.timings, now - step.sent_at)
        _share_timings(step.microbatch, result.timings)
        return step.microbatch

    def oldest_step_of(self, record: RequestRecord) -> StepId | None:
        """Return the oldest step in flight with a slice of this request."""
        for step in self.in_flight:
            if any(sequence.owner is record for sequence in step.microbatch.sequences):
                return step.header.step_id
        return None

    def _prompt_backlog(self, running: RunningSequences) -> int:
        """Prompt tokens to compute, those in flight included: shares of it must not shrink as it is scheduled."""
        in_flight = sum(step.microbatch.num_prompt_tokens for step in self.in_flight)
        return running.num_prompt_tokens_left() + in_flight

    def _next_microbatch(self, running: RunningSequences, depth: int) -> Microbatch:
        microbatch = Microbatch()
        max_decodes = self._limits.max_step_tokens
        if running.prefilling:  # however many decode, prompts advance
            max_decodes = max(1, max_decodes // 2)
        group = -(-running.num_decoding // depth)
        microbatch.add_decodes(running.ready, min(group, max_decodes))
        if running.prefilling:
            microbatch.add_chunks(running.prefilling, self._prompt_budget(running, microbatch, depth, group))
        return microbatch

    def _prompt_budget(self, running: RunningSequences, microbatch: Microbatch, depth: int, group: int) -> int:
        """Return how many prompt tokens the microbatch may have: what brings the whole backlog through soonest, within
        the step's limit, and within the inter-token target while others decode. Where weights are read from disk at
        every step, all that the step's limit allows: each further piece would read them again."""
        largest = self._limits.max_step_tokens
        if self._limits.is_streamed:
            return largest - len(microbatch.decodes)
        if running.num_decoding:
            largest = self._times.largest_step(depth, group, self._limits.inter_token_target, largest)
        chunk = self._times.prompt_chunk(self._prompt_backlog(running), self._limits.page_size, largest)
        return min(largest - len(microbatch.decodes), chunk)

    def _send(self, microbatch: Microbatch, now: float) -> StepHeader:
        self._num_formed += 1
        header = microbatch.header(
            self.epoch,
            StepId(self._num_formed),
            deadline_ms=int(self._limits.step_timeout * 1000),
            last_stage=self._num_stages - 1,
            finished_sequence_ids=self._finished,
        )
        self._finished = []
        microbatch.advance()
        self.in_flight.append(StepInFlight(header, microbatch, now))
        self._story.note(now, f"step {header.step_id} sent: {len(header.sequence_ids)} slices")
        return header


def _share_timings(microbatch: Microbatch, timings: Sequence[StageTiming]) -> None:
    """Add a step's seconds at every stage to each of its requests."""
    seconds: list[float] = []
    for timing in timings:
        seconds.append((timing.finished_ns - timing.started_ns) * NANOSECONDS)
        seconds.append((timing.started_ns - timing.received_ns) * NANOSECONDS)
    for owner in dict.fromkeys(sequence.owner for sequence in microbatch.sequences):
        before = owner.stage_seconds or [0.0] * len(seconds)
        owner.stage_seconds = [a + b for a, b in zip(before, seconds, strict=True)]
