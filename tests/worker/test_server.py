import asyncio
import gc
import json
import os
import threading
import weakref

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.clock import SystemClock
from cluster.errors import (
    ConfigurationError,
    IncompatibleVersionError,
    NotReadyError,
    StageUnavailableError,
    StalePlacementError,
)
from cluster.microbatch import Epoch
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.testing.executor import FakeSpanLoader
from cluster.version import PROTOCOL_VERSION
from cluster.wire.channels import open_channel
from cluster.wire.status import from_rpc_error
from cluster.wire.workers import loaded_report_from_proto, model_sizes_from_proto, worker_info_from_proto
from tests.worker.stages import FIRST, SECOND, pipeline, serving, step, until, worker_info
from worker import downstream
from worker.server import StageServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def error_of(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


async def health_of(address, name="cluster.rpc.v1.StageService"):
    async with open_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


def new_server(**changes):
    settings = {"host": "127.0.0.1", "ports": range(0), "credentials": None, "clock": SystemClock()}
    return StageServer(worker_info(0), FakeSpanLoader(), **(settings | changes))


async def test_a_hello_tells_who_the_worker_is_and_where_it_listens():
    async with serving(1) as stages:
        response = await stages.callers[0].stub.Hello(service.HelloRequest(protocol_version=PROTOCOL_VERSION))
    info = worker_info_from_proto(response)
    assert info.worker_id == "w0"
    assert info.address == stages.addresses[0]


async def test_a_hello_of_another_protocol_is_refused():
    async with serving(1) as stages:
        hello = service.HelloRequest(protocol_version=PROTOCOL_VERSION + 1, version="9.9.9")
        error = await error_of(stages.callers[0].stub.Hello(hello))
    assert isinstance(error, IncompatibleVersionError)
    assert "9.9.9" in error.message


async def test_a_model_is_measured_from_its_config():
    async with serving(1) as stages:
        request = service.MeasureModelRequest(config_json=json.dumps({"n_layer": 3}))
        sizes = model_sizes_from_proto(await stages.callers[0].stub.MeasureModel(request))
    assert [count.num_parameters for count in sizes.blocks] == [10, 10, 10]
    assert sizes.hidden_size == 8


async def test_the_last_message_of_a_load_tells_what_is_held():
    async with serving(1) as stages:
        told = await stages.callers[0].load(0, 1)
    assert told[-1].is_loaded
    assert loaded_report_from_proto(told[-1]).weight_bytes == 80


async def test_a_long_load_gives_signs_of_life():
    release = threading.Event()
    loader = FakeSpanLoader(on_load=lambda _: release.wait(30))
    async with serving(1, loader) as stages:
        loading = asyncio.create_task(stages.callers[0].load(0, 1))
        await asyncio.wait([loading], timeout=1.2)
        release.set()
        told = await loading
    assert len(told) >= 2
    assert (told[0].bytes_done, told[0].bytes_total) == (10, 20)


async def test_a_failed_load_arrives_as_the_error_that_it_was_and_can_be_repeated():
    def refuse(_order):
        raise ConfigurationError("model-00002-of-00003.safetensors is truncated")

    loader = FakeSpanLoader(on_load=refuse)
    async with serving(1, loader) as stages:
        error = await error_of(stages.callers[0].load(0, 1))
        loader.on_load = lambda _: None
        assert (await stages.callers[0].load(0, 1))[-1].is_loaded
    assert isinstance(error, ConfigurationError)
    assert "truncated" in error.message


async def test_a_load_of_a_newer_epoch_ends_one_under_way():
    release = threading.Event()
    loader = FakeSpanLoader(on_load=lambda _: release.wait(30))
    async with serving(1, loader) as stages:
        older = asyncio.create_task(error_of(stages.callers[0].load(0, 1, FIRST)))
        await until(lambda: loader.num_begun == 1)
        newer = asyncio.create_task(stages.callers[0].load(0, 1, SECOND))
        await until(lambda: stages.servers[0]._newest == SECOND)
        release.set()
        assert "abandoned" in (await older).message
        assert (await newer)[-1].is_loaded


async def test_a_replaced_span_is_freed_before_the_next_is_loaded_though_a_stream_is_still_open():
    loader = FakeSpanLoader()
    async with pipeline(1, loader) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=0))
        await stages.callers[0].report()
        replaced = weakref.ref(loader.loaded.pop(0))
        is_alive = []
        loader.on_load = lambda _: is_alive.append(replaced() is not None)
        await stages.callers[0].load(0, 1, SECOND)
    assert is_alive == [False]


async def test_a_load_of_an_older_epoch_is_refused():
    async with serving(1) as stages:
        await stages.callers[0].load(0, 1, SECOND)
        assert isinstance(await error_of(stages.callers[0].load(0, 1, FIRST)), StalePlacementError)


async def test_nothing_can_be_opened_before_a_span_is_loaded():
    async with serving(1) as stages:
        assert isinstance(await error_of(stages.callers[0].open_epoch(FIRST)), NotReadyError)


async def test_an_older_epoch_is_refused_and_the_same_one_again_is_not():
    async with pipeline(1) as stages:
        await stages.callers[0].open_epoch(SECOND)
        await stages.callers[0].open_epoch(SECOND)
        assert isinstance(await error_of(stages.callers[0].open_epoch(FIRST)), StalePlacementError)
        assert stages.loader.loaded[0].num_epochs == 2


async def test_an_unreachable_next_stage_is_named_with_both_nodes_and_the_port(monkeypatch):
    monkeypatch.setattr(downstream, "CONNECT_SECONDS", 0.2)
    async with serving(2) as stages:
        await stages.callers[0].load(0, 2)
        await stages.servers[1].stop()
        error = await error_of(stages.callers[0].open_epoch(FIRST, stages.addresses[1], "node-1"))
    assert isinstance(error, StageUnavailableError)
    for word in ("node-0", "node-1", stages.addresses[1], "firewall", "--stage-ports", "--interface"):
        assert word in error.message


async def test_an_epoch_can_be_opened_again_after_the_next_stage_was_unreachable(monkeypatch):
    monkeypatch.setattr(downstream, "CONNECT_SECONDS", 0.2)
    async with serving(2) as stages:
        for i, caller in enumerate(stages.callers):
            await caller.load(i, 2)
        await error_of(stages.callers[0].open_epoch(FIRST, "127.0.0.1:1", "node-1"))
        monkeypatch.setattr(downstream, "CONNECT_SECONDS", 10.0)
        await stages.open(FIRST)
        await stages.callers[0].send(step(1, 1, last_stage=1))
        assert (await stages.callers[1].report()).token_ids == (5,)


async def test_watching_an_epoch_that_is_not_open_is_refused():
    async with pipeline(1) as stages:
        stages.callers[0].watch(Epoch(7, 7))
        assert isinstance(await error_of(stages.callers[0].report()), StalePlacementError)


async def test_it_is_healthy_once_an_epoch_is_open():
    async with serving(1) as stages:
        assert await health_of(stages.addresses[0]) == NOT_SERVING
        await stages.callers[0].load(0, 1)
        assert await health_of(stages.addresses[0]) == NOT_SERVING
        await stages.callers[0].open_epoch(FIRST)
        assert await health_of(stages.addresses[0]) == SERVING
        assert await health_of(stages.addresses[0], "") == SERVING
        await stages.callers[0].load(0, 1, SECOND)
        assert await health_of(stages.addresses[0]) == NOT_SERVING


async def test_reflection_lists_the_service():
    async with serving(1) as stages, open_channel(stages.addresses[0]) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        services = [entry.name for entry in (await call.read()).list_services_response.service]
        call.cancel()
    assert "cluster.rpc.v1.StageService" in services


async def test_taken_ports_are_named_and_leave_nothing_behind():
    async with serving(1) as stages:
        port = int(stages.addresses[0].rpartition(":")[2])
        threads = threading.active_count()
        server = new_server(ports=range(port, port + 1))
        with pytest.raises(ConfigurationError, match=str(port)):
            await server.start()
        await server.stop()
        assert threading.active_count() == threads


async def test_nothing_is_left_after_stop():
    async with pipeline() as stages:  # gRPC's own threads and descriptors exist from here on
        await stages.callers[0].send(step(1, 1))
        await stages.callers[-1].report()
    before = await leftovers()
    for _ in range(3):
        async with pipeline() as stages:
            await stages.callers[0].send(step(1, 1))
            await stages.callers[-1].report()
    after = await leftovers()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 3  # gRPC keeps a descriptor or two of its own for a while


async def leftovers():
    """Return this loop's tasks and this process's compute threads and file descriptors."""
    gc.collect()
    for _ in range(20):
        await asyncio.sleep(0)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("compute")]
    return len(asyncio.all_tasks()), threads, len(os.listdir("/proc/self/fd"))


async def test_a_stop_while_computing_ends_the_step_at_its_next_block():
    release, begun = threading.Event(), threading.Event()

    def hold(_stage, _header):
        begun.set()
        release.wait(30)

    async with pipeline(1, FakeSpanLoader(on_execute=hold)) as stages:
        await stages.callers[0].send(step(1, 1, last_stage=0))
        await until(begun.is_set)
        stopping = asyncio.create_task(stages.servers[0].stop())
        await asyncio.sleep(0)
        release.set()
        await stopping
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compute")]
