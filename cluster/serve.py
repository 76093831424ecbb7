"""The composition root: from settings to a serving cluster, supervised until it ends.

Covers Ray (join or start, reserve, place actors, notice deaths), keys, and shutdown. The coordinator's bring-up and
everything per request are in `coordinator`; what the terminal shows is in `cluster.cli`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import ServeConfig, parse_node_sizes, parse_port_range
from cluster.errors import (
    ConfigurationError,
    IncompatibleVersionError,
    RequestCancelledError,
    SpanwiseError,
    StageUnavailableError,
)
from cluster.hub.resolve import find_token, resolve
from cluster.model_spec import ModelSpec
from cluster.placement import NodeFacts, WorkerId
from cluster.ray_address import check_ray_answers, cluster_of_this_machine, why_no_ray
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.wire.tls import CertificateAuthority
from coordinator.actor import CoordinatorActor
from coordinator.bring_up import context_limit, storage_precision
from coordinator.order import CoordinatorOrder
from worker.actor import WorkerActor
from worker.order import WorkerOrder

Facts = TypeVar("Facts")
StatusListener = Callable[[service.DescribeClusterResponse], None]

INTERRUPTED = 130
"""Exit status of a run that was stopped before anything was served."""

NAMESPACE = "spanwise"
OBJECT_STORE_BYTES = 80 * 1024**2  # Ray's minimum is 75 MiB; no tensor passes through it
POLL_SECONDS = 0.5
RESERVE_SECONDS = 60.0
ACTOR_START_SECONDS = 180.0
INSPECT_SECONDS = 60.0
FAREWELL_SECONDS = 2.0
SHUTDOWN_SECONDS = 3.0  # for the coordinator, then for the workers

_WORKER_ENVIRONMENT = {
    # glibc: keep the buffers of hidden states instead of returning them to the kernel after every message
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True, slots=True)
class _Member:
    """A worker actor and where Ray put it."""

    worker_id: WorkerId
    actor: Any
    node: NodeFacts


def run(
    config: ServeConfig, *, on_status: StatusListener, on_note: Callable[[str], None], stop: threading.Event
) -> int:
    """Serve until `stop` is set (SIGINT and SIGTERM set it too) or a stage is lost; return the exit status.

    `on_status` gets the cluster's description about twice a second while it changes; `on_note` one-line remarks.
    Raises SpanwiseError for whatever is wrong before anything is served.
    """
    config.validate()
    check_port(config.host, config.port)
    spec = resolve(config.model, revision=config.revision, token=find_token())
    check_settings(config, spec)
    with _signals_set(stop), ExitStack() as stack:
        stack.enter_context(_ray_session(config, on_note))
        stack.enter_context(_signals_set(stop))  # again: ray.init has put its own handler in place
        on_note(f"starting {config.workers} worker process{'es' if config.workers > 1 else ''} and the coordinator")
        try:
            deployment = stack.enter_context(_deployment(config, spec, on_status, stop))
        except RequestCancelledError:
            return INTERRUPTED
        return _supervise(deployment, on_status, stop)


def inspect_nodes(
    config: ServeConfig, inspect: Callable[[], Facts], *, on_note: Callable[[str], None]
) -> dict[str, Facts | str]:
    """Run `inspect` on every node of the Ray cluster; return by node name what it found, or why it could not run."""
    with _ray_session(config, on_note):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        remote = ray.remote(_call)  # Ray takes plain functions only, and `inspect` may be a partial one
        calls = {
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": remote.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(inspect)
            for node in nodes
        }
        return {name: _outcome(call) for name, call in calls.items()}


def _call(inspect: Callable[[], Facts]) -> Facts:
    return inspect()


def _outcome(call: Any) -> Any:
    try:
        return _get([call], INSPECT_SECONDS, threading.Event())[0]
    except SpanwiseError as error:
        return str(error)
    except ray.exceptions.RayError as error:
        return explain(error)


def check_port(host: str, port: int) -> None:
    """Raise ConfigurationError when the client-facing port cannot be bound, before minutes are spent on loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it (`cluster stop` if it is an "
                "earlier serve), or choose another port with --port"
            ) from error


def check_settings(config: ServeConfig, spec: ModelSpec) -> None:
    """Raise ConfigurationError for settings that the model rules out, before anything is started."""
    storage_precision(config.precision, spec)
    context_limit(config.max_context, spec)
    if config.workers > spec.num_blocks:
        raise ConfigurationError(
            f"{config.workers} workers cannot share the {spec.num_blocks} blocks of {spec.name}, each needs at least "
            f"one; use --workers with a number from 1 to {spec.num_blocks}"
        )


# --- Ray -------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray_session(config: ServeConfig, on_note: Callable[[str], None]) -> Iterator[None]:
    """Join the Ray cluster at --address, RAY_ADDRESS or on this machine; start a local one when there is none."""
    address = config.address or os.environ.get("RAY_ADDRESS", "") or cluster_of_this_machine()
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    if address and address != "local":
        check_ray_answers(address)
        options["address"] = address
        on_note(f"joining the Ray cluster at {address}")
    else:
        cores = os.cpu_count() or 1
        options |= {"address": "local", "num_cpus": max(cores, config.workers), "include_dashboard": False}
        options["object_store_memory"] = OBJECT_STORE_BYTES
        on_note("starting a local Ray cluster on this machine")
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(why_no_ray(options["address"], error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reserve(config: ServeConfig, stop: threading.Event) -> PlacementGroup:
    """Reserve a slot per worker, on as many nodes as there are; ConfigurationError tells what is short.

    Ray takes the reservation back when this process leaves the cluster.
    """
    bundle = {"CPU": 1.0} | ({"GPU": config.gpus} if config.gpus else {})
    total = ray.cluster_resources()
    for resource, amount in bundle.items():
        if total.get(resource, 0.0) < amount * config.workers:
            raise ConfigurationError(
                f"{config.workers} workers need {amount * config.workers:g} {resource} and the Ray cluster has "
                f"{total.get(resource, 0.0):g}: add nodes, or ask for fewer workers with --workers"
            )
    group = placement_group([bundle] * config.workers, strategy="SPREAD")
    if not _await([group.ready()], RESERVE_SECONDS, stop):
        free = {k: v for k, v in ray.available_resources().items() if k in bundle}
        raise ConfigurationError(
            f"the Ray cluster has room for {config.workers} workers of {bundle}, but others hold it (free now: "
            f"{free}); wait, stop them, or ask for fewer workers"
        )
    return group


def _start_workers(config: ServeConfig, group: PlacementGroup) -> list[Any]:
    remote = ray.remote(WorkerActor)
    return [
        remote.options(
            num_cpus=1,
            num_gpus=config.gpus,
            max_restarts=0,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(config.workers)
    ]


def _await(references: list[Any], timeout_seconds: float, stop: threading.Event) -> bool:
    """Wait for all references; False at the deadline. Raises RequestCancelledError as soon as `stop` is set."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        if stop.is_set():
            raise RequestCancelledError("stopped before the cluster was up")
        left = deadline - time.monotonic()
        ready, _ = ray.wait(references, num_returns=len(references), timeout=max(0.0, min(POLL_SECONDS, left)))
        if len(ready) == len(references) or left <= 0:
            return len(ready) == len(references)


def _get(references: list[Any], timeout_seconds: float, stop: threading.Event) -> list[Any]:
    """ray.get with a deadline and an ear for `stop`; domain errors come out as they were raised, Ray's as ours."""

    if not _await(references, timeout_seconds, stop):
        raise StageUnavailableError(
            f"a Ray actor did not answer within {timeout_seconds:g} s; `cluster doctor` shows the nodes"
        )
    try:
        found: list[Any] = ray.get(references)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SpanwiseError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise StageUnavailableError(f"a Ray actor died while starting: {explain(error)}") from error


def explain(error: ray.exceptions.RayError) -> str:
    """Say in a sentence what Ray tells in a page: on which node it was, and the page's last line."""
    text = str(error)
    names = {str(node["NodeManagerAddress"]): str(node["NodeManagerHostname"]) for node in ray.nodes()}
    address = re.search(r"\bip[=:] ?([0-9a-f.:]+)", text)
    where = f"on {names.get(address[1], 'a node')} ({address[1]}): " if address else ""
    advice = ""
    if "ModuleNotFoundError" in text:
        advice = "; install the same version of spanwise[server] there, for the Python that runs Ray"
    return f"{where}{text.strip().splitlines()[-1].strip()}{advice}"


def check_same_version(nodes: Sequence[NodeFacts]) -> None:
    """Raise IncompatibleVersionError unless all nodes have the same version of Spanwise."""
    found = {node.node_name: node.version for node in nodes}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{node}: {version}" for node, version in sorted(found.items()))
        raise IncompatibleVersionError(
            f"the nodes have different versions of Spanwise ({listed}); install the same on all"
        )


def check_named_nodes(config: ServeConfig, nodes: Sequence[NodeFacts]) -> None:
    """Raise ConfigurationError when a size is given for a node on which no worker runs."""
    known = {name for node in nodes for name in (node.node_name, node.address)}
    for setting in ("memory", "gpu_memory"):
        for name in parse_node_sizes(setting, getattr(config, setting)).by_node:
            if name not in known:
                listed = ", ".join(sorted({f"{node.node_name} ({node.address})" for node in nodes}))
                raise ConfigurationError(f"--{setting.replace('_', '-')} names {name}, but workers run on {listed}")


# --- Deployment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Deployment:
    coordinator: Any
    members: Sequence[_Member]
    server_address: str  # of the Generation service


@contextmanager
def _deployment(
    config: ServeConfig, spec: ModelSpec, on_status: StatusListener, stop: threading.Event
) -> Iterator[_Deployment]:
    """Start workers and coordinator; stop them again, whatever happened in between. That takes seconds: whoever has
    set `stop` is told first that it was heard."""
    actors = _start_workers(config, _reserve(config, stop))
    coordinator = _start_coordinator()
    try:
        yield _Assembly(config, coordinator, actors, stop).connect(spec)
    finally:
        if stop.is_set():
            on_status(_SHUTTING_DOWN)
        _shut_down(coordinator, actors)


def _start_coordinator() -> Any:
    """The coordinator runs on this node: clients and the checkpoint folder are here."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(CoordinatorActor)
    environment = {"env_vars": _WORKER_ENVIRONMENT}
    return remote.options(num_cpus=0, max_restarts=0, runtime_env=environment, scheduling_strategy=here).remote()


class _Assembly:
    """Tells actors that have just started how to work together."""

    def __init__(self, config: ServeConfig, coordinator: Any, actors: Sequence[Any], stop: threading.Event) -> None:
        self._config = config
        self._coordinator = coordinator
        self._stop = stop
        self._here, *nodes = self._get(
            [coordinator.locate.remote(config.interface), *(a.locate.remote(config.interface) for a in actors)]
        )
        check_same_version([self._here, *nodes])
        check_named_nodes(config, nodes)
        members = sorted(zip(actors, nodes, strict=True), key=lambda member: str(member[1].node_id))
        self._members = [_Member(WorkerId(f"w{index}"), actor, node) for index, (actor, node) in enumerate(members)]
        self._is_local = not config.interface and all(node.node_id == self._here.node_id for node in nodes)
        has_tls = config.internal_tls == "on" or (config.internal_tls == "auto" and not self._is_local)
        self._authority = CertificateAuthority.create() if has_tls else None

    def connect(self, spec: ModelSpec) -> _Deployment:
        """Start the workers' servers, then the coordinator that brings the pipeline up."""
        config = self._config
        orders = [self._worker_order(member) for member in self._members]
        starts = [member.actor.start.remote(order) for member, order in zip(self._members, orders, strict=True)]
        addresses = self._get(starts)
        order = CoordinatorOrder(
            config=config,
            spec=spec,
            worker_addresses=tuple(addresses),
            node_names={a: member.node.node_name for a, member in zip(addresses, self._members, strict=True)},
            listen_address=self._address(self._here),
            generation=time.time_ns() // 1_000_000,
            token=find_token() or "",
        )
        if self._authority is not None:
            (request,) = self._get([self._coordinator.request_signature.remote(self._here.address)])
            order = order.signed(self._authority.sign(request), self._authority.certificate)
        (server_address,) = self._get([self._coordinator.start.remote(order)])
        return _Deployment(self._coordinator, self._members, server_address)

    def _worker_order(self, member: _Member) -> WorkerOrder:
        config, address = self._config, self._address(member.node)
        names = (member.node.node_name, member.node.address)
        certificate = b""
        if self._authority is not None:
            (request,) = self._get([member.actor.request_signature.remote(address, member.node.node_name)])
            certificate = self._authority.sign(request)
        return WorkerOrder(
            worker_id=member.worker_id,
            listen_address=address,
            ports=parse_port_range(config.stage_ports),
            num_neighbours=sum(other.node.node_id == member.node.node_id for other in self._members),
            num_threads=config.threads,
            num_gpus=config.gpus,
            memory_bytes=parse_node_sizes("memory", config.memory).on(*names),
            gpu_memory_bytes=parse_node_sizes("gpu_memory", config.gpu_memory).on(*names),
            log_dir=config.log_dir,
            is_log_json=config.log_json,
            certificate=certificate,
            authority=self._authority.certificate if self._authority else b"",
        )

    def _address(self, node: NodeFacts) -> str:
        return "127.0.0.1" if self._is_local else node.address

    def _get(self, references: list[Any]) -> list[Any]:
        return _get(references, ACTOR_START_SECONDS, self._stop)


def _shut_down(coordinator: Any, workers: Sequence[Any]) -> None:
    """Ask every actor to stop, then end what still runs. Never raises: it runs while other errors are on their way.

    The coordinator goes first: to it, a worker that leaves is a worker that is lost.
    """
    for actors in ([coordinator], workers):
        with suppress(ray.exceptions.RayError):
            ray.wait([actor.shutdown.remote() for actor in actors], num_returns=len(actors), timeout=SHUTDOWN_SECONDS)
    for actor in (coordinator, *workers):
        with suppress(ray.exceptions.RayError):
            ray.kill(actor)


# --- Supervision -----------------------------------------------------------------------------------------------------


def _supervise(deployment: _Deployment, on_status: StatusListener, stop: threading.Event) -> int:
    """Watch until told to stop or until the cluster can no longer serve."""
    has_served = False
    deaths: dict[Any, _Member | None] = {member.actor.wait_stopped.remote(): member for member in deployment.members}
    deaths[deployment.coordinator.wait_stopped.remote()] = None
    with grpc.insecure_channel(_dialable(deployment.server_address), (("grpc.enable_http_proxy", 0),)) as channel:
        stub = service_grpc.GenerationServiceStub(channel)
        while not stop.is_set():
            ended, _ = ray.wait(list(deaths), num_returns=1, timeout=POLL_SECONDS)
            dead = [deaths.pop(reference) for reference in ended]
            _report_deaths(deployment, dead)
            status = _COORDINATOR_DIED if None in dead else _describe(stub)
            if status is None:
                continue
            on_status(status)
            has_served |= status.state == service.CLUSTER_STATE_READY
            if status.state == service.CLUSTER_STATE_FAILED:
                stop.wait(FAREWELL_SECONDS)  # let clients and `cluster status` see why
                return 1
    return 0 if has_served else INTERRUPTED


_SHUTTING_DOWN = service.DescribeClusterResponse(state=service.CLUSTER_STATE_DRAINING, message="shutting down")
_COORDINATOR_DIED = service.DescribeClusterResponse(
    state=service.CLUSTER_STATE_FAILED, message="the coordinator's process died"
)


def _describe(stub: Any) -> service.DescribeClusterResponse | None:
    try:
        response: service.DescribeClusterResponse = stub.DescribeCluster(service.DescribeClusterRequest(), timeout=5.0)
        return response
    except grpc.RpcError:
        return None  # Ray's notice about the coordinator decides


def _report_deaths(deployment: _Deployment, dead: Sequence[_Member | None]) -> None:
    """Tell the coordinator which workers died, in case its own channels have not noticed."""
    for member in dead:
        if member is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(deployment.coordinator.report_loss.remote(member.worker_id), timeout=POLL_SECONDS)


def _dialable(address: str) -> str:
    """Return an address that reaches a server listening on `address` from this machine."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "::") else address


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT, SIGTERM and the loss of the terminal set `stop`, wherever the main thread is.

    A signal that the starter chose to ignore (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in [number for number, handler in before.items() if handler is not signal.SIG_IGN]:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
