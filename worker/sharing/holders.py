"""Brings a file from another worker that has it, or says that it is this worker's turn to get it from its origin.

Who needs a file claims it, then asks the others. One that has it sends it; one that has begun to fetch it is waited
for; among those that only intend to, the lowest address may begin. Having said so, it asks once more, and gives way to
any lower address: whoever asked before that was said has claimed by then, so that of two only the lower one goes on. A
worker that does not answer, or fetches nothing, is passed over: sharing saves traffic and is never needed.

Covers whom to ask and when; `worker.sharing.copying` copies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import grpc

from cluster.errors import NotReadyError, SpanwiseError
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1.stage_service_pb2_grpc import StoreServiceStub
from cluster.wire.status import from_rpc_error
from worker.sharing.copying import Wanted, copy_files
from worker.sharing.shelf import Claim, OnBytes, Shelf

if TYPE_CHECKING:
    from cluster.wire.tls import Credentials

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0
POLL_SECONDS = 0.5
MEET_SECONDS = 10.0  # for others to be told what to load, which happens at the same time
STALL_SECONDS = 60.0  # without a byte, until a worker that fetches a file is no longer waited for
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
        """Return what it has and intends. Raises NotReadyError until it offers the collection, SpanwiseError when it
        does not answer soon."""
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
    """The workers that may hold what this one needs. Usable from several threads. Close it."""

    def __init__(
        self, shelf: Shelf, holders: Mapping[str, Holder], *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """`holders` by address. `pause(seconds)` passes time between questions."""
        self._shelf, self._holders, self._pause = shelf, dict(holders), pause
        self._gone: set[str] = set()
        self._refused: set[tuple[str, str, tuple[str, ...]]] = set()
        self._meeting, self._has_met = Lock(), False

    @classmethod
    def none(cls) -> Neighbours:
        """Return no neighbours: everything comes from its origin."""
        return cls(Shelf(), {})

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Afterwards there are none: what is made again later comes from its origin."""
        for holder in self._holders.values():
            holder.close()
        self._holders.clear()

    def copy(self, wanted: Wanted, on_bytes: OnBytes = lambda _: None) -> bool:
        """Copy files from a worker that has them; False when none has.

        `on_bytes` counts what arrives, 0 while something is waited for; it may raise to give up. Raises OSError when
        the files cannot be written.
        """
        self._meet(wanted.collection, on_bytes)
        return self._copy_from_any(self._ask(wanted.collection), wanted, on_bytes)

    def bring(
        self, wanted: Wanted, get_from_origin: Callable[[OnBytes], None], on_bytes: OnBytes = lambda _: None
    ) -> bool:
        """Bring files one way or another, from their origin by one worker only.

        Either they are copied, and the result is True; or `get_from_origin(count)` is called, once, to bring them
        itself. While another worker does that, `on_bytes` counts its bytes, and takes them back when its copy begins.
        Raises what `get_from_origin` and `copy` do.
        """
        self._meet(wanted.collection, on_bytes)
        name, watch = wanted.names[-1], _Watch(on_bytes)
        with self._shelf.claim(wanted.collection, name) as claim:
            while not wanted.is_here:
                held = self._ask(wanted.collection)
                if self._copy_from_any(held, wanted, watch.end):
                    return True
                rivals = {address: of.claims[name] for address, of in held.items() if name in of.claims}
                if self._must_wait(claim, watch.see(rivals)):
                    claim.has_begun = False
                    self._pause(POLL_SECONDS)
                elif not claim.has_begun:
                    claim.has_begun = True  # and ask once more
                else:
                    watch.end()
                    get_from_origin(claim.count)
                    return False
        return True

    def _must_wait(self, claim: Claim, rivals: Mapping[str, Claim]) -> bool:
        """Tell whether another worker goes first: a lower address, or one that began before this one said so."""
        is_lowest = self._shelf.address <= min(rivals, default=self._shelf.address)
        return not is_lowest or (not claim.has_begun and any(rival.has_begun for rival in rivals.values()))

    def _meet(self, collection: str, on_bytes: OnBytes) -> None:
        """Wait until all others offer what they have, as they do once they are told to load; then never again."""
        with self._meeting:
            for _ in range(0 if self._has_met else int(MEET_SECONDS / POLL_SECONDS)):
                if all(self._has_begun_to_load(address, collection) for address in self._present()):
                    break
                on_bytes(0)
                self._pause(POLL_SECONDS)
            self._has_met = True

    def _has_begun_to_load(self, address: str, collection: str) -> bool:
        try:
            self._holders[address].list(collection)
        except NotReadyError:
            return False
        except SpanwiseError as error:
            self._pass_over(address, error)
        return True

    def _present(self) -> list[str]:
        return [address for address in self._holders if address not in self._gone]

    def _ask(self, collection: str) -> dict[str, Holdings]:
        answers = {}
        for address in self._present():
            try:
                answers[address] = self._holders[address].list(collection)
            except SpanwiseError as error:
                self._pass_over(address, error)
        return answers

    def _pass_over(self, address: str, error: SpanwiseError) -> None:
        logger.info("the worker at %s does not share: %s", address, error)
        self._gone.add(address)

    def _copy_from_any(self, held: Mapping[str, Holdings], wanted: Wanted, on_bytes: OnBytes) -> bool:
        able = [address for address, holdings in held.items() if self._can_send(address, holdings, wanted)]
        return any(self._copy_from(address, held[address].files, wanted, on_bytes) for address in able)

    def _can_send(self, address: str, holdings: Holdings, wanted: Wanted) -> bool:
        is_refused = (address, wanted.collection, wanted.names) in self._refused
        return not is_refused and all(name in holdings.files for name in wanted.names)

    def _copy_from(self, address: str, sizes: Mapping[str, int], wanted: Wanted, on_bytes: OnBytes) -> bool:
        """Copy files; False, and never again from there, when they do not come or are not as they should be."""
        num_bytes = 0

        def count(number: int) -> None:
            nonlocal num_bytes
            num_bytes += number
            on_bytes(number)

        try:
            copy_files(wanted, sizes, partial(self._holders[address].read, wanted.collection), count)
        except SpanwiseError as error:
            logger.warning("the worker at %s did not send %s: %s", address, " and ".join(wanted.names), error)
            self._refused.add((address, wanted.collection, wanted.names))
            on_bytes(-num_bytes)
            return False
        return True


class _Watch:
    """What others that are waited for have done, shown as if it were done here; who does nothing is left out."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._shown = 0
        self._idle: dict[str, tuple[int, int]] = {}  # address → bytes, and how often they were the same

    def see(self, rivals: Mapping[str, Claim]) -> dict[str, Claim]:
        """Return those that are worth waiting for."""
        live = {address: rival for address, rival in rivals.items() if self._is_live(address, rival)}
        num_bytes = max((rival.bytes_done for rival in live.values()), default=0)
        self._on_bytes(num_bytes - self._shown)
        self._shown = num_bytes
        return live

    def end(self, num_bytes: int = 0) -> None:
        """Show what was done here instead."""
        self._on_bytes(num_bytes - self._shown)
        self._shown = 0

    def _is_live(self, address: str, rival: Claim) -> bool:
        before, times = self._idle.get(address, (-1, 0))
        is_moving = not rival.has_begun or rival.bytes_done != before
        self._idle[address] = (rival.bytes_done, 0 if is_moving else times + 1)
        return self._idle[address][1] * POLL_SECONDS < STALL_SECONDS
