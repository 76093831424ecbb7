"""A model from a hub, whose workers are processes with caches of their own: who fetches what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import huggingface_hub
import pytest
import pytest_asyncio

from cluster.errors import PermissionDeniedError, StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.model_spec import HubSource
from cluster.testing.hub import LocalHub
from tests.checkpoints import FileFormat, make_checkpoint
from tests.integration.local_cluster import WorkerProcess, serving, worker_process
from tests.worker.references import generate, load_reference

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

NUM_SHARDS = 6
TOKEN = "hf_good"
PROMPT = "Call me Ishmael. Some years ago"
GATED = "owner/gated"
FORMATS: tuple[FileFormat, ...] = ("safetensors", "bin")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of the same model in both formats: a shard for the embedding, several for the blocks."""
    root = tmp_path_factory.mktemp("hub")
    for file_format in FORMATS:
        make_checkpoint(root / "owner" / file_format, "llama", file_format=file_format, num_shards=NUM_SHARDS)
    make_checkpoint(root / GATED, "llama")
    return root


@pytest.fixture(scope="module")
def hub(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """The hub, and a cache for this process, which is the head."""
    with pytest.MonkeyPatch.context() as patch, LocalHub(root, token=TOKEN) as running:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("head")))
        patch.setenv("HF_ENDPOINT", running.url)
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[tuple[WorkerProcess, Path]]]:
    """Two worker processes, each with its cache, as on two machines."""
    async with AsyncExitStack() as stack:
        homes = [tmp_path_factory.mktemp(f"worker-{number}") for number in range(2)]
        variables = [{"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_TOKEN": ""} for home in homes]
        workers = [stack.enter_async_context(worker_process(*numbered)) for numbered in enumerate(variables)]
        yield list(zip(await asyncio.gather(*workers), [home / "hub" for home in homes], strict=True))


def shards_in(cache: Path, repo_id: str, commit: str) -> set[str]:
    snapshot = cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit
    return {path.name for path in snapshot.iterdir()}


@pytest.mark.parametrize("file_format", FORMATS)
async def test_each_worker_gets_the_shards_of_its_span_and_the_hub_sends_each_once(
    file_format: FileFormat, hub: LocalHub, root: Path, workers: list[tuple[WorkerProcess, Path]]
) -> None:
    repo_id = f"owner/{file_format}"
    spec = resolve(repo_id, token=TOKEN)
    assert isinstance(spec.source, HubSource)
    assert spec.source.commit == hub.commit(repo_id)
    weights = {file.name for file in spec.weight_files}
    assert len(weights) == NUM_SHARDS
    assert not weights & hub.fetched(repo_id)  # the head needs none
    hub.requests.clear()
    generation = 1 + FORMATS.index(file_format)  # the same workers serve one model after the other
    addresses = [worker.address for worker, _ in workers]
    async with serving(repo_id, addresses, spec=spec, token=TOKEN, generation=generation) as cluster:
        async with cluster.client() as client:
            prompt = await client.tokenize(PROMPT)
            completion = await client.complete(prompt, max_tokens=12, ignore_eos=True)
        fingerprint = completion.fingerprint
    reference = load_reference(root / repo_id)
    assert list(completion.token_ids) == generate(reference, prompt, 12).token_ids
    assert fingerprint.revision == spec.source.commit
    caches = [shards_in(cache, repo_id, spec.source.commit) for _, cache in workers]
    for stage, cached in zip(fingerprint.stages, caches, strict=True):
        names = {f"model.layers.{block}." for block in range(stage.first_block, stage.end_block)}
        names |= {"model.embed_tokens."} if stage.first_block == 0 else {"model.norm.", "lm_head."}
        needed = {file for tensor, file in spec.weight_map.items() if tensor.startswith(tuple(names))}
        assert cached & weights == needed < weights
    fetched = [request.path for request in hub.requests if request.method == "GET"]
    of_weights = [path for path in fetched if path.rpartition("/")[2] in weights]
    assert len(of_weights) == len(set(of_weights)) == NUM_SHARDS
    assert sum(len(cached & weights) for cached in caches) > NUM_SHARDS  # some came from the other worker
    assert all(f"/resolve/{spec.source.commit}/" in path for path in of_weights)
    assert {request.token for request in hub.requests if repo_id in request.path} == {TOKEN}


async def test_every_worker_loads_the_commit_that_was_resolved(
    hub: LocalHub, root: Path, workers: list[tuple[WorkerProcess, Path]]
) -> None:
    """The repository moves on between resolving and loading: loading its new files would mix two models."""
    repo_id = "owner/moving"
    make_checkpoint(root / repo_id, "llama", num_shards=2)
    spec = resolve(repo_id, token=TOKEN)
    (root / repo_id / "README.md").write_text("news")
    assert isinstance(spec.source, HubSource)
    assert spec.source.commit != hub.commit(repo_id)
    hub.requests.clear()
    addresses = [worker.address for worker, _ in workers]
    with pytest.raises(StageUnavailableError, match="no such revision"):  # this hub keeps one commit only
        async with serving(repo_id, addresses, spec=spec, token=TOKEN, generation=9):
            pass
    assert all(spec.source.commit in request.path for request in hub.requests if repo_id in request.path)


async def test_gated_repository_is_refused_before_anything_loads(hub: LocalHub) -> None:
    hub.gated.add(GATED)
    hub.requests.clear()
    with pytest.raises(PermissionDeniedError, match=r"accept its licence at http.*then log in with `hf auth login`"):
        resolve(GATED)
    assert not hub.fetched(GATED)
    assert resolve(GATED, token=TOKEN).num_blocks == 3
