"""Brings a file from another worker that has it, or says that it is this worker's turn to get it from its origin.

Who needs a file claims it, then asks the others. One that has it sends it; one that has begun to fetch it is waited
for; among those that only intend to, the lowest address may begin. Having said so, it asks once more, and gives way to
any lower address: whoever asked before that was said has claimed by then, so that of two only the lower one goes on. A
worker that does not answer is passed over: sharing saves traffic and is never needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc

from cluster.errors import SpanwiseError, StageUnavailableError
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1.stage_service_pb2_grpc import StoreServiceStub
from cluster.wire.status import from_rpc_error
from worker.sharing.shelf import Claim, Shelf

if TYPE_CHECKING:
    from cluster.wire.tls import Credentials

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0
POLL_SECONDS = 0.5
RANGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),  # a holder whose machine is gone is noticed within the sum of the two
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a worker answered: whole files by size, and its claims."""

    files: Mapping[str, int]
    claims: Mapping[str, Claim]


class Holder(Protocol):
    """Another worker."""

    def list(self, collection: str) -> Holdings:
        """Return what it has and intends. Raises SpanwiseError when it does not answer soon."""
        ...

    def read(self, collection: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes `[start, end)` of a file, in order. Raises SpanwiseError."""
        ...

    def close(self) -> None: ...


class RemoteHolder:
    """A Holder over gRPC. Owns its channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = StoreServiceStub(channel)

    def list(self, collection: str) -> Holdings:
        """See Holder."""
        try:
            response = self._stub.ListHeld(service.ListHeldRequest(collection=collection), timeout=ASK_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        files = {file.name: file.size_bytes for file in response.files}
        return Holdings(files, {claim.file: Claim(claim.has_begun, claim.bytes_done) for claim in response.claims})

    def read(self, collection: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """See Holder."""
        request = service.ReadHeldRequest(collection=collection, file=name, offset=start, length=end - start)
        try:
            for response in self._stub.ReadHeld(request):
                yield response.data
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def close(self) -> None:
        self._channel.close()


def connect(address: str, credentials: Credentials | None = None) -> RemoteHolder:
    """Return the worker whose stage service listens at host:port; without credentials it speaks plaintext."""
    if credentials is None:
        return RemoteHolder(grpc.insecure_channel(address, options=_OPTIONS))
    return RemoteHolder(grpc.secure_channel(address, credentials.channel(), options=_OPTIONS))


class Neighbours:
    """The workers that may hold what this one needs. Close it."""

    def __init__(
        self,
        shelf: Shelf,
        holders: Mapping[str, Holder],
        *,
        wait: Callable[[float], None],
    ) -> None:
        """`holders` by address. `wait(seconds)` passes time between questions; it may raise to give up."""
        self._shelf, self._holders, self._wait = shelf, dict(holders), wait

    def close(self) -> None:
        for holder in self._holders.values():
            holder.close()

    def bring(
        self,
        collection: str,
        names: Sequence[str],
        folder: Path,
        get_from_origin: Callable[[Callable[[int], None]], None],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> bool:
        """Bring files that belong together (the first stands for them in claims) into `folder`, one way or another.

        Either a neighbour sends them, the first name last, and the result is True; or `get_from_origin(count)` is
        called, exactly once, to bring them itself. What was sent is not checked here. Raises what `get_from_origin`
        and writing files do.
        """
        with self._shelf.claim(collection, names[0]) as claim:
            while True:
                held = self._ask(collection)
                if self._copy_from_any(held, collection, names, folder, on_bytes):
                    return True
                rivals = {address: of.claims[names[0]] for address, of in held.items() if names[0] in of.claims}
                if not self._must_wait(claim, rivals):
                    if claim.has_begun:
                        break
                    claim.has_begun = True  # and ask once more
                    continue
                claim.has_begun = False
                self._wait(POLL_SECONDS)
            get_from_origin(claim.count)
        return False

    def _must_wait(self, claim: Claim, rivals: Mapping[str, Claim]) -> bool:
        """Tell whether another worker goes first: a lower address, or one that began before this one said so."""
        is_lowest = self._shelf.address <= min(rivals, default=self._shelf.address)
        return not is_lowest or (not claim.has_begun and any(rival.has_begun for rival in rivals.values()))

    def _ask(self, collection: str) -> dict[str, Holdings]:
        answers = {}
        for address, holder in list(self._holders.items()):
            try:
                answers[address] = holder.list(collection)
            except SpanwiseError as error:
                logger.info("worker at %s does not share (%s)", address, error)
                self._drop(address)
        return answers

    def _drop(self, address: str) -> None:
        self._holders.pop(address).close()

    def _copy_from_any(
        self,
        held: Mapping[str, Holdings],
        collection: str,
        names: Sequence[str],
        folder: Path,
        on_bytes: Callable[[int], None],
    ) -> bool:
        for address, holdings in held.items():
            if not all(name in holdings.files for name in names):
                continue
            try:
                for name in reversed(names):
                    _copy(self._holders[address], collection, name, holdings.files[name], folder, on_bytes)
            except SpanwiseError as error:
                logger.warning("worker at %s could not send %s of %s: %s", address, names[0], collection, error)
                self._drop(address)
                continue
            return True
        return False


def _copy(
    holder: Holder, collection: str, name: str, size_bytes: int, folder: Path, on_bytes: Callable[[int], None]
) -> None:
    """Write the file under a temporary name, then give it its own. An interrupted copy begins anew."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            for start in range(0, size_bytes, RANGE_BYTES):
                stop = min(start + RANGE_BYTES, size_bytes)
                with closing(holder.read(collection, name, start, stop)) as pieces:  # type: ignore[type-var]
                    for data in pieces:
                        file.write(data)
                        on_bytes(len(data))
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != size_bytes:
                raise StageUnavailableError(f"it sent {file.tell():,} of {size_bytes:,} bytes")
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
