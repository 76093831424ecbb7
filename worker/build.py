"""From an order to a stage server: device, threads, memory, loader. `worker.actor` runs it in an actor.

Kept apart from the actor because whoever only names the actor's class needs neither torch nor transformers.
"""

from __future__ import annotations

import os
import socket
from functools import partial

import torch

from cluster.clock import SystemClock
from cluster.errors import ConfigurationError
from cluster.placement import WorkerInfo
from cluster.wire.tls import Credentials
from worker import checkpoint_client, machine
from worker.heap import keep_freed_memory
from worker.loading import TorchSpanLoader
from worker.numerics import isa
from worker.order import WorkerOrder
from worker.server import StageServer
from worker.sharing import holders
from worker.sharing.shelf import Shelf


def build_server(order: WorkerOrder, credentials: Credentials | None) -> StageServer:
    """Return the stage server that an order asks for, not yet listening.

    Raises ConfigurationError when this machine cannot use the device or has not the memory.
    """
    keep_freed_memory()
    device = machine.choose_device(order.num_gpus)
    num_threads = order.num_threads or max(1, machine.num_cores() // order.num_neighbours)
    shelf = Shelf()
    return StageServer(
        _info(order, device, num_threads),
        TorchSpanLoader(
            device,
            partial(checkpoint_client.connect, credentials=credentials),
            shelf,
            partial(holders.connect, credentials=credentials),
        ),
        host=order.listen_address,
        ports=order.ports,
        credentials=credentials,
        clock=SystemClock(),
        prepare_thread=lambda: torch.set_num_threads(num_threads),
        shelf=shelf,
    )


def _info(order: WorkerOrder, device: torch.device, num_threads: int) -> WorkerInfo:
    taken = machine.process_bytes()
    host = free = _host_budget(order, taken)
    _, total = machine.host_memory()
    if device.type == "cuda":
        free, total = _gpu_budget(order, device)
    return WorkerInfo(
        worker_id=order.worker_id,
        node_name=socket.gethostname(),
        address="",  # known once the server listens
        device=str(device),
        device_name=machine.device_name(device),
        num_threads=num_threads,
        free_memory_bytes=free,
        total_memory_bytes=total,
        isa=isa(device),
        process_id=os.getpid(),
        versions=machine.package_versions(),
        process_bytes=taken,
        free_host_bytes=host if device.type == "cuda" else 0,
    )


def _host_budget(order: WorkerOrder, taken_bytes: int) -> int:
    """Return the bytes of the machine's memory that are left for the worker, whose process takes some already: what is
    free now has lost them before."""
    if not order.memory_bytes:
        return machine.usable_memory() // order.num_neighbours
    machine.check_memory(order.memory_bytes, order.num_neighbours, taken_bytes)
    return order.memory_bytes - taken_bytes


def _gpu_budget(order: WorkerOrder, device: torch.device) -> tuple[int, int]:
    """Return the bytes of its GPU that the worker may use, and those that the GPU has. Less than a whole GPU is shared
    by the node's workers."""
    free, total = machine.gpu_memory(device)
    if order.gpu_memory_bytes > free:
        raise ConfigurationError(
            f"--gpu-memory gives {order.gpu_memory_bytes / 2**30:.2f} GiB, but {machine.device_name(device)} on "
            f"{socket.gethostname()} has {free / 2**30:.2f} GiB free of {total / 2**30:.2f}"
        )
    return order.gpu_memory_bytes or int(free * machine.MEMORY_SHARE * min(1.0, order.num_gpus)), total
