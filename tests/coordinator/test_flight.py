from cluster.microbatch import Epoch, StepId, StepProgress, StepResult
from cluster.span import Span
from coordinator.flight import FlightLog

EPOCH = Epoch(1, 1)
SPANS = (Span(0, 4), Span(4, 10))


def result(step: int) -> StepResult:
    return StepResult(EPOCH, StepId(step), (), (), ())


def progress(step: int, stage: int, blocks_done: int) -> StepProgress:
    return StepProgress(EPOCH, StepId(step), stage, blocks_done, len(SPANS[stage]))


def test_oldest_step_is_overdue_after_the_timeout() -> None:
    log = FlightLog(SPANS, timeout_seconds=5.0)
    log.note_sent(StepId(1), 10.0)
    log.note_sent(StepId(2), 14.0)
    assert log.overdue(15.0) is None
    overdue = log.overdue(15.1)
    assert overdue is not None
    assert overdue.step_id == 1
    log.note_finished(result(1), 15.1)
    assert log.overdue(20.0) is None
    assert log.overdue(20.2) is not None


def test_progress_counts_the_blocks_of_all_stages_before() -> None:
    log = FlightLog(SPANS, timeout_seconds=5.0)
    log.note_sent(StepId(1), 0.0)
    assert log.blocks_done(StepId(1)) == (0, 10)
    log.note_progress(progress(1, 0, 3), 0.0)
    assert log.blocks_done(StepId(1)) == (3, 10)
    log.note_progress(progress(1, 1, 2), 0.0)
    assert log.blocks_done(StepId(1)) == (6, 10)
    log.note_progress(progress(1, 0, 4), 0.0)
    assert log.blocks_done(StepId(1)) == (6, 10)


def test_unknown_steps_have_no_progress() -> None:
    log = FlightLog(SPANS, timeout_seconds=5.0)
    log.note_progress(progress(7, 0, 1), 0.0)
    assert log.blocks_done(None) == (0, 10)
    assert log.blocks_done(StepId(7)) == (0, 10)


def test_given_up_steps_are_not_overdue() -> None:
    log = FlightLog(SPANS, timeout_seconds=5.0)
    log.note_sent(StepId(1), 0.0)
    log.clear()
    assert len(log) == 0
    assert log.overdue(100.0) is None


def test_a_step_that_passes_blocks_is_never_overdue_and_one_that_stands_still_is() -> None:
    log = FlightLog(SPANS, timeout_seconds=5.0)
    log.note_sent(StepId(1), 0.0)
    for block in range(1, 5):
        log.note_progress(progress(1, 0, block), 4.0 * block)
        assert log.overdue(4.0 * block + 4.9) is None
    log.note_progress(progress(1, 0, 4), 20.0)  # a sign of life, but no further block
    assert log.overdue(21.1) is not None
