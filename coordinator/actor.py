"""The Ray side of the coordinator: an actor that owns one Coordinator. Nothing of a request passes through here."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import ray

from cluster.clock import SystemClock
from cluster.logs import configure_logging
from cluster.placement import NodeFacts, WorkerId
from cluster.version import VERSION
from cluster.wire.interfaces import address_of
from cluster.wire.tls import SigningRequest
from coordinator.order import CoordinatorOrder

if TYPE_CHECKING:
    from coordinator.coordinator import Coordinator


class CoordinatorActor:
    """The coordinator process. Its methods are called a few times in its life."""

    def __init__(self) -> None:
        from coordinator.coordinator import Coordinator  # heavy: in this process only, while the workers start

        self._new_coordinator = Coordinator
        self._coordinator: Coordinator | None = None
        self._signing: SigningRequest | None = None
        self._stopped = asyncio.Event()

    async def locate(self, interface: str) -> NodeFacts:
        """Tell where the coordinator runs and under which address the workers reach it."""
        node_id = ray.get_runtime_context().get_node_id()
        address = address_of(interface) if interface else str(ray.util.get_node_ip_address())
        return NodeFacts(node_id, socket.gethostname(), address, VERSION)

    async def request_signature(self, address: str) -> bytes:
        """Make a key, keep it, and return the PEM signing request for it."""
        self._signing = SigningRequest.create(socket.gethostname(), addresses=(address,))
        return self._signing.pem

    async def start(self, order: CoordinatorOrder) -> str:
        """Open the client-facing port, begin to bring the pipeline up; return the address that clients dial."""
        configure_logging(order.config.log_dir, "coordinator", json=order.config.log_json)
        credentials = self._signing.credentials(order.certificate, order.authority) if self._signing else None
        self._coordinator = self._new_coordinator(order, credentials, SystemClock())
        return await self._coordinator.start()

    async def report_loss(self, worker_id: WorkerId) -> None:
        """Take Ray's notice that a worker died."""
        if self._coordinator is not None:
            self._coordinator.lose_worker(worker_id)

    async def wait_stopped(self) -> None:
        """Return once the coordinator was shut down."""
        await self._stopped.wait()

    async def shutdown(self) -> None:
        """End requests, servers and channels."""
        if self._coordinator is not None:
            await self._coordinator.stop()
        self._stopped.set()
