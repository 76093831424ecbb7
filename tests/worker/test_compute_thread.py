import threading

import pytest

from worker.compute_thread import ComputeThread


@pytest.fixture
async def compute():
    thread = ComputeThread("compute-test", lambda: None)
    yield thread
    await thread.stop(5)


async def test_jobs_run_in_order_in_one_thread(compute):
    ran = []
    for number in range(100):
        compute.submit(lambda number=number: ran.append((number, threading.current_thread().name)))
    await compute.run(lambda: None)
    assert ran == [(number, "compute-test") for number in range(100)]


async def test_what_a_function_returns_or_raises_arrives(compute):
    assert await compute.run(lambda: 6 * 7) == 42
    with pytest.raises(KeyError):
        await compute.run(lambda: {}["missing"])


async def test_the_thread_is_prepared_before_its_first_job():
    prepared = threading.local()
    thread = ComputeThread("compute-test", lambda: setattr(prepared, "value", 7))
    assert await thread.run(lambda: prepared.value) == 7
    await thread.stop(5)


async def test_stop_lets_queued_jobs_finish_and_joins_the_thread():
    thread = ComputeThread("compute-joined", lambda: None)
    ran = []
    thread.submit(lambda: ran.append(1))
    await thread.stop(5)
    assert ran == [1]
    assert "compute-joined" not in [t.name for t in threading.enumerate()]


async def test_stop_does_not_wait_for_a_job_that_never_ends():
    release = threading.Event()
    thread = ComputeThread("compute-stuck", lambda: None)
    thread.submit(lambda: release.wait(30) and None)
    await thread.stop(0.01)
    stuck = [t for t in threading.enumerate() if t.name == "compute-stuck"]
    release.set()
    for left in stuck:
        left.join()
