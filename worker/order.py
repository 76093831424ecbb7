"""The order to start a worker: what crosses from the command to its process. A value, and nothing heavy to import."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.placement import WorkerId


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """How a worker starts. `num_neighbours` workers share its node, itself included."""

    worker_id: WorkerId
    listen_address: str
    ports: range
    num_neighbours: int
    num_threads: int  # 0: the node's cores, shared
    num_gpus: float
    memory_bytes: int  # that the whole process may take; 0: what is free, shared, with a margin
    log_dir: str
    is_log_json: bool
    certificate: bytes = b""  # PEM; empty: plaintext
    authority: bytes = b""  # PEM of the cluster's own certificate authority
    gpu_memory_bytes: int = 0  # of its GPU; 0: likewise
