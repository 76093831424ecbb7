import asyncio
import threading

import grpc
import pytest

from cluster.errors import OverloadedError, StalePlacementError
from cluster.microbatch import Epoch, StepFailure, StepProgress, StepResult
from cluster.rpc.v1 import stage_pb2
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.testing.executor import FakeSpanLoader
from cluster.wire.status import from_rpc_error
from cluster.wire.steps import header_to_proto
from cluster.wire.tls import CertificateAuthority, SigningRequest
from tests.worker.stages import BLOCKS_PER_STAGE, FIRST, SECOND, pipeline, prompt_step, step, step_ids
from worker import relay


class Gate:
    """Holds the steps of one stage in its compute thread until released, one at a time or all."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.num_arrived = 0
        self._loop = asyncio.get_running_loop()
        self._arrival = asyncio.Event()

    def __call__(self, stage, _header):
        if stage == self._stage and not self._is_open:
            self.num_arrived += 1
            self._loop.call_soon_threadsafe(self._arrival.set)
            assert self._permits.acquire(timeout=30)

    async def arrived(self):
        """Wait until a step is held."""
        await self._arrival.wait()
        self._arrival.clear()

    def open(self):
        """Let everything pass from now on."""
        self._is_open = True
        self._permits.release(1000)


def failing(stage, step_id, error):
    """Return a hook that raises `error` when a stage computes a step."""

    def hook(at, header):
        if (at, header.step_id) == (stage, step_id):
            raise error

    return hook


async def reports_of(caller, count):
    return [await caller.report() for _ in range(count)]


# --- steps pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_tokens_pass_every_block_once(num_stages):
    async with pipeline(num_stages) as stages:
        await stages.callers[0].send(step(1, 10, 20, 30, last_stage=num_stages - 1))
        result = await stages.callers[-1].report()
    added = num_stages * BLOCKS_PER_STAGE
    assert isinstance(result, StepResult)
    assert result.token_ids == (10 + added, 20 + added, 30 + added)
    assert result.sequence_ids == (0, 1, 2)


async def test_results_come_in_step_order_with_many_steps_in_flight():
    async with pipeline() as stages:
        await stages.callers[0].send(*(step(i, i) for i in range(1, 101)))
        results = await reports_of(stages.callers[-1], 100)
    assert step_ids(results) == list(range(1, 101))
    assert [result.token_ids[0] for result in results] == [i + 6 for i in range(1, 101)]


async def test_stages_compute_different_steps_at_the_same_time():
    loader = FakeSpanLoader()
    barrier = threading.Barrier(2)  # stage 0 with step 2 and stage 1 with step 1 must meet

    def meet(stage, header):
        if (stage, header.step_id) in ((0, 2), (1, 1)):
            barrier.wait(timeout=30)

    loader.on_execute = meet
    async with pipeline(2, loader) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=1), step(2, 2, last_stage=1))
        assert step_ids(await reports_of(stages.callers[-1], 2)) == [1, 2]


async def test_timings_of_every_stage_arrive_with_the_result():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 5))
        timings = (await stages.callers[-1].report()).timings
    assert [timing.stage for timing in timings] == [0, 1, 2]
    for timing in timings:
        assert timing.received_ns <= timing.started_ns <= timing.finished_ns
    assert timings[0].finished_ns <= timings[1].received_ns
    assert [timing.received_bytes for timing in timings] == [0, 32, 32]


async def test_a_step_may_end_before_the_last_stage():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 7, last_stage=1))
        assert (await stages.callers[1].report()).token_ids == (7 + 2 * BLOCKS_PER_STAGE,)


async def test_a_payload_of_64_mebibytes_passes():
    num_tokens = 8192
    async with pipeline(2, FakeSpanLoader(hidden_size=2048)) as stages:
        await stages.callers[0].send(prompt_step(1, num_tokens, last_stage=1), step(2, 3, last_stage=1))
        results = await reports_of(stages.callers[-1], 2)
    assert results[0].token_ids == (num_tokens - 1 + 2 * BLOCKS_PER_STAGE,)
    assert results[0].timings[1].received_bytes == 64 * 1024**2
    assert results[1].token_ids == (3 + 2 * BLOCKS_PER_STAGE,)


async def test_each_step_is_acknowledged_when_it_was_received_whole():
    gate = Gate(stage=0)
    async with pipeline(1, FakeSpanLoader(on_execute=gate)) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=0), step(2, 2, last_stage=0))
        assert [await stages.callers[0].acknowledged() for _ in range(2)] == [1, 2]
        gate.open()


async def test_only_so_many_steps_are_taken_before_they_are_computed(monkeypatch):
    monkeypatch.setattr(relay, "MAX_STEPS_HELD", 3)
    gate = Gate(stage=0)
    async with pipeline(1, FakeSpanLoader(on_execute=gate)) as stages:
        caller = stages.callers[0]
        await caller.send(*(step(i, i, last_stage=0) for i in range(1, 6)))
        assert [await caller.acknowledged() for _ in range(3)] == [1, 2, 3]
        fourth = asyncio.create_task(caller.acknowledged())
        await gate.arrived()
        assert not fourth.done()
        gate.open()
        assert await fourth == 4
        assert step_ids(await reports_of(caller, 5)) == [1, 2, 3, 4, 5]


async def test_a_pipeline_with_mutual_tls_passes_steps():
    authority = CertificateAuthority.create()
    request = SigningRequest.create("node", addresses=("127.0.0.1",))
    credentials = request.credentials(authority.sign(request.pem), authority.certificate)
    async with pipeline(credentials=credentials) as stages:
        await stages.callers[0].send(step(1, 1))
        assert (await stages.callers[-1].report()).token_ids == (7,)


# --- steps fail, and say so ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_an_exception_while_computing_is_reported_by_its_stage(stage):
    async with pipeline(loader=FakeSpanLoader(on_execute=failing(stage, 1, OverloadedError("out of pages")))) as stages:
        await stages.callers[0].send(step(1, 5))
        failure = await stages.callers[stage].report()
    assert failure == StepFailure(FIRST, 1, stage, "OverloadedError", "out of pages", is_stage_lost=False)


async def test_a_foreign_exception_is_reported_as_our_bug_with_its_name():
    async with pipeline(loader=FakeSpanLoader(on_execute=failing(1, 1, RuntimeError("mat1 and mat2")))) as stages:
        await stages.callers[0].send(step(1, 5))
        failure = await stages.callers[1].report()
    assert failure.reason == "InvariantError"
    assert "RuntimeError: mat1 and mat2" in failure.message


async def test_after_a_failure_every_further_step_of_the_epoch_fails():
    async with pipeline(loader=FakeSpanLoader(on_execute=failing(1, 2, OverloadedError("full")))) as stages:
        await stages.callers[0].send(*(step(i, i) for i in range(1, 5)))
        failures = await reports_of(stages.callers[1], 3)
        assert step_ids(failures) == [2, 3, 4]
        assert (await stages.callers[2].report()).step_id == 1
        assert stages.loader.loaded[1].steps == [1, 2]


async def test_a_gap_in_the_step_ids_is_reported():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 1), step(3, 3))
        failure = await stages.callers[0].report()
    assert failure.step_id == 3
    assert "step 3 came where step 2 was due" in failure.message


async def test_a_step_past_its_deadline_is_not_computed():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 1, deadline_ms=0))
        failure = await stages.callers[0].report()
        assert stages.loader.loaded[0].steps == []
    assert failure.reason == "StageTimeoutError"


async def test_the_time_that_a_stage_takes_is_taken_from_the_deadline():
    lefts = []

    def note(_stage, header):
        lefts.append(header.deadline_ms)

    async with pipeline(2, FakeSpanLoader(on_execute=note)) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=1, deadline_ms=60_000))
        await stages.callers[1].report()
    assert lefts[0] == 60_000
    assert 0 < lefts[1] < 60_000


@pytest.mark.parametrize(
    "messages",
    [
        [service.ForwardRequest(piece=stage_pb2.TensorPiece(data=b"garbage"))],
        [service.ForwardRequest()],
        [
            service.ForwardRequest(
                header=header_to_proto(step(1, 1)),
                tensors=[stage_pb2.TensorSpec(name="hidden_states", dtype="float32", shape=[1, 8])],
                piece=stage_pb2.TensorPiece(offset=4, data=b"1234"),
            )
        ],
        [
            service.ForwardRequest(
                header=header_to_proto(step(1, 1)),
                tensors=[stage_pb2.TensorSpec(name="hidden_states", dtype="complex64", shape=[1, 8])],
            )
        ],
        [
            service.ForwardRequest(
                header=header_to_proto(step(1, 1)),
                tensors=[stage_pb2.TensorSpec(name="hidden_states", dtype="float32", shape=[1, 8])],
            ),
            service.ForwardRequest(header=header_to_proto(step(2, 1))),
        ],
    ],
    ids=["piece-first", "empty", "piece-out-of-place", "unknown-dtype", "cut-short"],
)
async def test_messages_that_make_no_step_are_a_failure_of_the_step_that_was_due(messages):
    async with pipeline() as stages:
        await stages.callers[0].send(*messages)
        failure = await stages.callers[0].report()
    assert (failure.step_id, failure.reason) == (1, "InvalidRequestError")


async def test_a_lost_next_stage_is_reported_as_lost():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 1))
        await stages.callers[-1].report()
        await stages.servers[1].stop()
        failure = await stages.callers[0].report()
        assert failure.is_stage_lost
        assert "node-1" in failure.message
        assert stages.addresses[1] in failure.message
        await stages.callers[0].send(step(2, 2))
        assert (await stages.callers[0].report()).step_id == 2


async def test_a_step_that_a_lost_stage_was_computing_is_reported_by_the_stage_before():
    gate = Gate(stage=1)
    async with pipeline(loader=FakeSpanLoader(on_execute=gate)) as stages:
        await stages.callers[0].send(step(1, 1))
        await gate.arrived()
        stopping = asyncio.create_task(stages.servers[1].stop())
        failure = await stages.callers[0].report()
        gate.open()
        await stopping
    assert failure.is_stage_lost
    assert failure.step_id == 1


async def test_a_lost_coordinator_stops_nothing():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 1))
        await stages.callers[-1].report()
        stages.callers[0].hang_up()
        await stages.open(SECOND)
        await stages.callers[0].send(step(1, 2, epoch=SECOND))
        assert (await stages.callers[-1].report()).token_ids == (8,)


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [FIRST, Epoch(2, 1)], ids=["older", "never-opened"])
async def test_a_step_of_another_epoch_is_refused(epoch):
    async with pipeline() as stages:
        await stages.open(SECOND)
        await stages.callers[0].send(step(1, 1, epoch=epoch))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stages.callers[0].acknowledged()
        assert isinstance(from_rpc_error(refused.value), StalePlacementError)
        assert stages.loader.loaded[0].steps == []


async def test_a_new_epoch_forgets_sequences_and_counts_steps_from_1():
    async with pipeline() as stages:
        await stages.callers[0].send(step(1, 1), step(2, 2))
        await reports_of(stages.callers[-1], 2)
        await stages.open(SECOND)
        stages.callers[0].hang_up()
        await stages.callers[0].send(step(1, 1, epoch=SECOND))
        assert (await stages.callers[-1].report()).epoch == SECOND
        assert [executor.num_epochs for executor in stages.loader.loaded.values()] == [2, 2, 2]


async def test_a_new_epoch_ends_the_step_under_way_at_its_next_block():
    gate = Gate(stage=0)
    async with pipeline(1, FakeSpanLoader(on_execute=gate)) as stages:
        caller = stages.callers[0]
        await caller.send(step(1, 1, last_stage=0), step(2, 2, last_stage=0))
        await gate.arrived()
        older = caller.watching
        opening = asyncio.create_task(stages.open(SECOND))
        assert await older.read() is grpc.aio.EOF  # the old epoch is closed, its step still under way
        gate.open()
        await opening
        caller.hang_up()
        await caller.send(step(1, 9, epoch=SECOND, last_stage=0))
        result = await caller.report()
    assert (result.epoch, result.token_ids) == (SECOND, (9 + BLOCKS_PER_STAGE,))


# --- watching --------------------------------------------------------------------------------------------------------


async def test_reports_wait_until_somebody_watches():
    async with pipeline(1) as stages:
        caller = stages.callers[0]
        caller.watching.cancel()
        await caller.send(*(step(i, i, last_stage=0) for i in (1, 2, 4)))
        assert [await caller.acknowledged() for _ in range(3)] == [1, 2, 4]
        caller.watch()
        reports = await reports_of(caller, 3)
    assert sorted(step_ids(reports)) == [1, 2, 4]


async def test_a_new_watch_takes_over_from_one_whose_caller_may_be_gone():
    async with pipeline(1) as stages:
        caller = stages.callers[0]
        older = caller.watching
        caller.watch()
        assert await older.read() is grpc.aio.EOF
        await caller.send(step(1, 1, last_stage=0))
        assert (await caller.report()).step_id == 1


async def test_a_watch_ends_when_its_epoch_is_replaced():
    async with pipeline() as stages:
        older = stages.callers[1].watching
        await stages.open(SECOND)
        assert await older.read() is grpc.aio.EOF


async def test_a_long_step_gives_signs_of_life(monkeypatch):
    monkeypatch.setitem(relay.Relay.__init__.__kwdefaults__, "progress_seconds", 0.01)
    gate = Gate(stage=0)
    async with pipeline(1, FakeSpanLoader(on_execute=gate)) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=0))
        progress = await stages.callers[0].report()
        gate.open()
    assert progress == StepProgress(FIRST, 1, 0, 0, BLOCKS_PER_STAGE)
