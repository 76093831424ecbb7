"""A model on this machine from Python, without Ray: one worker and its coordinator, in threads of this process.

    from cluster.local import LocalModel

    with LocalModel.from_pretrained("bigscience/bloom-7b1", precision="int8", memory="12GiB") as model:
        print(model.generate("The capital of France is", max_tokens=20, temperature=0).text)
        for piece in model.stream([{"role": "user", "content": "Why is the sky blue?"}]):
            print(piece.text, end="", flush=True)

What does not fit into `memory` is read from disk on every pass. Concurrent calls are batched as a server batches its
clients': it is the same scheduler, stage and protocol, over a port of 127.0.0.1 as `cluster serve` opens one.
Covers assembling the parts and their lifetime; every setting is `cluster.config.ServeConfig`'s, every option of a call
`cluster.client`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from cluster.client import BlockingGeneration, ChatMessage, Client, ClusterStatus, Completion, GenerateOptions, Prompt
from cluster.client.loop_thread import LoopThread
from cluster.clock import SystemClock
from cluster.config import ServeConfig, parse_node_sizes, read_settings
from cluster.errors import ConfigurationError, InvalidRequestError, StageUnavailableError
from cluster.hub.resolve import find_token, resolve
from cluster.placement import WorkerId
from cluster.rpc.v1 import generation_service_pb2 as service
from coordinator.order import CoordinatorOrder
from worker.order import WorkerOrder
from worker.spinning import limit_spinning

if TYPE_CHECKING:
    from coordinator.coordinator import Coordinator
    from worker.server import StageServer

StatusListener = Callable[[ClusterStatus], None]

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
_SILENT = logging.NullHandler()

_OF_A_SERVER = (
    *("workers", "wire_dtype", "host", "port", "address", "interface", "stage_ports"),
    *("internal_tls", "detach", "log_dir", "log_json"),
)


class LocalModel:
    """A loaded model. Close it, or use it in a `with` block: it holds memory, threads and open files. One that nothing
    refers to any more, its streams included, closes itself in the background.

    Calls may come from several threads at once.
    """

    def __init__(self, loop: LoopThread, client: Client, concurrency: int) -> None:
        """Use `from_pretrained`."""
        self._loop = loop
        self._client = client
        self._concurrency = concurrency  # requests of generate_many at once
        weakref.finalize(client, loop.begin_close).atexit = False  # the loop itself sees to that

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        precision: str = "auto",
        memory: str | float = "",
        on_status: StatusListener | None = None,
        **settings: Any,
    ) -> Self:
        """Load an alias, a hub id or a folder, converting it first where the precision asks for that.

        `memory` bounds the whole process ("12GiB" or bytes; empty: what the machine has free, with a margin); weights
        that do not fit are read from disk on every pass. `settings` are those of ServeConfig that concern one
        machine: `revision`, `threads`, `gpus`, `max_context`, `kv_dtype`, `store_dir`, …; None takes the default.
        `on_status` hears of the load's progress several times a second. Raises SpanwiseError.
        """
        config = _config({**settings, "model": model, "precision": precision, "memory": memory})
        loop = LoopThread("spanwise-local")
        try:
            coordinator, address = loop.enter(_serving(config))
            client = Client(address)
            try:
                _wait_ready(loop, coordinator, client, on_status)
            except BaseException:
                client.close()
                raise
        except BaseException:
            loop.close()
            raise
        # As many as run, and as many again to take their places.
        return cls(loop, client, config.max_running + min(config.max_running, config.max_waiting))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what is generated, with RequestCancelledError, and free everything. Idempotent."""
        self._client.close()
        self._loop.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return what follows a prompt: text, token ids (a sequence, or an array of one row) or a chat."""
        return self._client.complete(_as_prompt(prompt), **options)

    def generate_many(self, prompts: Iterable[Prompt], **options: Unpack[GenerateOptions]) -> list[Completion]:
        """Return what follows each prompt, in their order. They are computed together, as far as memory allows."""
        if isinstance(prompts, str):
            raise InvalidRequestError("generate_many takes several prompts: give a list of them, or use generate")
        listed = [_as_prompt(prompt) for prompt in prompts]
        return self._client.complete_many(listed, concurrency=self._concurrency, **options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> BlockingGeneration:
        """Return the pieces of what follows a prompt, as they come."""
        return self._client.generate(_as_prompt(prompt), **options)

    def tokenize(self, prompt: str | Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return the token ids of a text or chat, as `generate` reads it."""
        return self._client.tokenize(prompt)

    def detokenize(self, token_ids: Iterable[int]) -> str:
        """Return the text of token ids."""
        return self._client.detokenize(token_ids)

    def describe(self) -> ClusterStatus:
        """Return memory, what is read from disk, and how busy the model is."""
        return self._client.describe()


def _config(settings: Mapping[str, object]) -> ServeConfig:
    """Return the checked settings. Raises ConfigurationError naming one that is unknown, wrong or a server's."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name in _OF_A_SERVER:
            raise ConfigurationError(
                f"{name} is a setting of `cluster serve`; a LocalModel is one worker, without a port"
            )
    config = ServeConfig(**read_settings(given, "LocalModel"), port=0)
    config.validate()
    return config


def _wait_ready(loop: LoopThread, coordinator: Coordinator, client: Client, on_status: StatusListener | None) -> None:
    """Return when the model serves. Raises StageUnavailableError saying why it cannot."""
    while not loop.run(_settle(coordinator)):
        if on_status is not None:
            on_status(client.describe())
    if on_status is not None:
        on_status(client.describe())


async def _settle(coordinator: Coordinator) -> bool:
    """Tell whether the model serves, after a moment if not. Raises StageUnavailableError if it never will."""
    if coordinator.board.state == service.CLUSTER_STATE_READY:
        return True
    try:
        async with asyncio.timeout(POLL_SECONDS):
            reason = await coordinator.wait_ended()
    except TimeoutError:
        return False
    raise StageUnavailableError(reason or "the model was closed while it loaded")


def _as_prompt(prompt: Any) -> Prompt:
    """Return token ids of a tensor or array `[num_tokens]` or `[1, num_tokens]`; anything else as it is."""
    if not hasattr(prompt, "tolist"):
        return prompt  # type: ignore[no-any-return]
    shape = tuple(prompt.shape)
    if len(shape) == 2 and shape[0] == 1:
        prompt = prompt[0]
    elif len(shape) == 2:
        raise InvalidRequestError(f"the prompt has {shape[0]} rows: give several prompts to generate_many")
    elif len(shape) != 1:
        raise InvalidRequestError(f"the prompt must have the shape [num_tokens] or [1, num_tokens], not {list(shape)}")
    return prompt.tolist()  # type: ignore[no-any-return]


@asynccontextmanager
async def _serving(config: ServeConfig) -> AsyncIterator[tuple[Coordinator, str]]:
    """Run a worker and a coordinator of `config`; give the coordinator and the address for clients."""
    for name in ("cluster", "coordinator", "worker"):  # a library raises; it prints only where logging is configured
        logging.getLogger(name).addHandler(_SILENT)
    make_coordinator, build_server = await asyncio.to_thread(_load_parts)
    token = find_token()
    spec = await asyncio.to_thread(resolve, config.model, revision=config.revision, token=token)
    worker = build_server(_worker_order(config), credentials=None)
    worker_address = await worker.start()
    try:
        order = CoordinatorOrder(config, spec, (worker_address,), LOOPBACK, generation=1, token=token or "")
        coordinator = make_coordinator(order, None, SystemClock())
        try:
            yield coordinator, await coordinator.start()
        finally:
            await coordinator.stop()
    finally:
        await worker.stop()


def _load_parts() -> tuple[type[Coordinator], Callable[..., StageServer]]:
    """Import what takes seconds."""
    limit_spinning(os.environ)  # of effect unless torch has been imported already
    from coordinator.coordinator import Coordinator
    from worker.build import build_server

    return Coordinator, build_server


def _worker_order(config: ServeConfig) -> WorkerOrder:
    return WorkerOrder(
        worker_id=WorkerId("w0"),
        listen_address=LOOPBACK,
        ports=range(0),
        num_neighbours=1,
        num_threads=config.threads,
        num_gpus=config.gpus,
        memory_bytes=parse_node_sizes("memory", config.memory).default,
        gpu_memory_bytes=parse_node_sizes("gpu_memory", config.gpu_memory).default,
        log_dir="",
        is_log_json=False,
    )
