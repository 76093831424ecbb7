from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
import torch

from cluster.errors import NotFoundError, StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.rpc.v1.stage_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from coordinator.checkpoint_server import CheckpointServicer
from tests.small_checkpoints import order_for, tensors_of_blocks, write_sharded
from worker.checkpoint_client import connect_plaintext
from worker.weights import fetch_checkpoint


async def test_worker_gets_its_span_from_a_folder_that_only_the_head_has(tmp_path: Path) -> None:
    spec = resolve(str(write_sharded(tmp_path / "head")))
    (tmp_path / "head").rename(tmp_path / "moved")
    server = grpc.aio.server()
    servicer = CheckpointServicer(str(tmp_path / "moved"), [file.name for file in spec.weight_files])
    add_CheckpointServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    order = order_for(spec, checkpoint_service=f"127.0.0.1:{port}")
    checkpoint = await asyncio.to_thread(
        fetch_checkpoint, order, lambda name: name.startswith("h.1."), lambda _: None, cache_folder=tmp_path / "cache"
    )
    with checkpoint:
        assert torch.equal(checkpoint.tensor("h.1.weight"), tensors_of_blocks()["h.1.weight"])
    client = connect_plaintext(f"127.0.0.1:{port}")
    with pytest.raises(NotFoundError, match="not a weight file"):
        await asyncio.to_thread(lambda: list(client.read("config.json", 0, 1)))
    await server.stop(None)
    with pytest.raises(StageUnavailableError):
        await asyncio.to_thread(lambda: list(client.read("part-0.safetensors", 0, 1)))
    client.close()
