"""The Ray side of a worker: an actor that owns one stage server.

Covers placement on a node, keys, start and stop. Nothing of a step passes through here.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import ray

from cluster.logs import configure_logging
from cluster.placement import NodeFacts
from cluster.version import VERSION
from cluster.wire.interfaces import address_of
from cluster.wire.tls import Credentials, SigningRequest
from worker.order import WorkerOrder
from worker.spinning import limit_spinning

if TYPE_CHECKING:
    from worker.server import StageServer


class WorkerActor:
    """One worker process. Its methods are called a few times in its life, never per step."""

    def __init__(self) -> None:
        limit_spinning(os.environ)
        from worker.build import build_server  # torch and transformers: in this process only, while others start too

        self._build_server = build_server
        self._server: StageServer | None = None
        self._signing: SigningRequest | None = None
        self._stopped = asyncio.Event()

    async def locate(self, interface: str) -> NodeFacts:
        """Tell where this worker runs and under which address neighbours reach it."""
        context = ray.get_runtime_context()
        address = address_of(interface) if interface else str(ray.util.get_node_ip_address())
        return NodeFacts(context.get_node_id(), socket.gethostname(), address, VERSION)

    async def request_signature(self, address: str, node_name: str) -> bytes:
        """Make a key, keep it, and return the PEM signing request for it."""
        self._signing = SigningRequest.create(node_name, addresses=(address,))
        return self._signing.pem

    async def start(self, order: WorkerOrder) -> str:
        """Start the stage server; return the host:port that neighbours dial."""
        configure_logging(order.log_dir, f"worker-{order.worker_id}", json=order.is_log_json)
        self._server = self._build_server(order, self._credentials(order))
        return await self._server.start()

    async def wait_stopped(self) -> None:
        """Return once this worker was shut down; a caller that gets Ray's death notice instead knows that it died."""
        await self._stopped.wait()

    async def shutdown(self) -> None:
        """Stop the stage server and free what it holds."""
        if self._server is not None:
            await self._server.stop()
            self._server = None
        self._stopped.set()

    def _credentials(self, order: WorkerOrder) -> Credentials | None:
        if not order.certificate or self._signing is None:
            return None
        return self._signing.credentials(order.certificate, order.authority)
