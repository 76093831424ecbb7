from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.errors import NotFoundError, StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.rpc.v1.stage_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from cluster.wire.channels import bind, new_server
from cluster.wire.tls import CertificateAuthority, Credentials, SigningRequest
from coordinator.checkpoint_server import CheckpointServicer
from tests.small_checkpoints import order_for, tensors_of_blocks, write_sharded
from worker.checkpoint_client import connect
from worker.weights import fetch_checkpoint

SERVER = "127.0.0.1"


def certify(authority: CertificateAuthority, name: str) -> Credentials:
    request = SigningRequest.create(name, addresses=(SERVER,))
    return request.credentials(authority.sign(request.pem), authority.certificate)


@pytest.fixture(params=["plaintext", "mutual TLS"])
def credentials(request: pytest.FixtureRequest) -> tuple[Credentials | None, Credentials | None]:
    """Of the coordinator and of a worker."""
    if request.param == "plaintext":
        return None, None
    authority = CertificateAuthority.create()
    return certify(authority, "coordinator"), certify(authority, "worker")


async def test_worker_gets_its_span_from_a_folder_that_only_the_head_has(
    tmp_path: Path, credentials: tuple[Credentials | None, Credentials | None]
) -> None:
    coordinator, worker = credentials
    spec = resolve(str(write_sharded(tmp_path / "head")))
    (tmp_path / "head").rename(tmp_path / "moved")
    server = new_server()
    servicer = CheckpointServicer(str(tmp_path / "moved"), [file.name for file in spec.weight_files])
    add_CheckpointServiceServicer_to_server(servicer, server)
    address = f"{SERVER}:{bind(server, SERVER, (), coordinator)}"
    await server.start()
    fetch = partial(
        fetch_checkpoint,
        order_for(spec, checkpoint_service=address),
        lambda name: name.startswith("h.1."),
        lambda _: None,
        connect=partial(connect, credentials=worker),
        cache_folder=tmp_path / "cache",
    )
    with await asyncio.to_thread(fetch) as checkpoint:
        assert torch.equal(checkpoint.tensor("h.1.weight"), tensors_of_blocks()["h.1.weight"])
    client = connect(address, worker)
    with pytest.raises(NotFoundError, match="not a weight file"):
        await asyncio.to_thread(lambda: list(client.read("config.json", 0, 1)))
    await server.stop(None)
    with pytest.raises(StageUnavailableError):
        await asyncio.to_thread(lambda: list(client.read("part-0.safetensors", 0, 1)))
    client.close()
