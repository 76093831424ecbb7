"""The coordinator of one served model: opens its port at once, brings the pipeline up, serves, shuts down.

Covers the process's parts and their lifetime, without Ray; `coordinator.actor` runs it in an actor.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from cluster.clock import Clock
from cluster.config import parse_port_range
from cluster.errors import NotReadyError, SpanwiseError, StageUnavailableError
from cluster.hub.resolve import tokenizer_folder
from cluster.model_spec import FolderSource
from cluster.placement import Placement, WorkerId
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.rpc.v1 import stage_service_pb2_grpc as stage_grpc
from cluster.wire.channels import bind, new_server
from cluster.wire.tls import Credentials
from coordinator import events
from coordinator.admission import Limits
from coordinator.board import StatusBoard
from coordinator.bring_up import BringUp, bring_up, context_limit
from coordinator.checkpoint_server import CheckpointServicer
from coordinator.engine import Engine
from coordinator.flight import FlightLog
from coordinator.intake import Intake
from coordinator.order import CoordinatorOrder
from coordinator.pipeline import Pipeline, PipelineEvent
from coordinator.scheduler import Scheduler
from coordinator.server import GenerationServicer
from coordinator.stage_link import StageLink
from coordinator.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HEALTH_NAME = "cluster.rpc.v1.GenerationService"
DEADLINE_CHECK_SECONDS = 1.0
STOP_GRACE_SECONDS = 1.0
SLOW_DISK_BYTES_PER_SECOND = 50_000_000  # a step's deadline allows for a disk as slow as this


class Coordinator:
    """Owns the servers, the links to the workers, and the engine once there is one."""

    def __init__(self, order: CoordinatorOrder, credentials: Credentials | None, clock: Clock) -> None:
        self._order = order
        self._credentials = credentials
        self._clock = clock
        self._tokenizer = Tokenizer(tokenizer_folder(order.spec), vocab_size=order.spec.vocab_size)
        self.board = StatusBoard(order.spec, has_chat_template=self._tokenizer.has_chat_template, clock=clock)
        limit = context_limit(order.config.max_context, order.spec)
        self._intake = Intake(order.spec, self._tokenizer, max_context=limit, draw_seed=lambda: secrets.randbits(64))
        self._engine: Engine | None = None
        self._pipeline: Pipeline | None = None
        self._failure: str | None = None
        self._links = [
            StageLink(address, credentials, order.node_names.get(address, "")) for address in order.worker_addresses
        ]
        self._servers: list[grpc.aio.Server] = []
        self._health = HealthServicer()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    async def start(self) -> str:
        """Open the client-facing port and begin to bring the pipeline up; return the address that clients dial."""
        config = self._order.config
        server = self._new_generation_server()
        port = bind(server, config.host, range(config.port, config.port + 1) if config.port else range(0), None)
        await server.start()
        self._servers.append(server)
        self._tasks.append(asyncio.create_task(self._live()))
        return f"{config.host}:{port}"

    async def wait_ended(self) -> str | None:
        """Return when the cluster can no longer serve (why), or was shut down (None)."""
        await self._ended.wait()
        return self._failure

    def engine(self) -> Engine:
        """Return the engine. Raises NotReadyError while loading and StageUnavailableError after a failure."""
        if self._failure is not None:
            raise StageUnavailableError(self._failure)
        if self._engine is None or self.board.state == service.CLUSTER_STATE_LOADING:
            raise NotReadyError(f"the model is not ready yet: {self.board.message}")
        if self.board.state == service.CLUSTER_STATE_DRAINING:
            raise NotReadyError("the server is shutting down and takes no new requests", reason="DRAINING")
        return self._engine

    def describe(self) -> service.DescribeClusterResponse:
        """Return state, stages and load, while loading too."""
        return self.board.describe() if self._engine is None else self._engine.describe()

    def fail(self, message: str, stage: int | None = None) -> None:
        """Note that the cluster can no longer serve."""
        if self._failure is not None or self._ended.is_set():
            return
        logger.error("failed: %s", message)
        self._failure = message
        self.board.lose(stage, message)
        if self._engine is not None:
            self._engine.end_all(StageUnavailableError(message))
        self._ended.set()

    def lose_worker(self, worker_id: WorkerId) -> None:
        """Note that a worker's process has died."""
        stage = self.board.stage_of(worker_id)
        where = f"stage {stage} (worker {worker_id})" if stage is not None else f"worker {worker_id}"
        self.fail(f"{where} is lost: its process died", stage)

    async def stop(self) -> None:
        """End every request with a typed error, then every server, stream and channel."""
        self.board.drain()
        if self._engine is not None:
            self._engine.end_all(NotReadyError("the server is shutting down", reason="DRAINING"))
            await self._engine.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop(STOP_GRACE_SECONDS) for server in self._servers))
        if self._pipeline is not None:
            await self._pipeline.close()
        await asyncio.gather(*(link.close() for link in self._links))
        self._ended.set()

    # --- bring-up ----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Bring the pipeline up, then watch over its deadlines."""
        try:
            engine = await self._bring_up()
        except SpanwiseError as error:
            self.fail(str(error))
            return
        except Exception as error:  # the process's top loop: whatever it was must be reported
            logger.exception("bring-up failed")
            self.fail(f"bring-up failed: {type(error).__name__}: {error}")
            return
        while True:
            await asyncio.sleep(DEADLINE_CHECK_SECONDS)
            engine.check_deadlines()

    async def _bring_up(self) -> Engine:
        order = self._order
        job = BringUp(order.config, order.spec, await self._serve_checkpoint(), order.token, order.generation)
        placement, links = await bring_up(job, self._links, self.board)
        self._intake.max_context = placement.max_context
        engine, pipeline = self._new_engine(placement, links)
        self.board.message = "sending a first token through all stages"
        epoch = await pipeline.prove()
        self._engine = engine
        engine.post(events.EpochOpened(epoch, pipeline.num_stages))
        self.board.ready()
        await self._health.set(HEALTH_NAME, health_pb2.HealthCheckResponse.SERVING)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        logger.info("ready")
        return engine

    def _new_engine(self, placement: Placement, links: Sequence[StageLink]) -> tuple[Engine, Pipeline]:
        config = self._order.config
        step_seconds = config.step_timeout + reading_seconds(placement)
        scheduler = Scheduler(
            Limits(
                num_pages=placement.num_pages,
                page_size=placement.page_size,
                max_context=placement.max_context,
                vocab_size=self._order.spec.vocab_size,
                eos_token_ids=self._order.spec.eos_token_ids,
                max_running=config.max_running,
                max_waiting=config.max_waiting,
                max_step_tokens=placement.max_step_tokens,
                inter_token_target=config.inter_token_target,
                step_timeout=step_seconds,
                is_streamed=placement.is_streamed,
            )
        )

        def on_event(event: PipelineEvent) -> None:
            engine.on_pipeline(event)

        pipeline = self._pipeline = Pipeline(placement, links, on_event, canary_seconds=step_seconds)
        engine = Engine(
            scheduler=scheduler,
            pipeline=pipeline,
            tokenizer=self._tokenizer,
            board=self.board,
            clock=self._clock,
            flight=FlightLog([plan.span for plan in placement.stages], config.step_timeout),
            on_failed=self.fail,
        )
        return engine, pipeline

    # --- servers -----------------------------------------------------------------------------------------------------

    def _new_generation_server(self) -> grpc.aio.Server:
        server = new_server()
        service_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(self, self._intake), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((HEALTH_NAME, reflection.SERVICE_NAME), server)
        return server

    async def _serve_checkpoint(self) -> str:
        """Serve the checkpoint folder to workers that do not see it; return host:port, empty for a hub model."""
        source = self._order.spec.source
        if not isinstance(source, FolderSource):
            return ""
        server = new_server()
        servicer = CheckpointServicer(source.path, [file.name for file in self._order.spec.weight_files])
        stage_grpc.add_CheckpointServiceServicer_to_server(servicer, server)
        ports = parse_port_range(self._order.config.stage_ports)
        port = bind(server, self._order.listen_address, ports, self._credentials)
        await server.start()
        self._servers.append(server)
        return f"{self._order.listen_address}:{port}"


def reading_seconds(placement: Placement) -> float:
    """Return how long a step may take to read what is not in memory: where blocks are streamed, keys and values may
    push out the others too. Whether it still moves is watched block by block, so this deadline need not be tight."""
    plans = [plan.memory for plan in placement.stages if plan.memory.ring_bytes or plan.memory.expert_cache_bytes]
    return (
        sum(plan.weight_bytes - plan.small_bytes + plan.streamed_bytes for plan in plans) / SLOW_DISK_BYTES_PER_SECOND
    )
