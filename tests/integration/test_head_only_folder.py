"""A checkpoint folder that only the head has: workers fetch their spans' bytes from it, over mutual TLS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import FolderSource, ModelSizes
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.wire.tls import Credentials
from tests.checkpoints import FileFormat, make_checkpoint
from tests.integration.local_cluster import Certify, local_cluster, mutual_tls, plaintext, torch_loader, worker_here
from tests.worker.references import generate, load_reference
from worker.executor import LoadedSpan
from worker.sharing.shelf import Shelf

PROMPT = "Call me Ishmael. Some years ago"


class ElsewhereLoader:
    """A loader on a machine where the head's path names `folder`."""

    def __init__(
        self, number: int, credentials: Credentials | None, shelf: Shelf, folder: Path, orders: list[LoadOrder]
    ) -> None:
        self._loader = torch_loader(number, credentials, shelf)
        self._folder = folder
        self._orders = orders

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        return self._loader.measure(config)

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        assert isinstance(order.source, FolderSource)
        self._orders.append(order)
        return self._loader.load(replace(order, source=replace(order.source, path=str(self._folder))), on_progress)


def absent(tmp_path: Path) -> Path:
    return tmp_path / "absent"


def of_another_model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "other", "llama", num_shards=4, seed=1)


@pytest.mark.parametrize(
    ("file_format", "elsewhere", "new_certify"),
    [
        ("safetensors", absent, plaintext),
        ("safetensors", of_another_model, mutual_tls),
        ("bin", absent, mutual_tls),
    ],
)
async def test_workers_without_the_folder_generate_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_format: FileFormat,
    elsewhere: Callable[[Path], Path],
    new_certify: Callable[..., Any],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_checkpoint(tmp_path / "head", "llama", file_format=file_format, num_shards=4)
    certify: Certify = new_certify() if new_certify is mutual_tls else plaintext
    there, orders = elsewhere(tmp_path), list[LoadOrder]()

    def new_loader(number: int, credentials: Credentials | None, shelf: Shelf) -> ElsewhereLoader:
        return ElsewhereLoader(number, credentials, shelf, there, orders)

    async with local_cluster(folder, 3, new_loader=new_loader, certify=certify) as cluster, cluster.client() as client:
        prompt = await client.tokenize(PROMPT)
        completion = await client.complete(prompt, max_tokens=12, ignore_eos=True)
    assert list(completion.token_ids) == generate(load_reference(folder), prompt, 12).token_ids
    assert len(orders) == 3
    (cache,) = (tmp_path / "cache" / "spanwise" / "checkpoints").iterdir()
    assert cache.name == cluster.spec.revision


async def test_a_stranger_reaches_no_worker_of_a_cluster_with_mutual_tls() -> None:
    certify = mutual_tls()
    async with worker_here(0, credentials=certify("node-0")) as address:
        for credentials in (None, mutual_tls()("node-0")):
            error = await _hello(address, credentials)
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert await _hello(address, certify("head")) is None


async def _hello(address: str, credentials: Credentials | None) -> grpc.aio.AioRpcError | None:
    """Return the error that a hello ends with, if it does."""
    options = (("grpc.enable_http_proxy", 0),)
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials.channel(), options)
    )
    async with channel:
        try:
            await service_grpc.StageServiceStub(channel).Hello(service.HelloRequest(protocol_version=1), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error
    return None
