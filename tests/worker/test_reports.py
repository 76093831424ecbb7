import asyncio

from cluster.microbatch import Epoch, StepFailure, StepId, StepProgress
from worker.reports import MAX_KEPT, Reports

EPOCH = Epoch(1, 1)


def failure(step_id: int) -> StepFailure:
    return StepFailure(EPOCH, StepId(step_id), 0, "InvariantError", "why")


def progress(blocks_done: int) -> StepProgress:
    return StepProgress(EPOCH, StepId(1), 0, blocks_done, 8)


async def read_all(reports: Reports) -> list[int]:
    return [report.step_id async for report in reports.watch()]


async def test_reports_are_read_in_order_and_end_with_the_epoch():
    reports = Reports()
    for step_id in (1, 2, 3):
        reports.put(failure(step_id))
    reports.close()
    assert await read_all(reports) == [1, 2, 3]


async def test_a_report_whose_delivery_was_cut_off_is_delivered_again():
    reports = Reports()
    reports.put(failure(1))
    cut_off = reports.watch()
    assert (await anext(cut_off)).step_id == 1
    await cut_off.aclose()
    reports.close()
    assert await read_all(reports) == [1]


async def test_a_newer_watch_ends_the_one_before():
    reports = Reports()
    older = asyncio.create_task(read_all(reports))
    await asyncio.sleep(0)
    newer = asyncio.create_task(read_all(reports))
    assert await older == []
    reports.put(failure(7))
    reports.close()
    assert await newer == [7]


async def test_only_the_last_of_successive_signs_of_progress_is_kept():
    reports = Reports()
    reports.put(failure(1))
    for blocks_done in range(5):
        reports.put(progress(blocks_done))
    reports.close()
    assert [report async for report in reports.watch()] == [failure(1), progress(4)]


async def test_the_newest_reports_are_kept_when_nobody_reads():
    reports = Reports()
    for step_id in range(MAX_KEPT + 10):
        reports.put(failure(step_id))
    reports.close()
    assert await read_all(reports) == list(range(10, MAX_KEPT + 10))
