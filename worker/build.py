"""From an order to a stage server: device, threads, memory, loader. `worker.actor` runs it in an actor.

Kept apart from the actor because whoever only names the actor's class needs neither torch nor transformers.
"""

from __future__ import annotations

import os
import socket
from functools import partial

import torch

from cluster.clock import SystemClock
from cluster.placement import WorkerInfo
from cluster.wire.tls import Credentials
from worker import checkpoint_client, machine
from worker.loading import TorchSpanLoader
from worker.numerics import isa
from worker.order import WorkerOrder
from worker.server import StageServer


def build_server(order: WorkerOrder, credentials: Credentials | None) -> StageServer:
    """Return the stage server that an order asks for, not yet listening.

    Raises ConfigurationError when this machine cannot use the device.
    """
    device = machine.choose_device(order.num_gpus)
    num_threads = order.num_threads or max(1, machine.num_cores() // order.num_neighbours)
    return StageServer(
        _info(order, device, num_threads),
        TorchSpanLoader(device, partial(checkpoint_client.connect, credentials=credentials)),
        host=order.listen_address,
        ports=order.ports,
        credentials=credentials,
        clock=SystemClock(),
        prepare_thread=lambda: torch.set_num_threads(num_threads),
    )


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
