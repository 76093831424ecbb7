"""The Ray side of a worker: an actor that owns one stage server.

Covers placement on a node, keys, start and stop. Nothing of a step passes through here.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from functools import partial

import psutil
import ray
import torch

from cluster.clock import SystemClock
from cluster.errors import ConfigurationError
from cluster.logs import configure_logging
from cluster.placement import NodeFacts, WorkerId, WorkerInfo
from cluster.wire.tls import Credentials, SigningRequest
from worker import checkpoint_client, machine
from worker.loading import TorchSpanLoader
from worker.numerics import isa
from worker.server import StageServer


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """How a worker starts. `num_neighbours` workers share its node, itself included."""

    worker_id: WorkerId
    listen_address: str
    ports: range
    num_neighbours: int
    num_threads: int  # 0: the node's cores, shared
    num_gpus: float
    memory_bytes: int  # 0: what is free, shared, with a margin
    log_dir: str
    is_log_json: bool
    certificate: bytes = b""  # PEM; empty: plaintext
    authority: bytes = field(default=b"")  # PEM of the cluster's own certificate authority


class WorkerActor:
    """One worker process. Its methods are called a few times in its life, never per step."""

    def __init__(self) -> None:
        self._server: StageServer | None = None
        self._signing: SigningRequest | None = None
        self._stopped = asyncio.Event()

    async def locate(self, interface: str) -> NodeFacts:
        """Tell where this worker runs and under which address neighbours reach it."""
        context = ray.get_runtime_context()
        address = _address_of(interface) if interface else str(ray.util.get_node_ip_address())
        return NodeFacts(context.get_node_id(), socket.gethostname(), address)

    async def request_signature(self, address: str, node_name: str) -> bytes:
        """Make a key, keep it, and return the PEM signing request for it."""
        self._signing = SigningRequest.create(node_name, addresses=(address,))
        return self._signing.pem

    async def start(self, order: WorkerOrder) -> str:
        """Start the stage server; return the host:port that neighbours dial."""
        name = f"worker-{order.worker_id}"
        configure_logging(order.log_dir, name, json=order.is_log_json)
        device = machine.choose_device(order.num_gpus)
        num_threads = order.num_threads or max(1, machine.num_cores() // order.num_neighbours)
        credentials = self._credentials(order)
        self._server = StageServer(
            _info(order, device, num_threads),
            TorchSpanLoader(device, partial(checkpoint_client.connect, credentials=credentials)),
            host=order.listen_address,
            ports=order.ports,
            credentials=credentials,
            clock=SystemClock(),
            prepare_thread=lambda: torch.set_num_threads(num_threads),
        )
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


def _info(order: WorkerOrder, device: torch.device, num_threads: int) -> WorkerInfo:
    free, total = machine.device_memory(device)
    budget = order.memory_bytes or int(free * machine.MEMORY_SHARE) // order.num_neighbours
    return WorkerInfo(
        worker_id=order.worker_id,
        node_name=socket.gethostname(),
        address="",  # known once the server listens
        device=str(device),
        device_name=machine.device_name(device),
        num_threads=num_threads,
        free_memory_bytes=budget,
        total_memory_bytes=total,
        isa=isa(device),
        process_id=os.getpid(),
        versions=machine.package_versions(),
    )


def _address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface; an address is returned as it is."""
    known = psutil.net_if_addrs()
    if interface not in known:
        if interface.count(".") == 3:
            return interface
        raise ConfigurationError(
            f"{socket.gethostname()} has no network interface {interface!r}; it has {', '.join(sorted(known))}"
        )
    for entry in known[interface]:
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise ConfigurationError(f"network interface {interface!r} of {socket.gethostname()} has no IPv4 address")
