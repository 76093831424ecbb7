from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from cluster.errors import AuthenticationError, ConfigurationError, NotFoundError, PermissionDeniedError
from cluster.hub.download import HubAccess
from cluster.hub.resolve import resolve_with, tokenizer_folder
from cluster.model_spec import HubSource
from cluster.testing.hub import LocalHub
from tests.small_checkpoints import change_config, truncate, write_sharded, write_single

REPO = "owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    write_sharded(tmp_path / "hub" / REPO)
    with LocalHub(tmp_path / "hub", token="hf_good") as running:
        yield running
    huggingface_hub.close_session()


@pytest.fixture
def access(hub: LocalHub, tmp_path: Path) -> HubAccess:
    return HubAccess(hub.url, "hf_good", tmp_path / "cache")


def test_revision_is_resolved_to_the_commit_of_now(hub: LocalHub, access: HubAccess) -> None:
    spec = resolve_with(REPO, "main", access)
    assert spec.source == HubSource(REPO, hub.commit(REPO), hub.url)
    assert spec.revision == hub.commit(REPO)
    assert [file.name for file in spec.weight_files] == ["part-0.safetensors", "part-1.safetensors"]
    assert spec.weight_files[0].size_bytes == (hub.root / REPO / "part-0.safetensors").stat().st_size
    assert spec.weight_map["h.0.bias"] == "part-0.safetensors"
    assert spec.eos_token_ids == {2, 3}


def test_resolving_fetches_no_weights(hub: LocalHub, access: HubAccess) -> None:
    spec = resolve_with(REPO, "main", access)
    small = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert hub.fetched(REPO) == small
    assert {path.name for path in tokenizer_folder(spec, access).iterdir()} == small


def test_token_goes_with_every_request(hub: LocalHub, access: HubAccess) -> None:
    resolve_with(REPO, "main", access)
    assert {request.token for request in hub.requests} == {"hf_good"}


def test_token_never_shows_in_a_printed_value(access: HubAccess) -> None:
    assert "hf_good" not in repr(access)


def test_gated_model_names_its_licence_page_and_the_login_command(hub: LocalHub, access: HubAccess) -> None:
    hub.gated.add(REPO)
    with pytest.raises(PermissionDeniedError) as caught:
        resolve_with(REPO, "main", HubAccess(hub.url, None, access.cache_folder))
    assert f"{hub.url}/{REPO}" in caught.value.message
    assert "hf auth login" in caught.value.message


def test_gated_model_opens_with_the_right_token(hub: LocalHub, access: HubAccess) -> None:
    hub.gated.add(REPO)
    assert resolve_with(REPO, "main", access).name == REPO


def test_lost_access_is_noticed_although_the_config_is_cached(hub: LocalHub, access: HubAccess) -> None:
    resolve_with(REPO, "main", access)
    hub.gated.add(REPO)
    with pytest.raises(PermissionDeniedError, match="gated"):
        resolve_with(REPO, "main", HubAccess(hub.url, None, access.cache_folder))


def test_private_model_without_a_token_looks_missing_and_names_the_login(hub: LocalHub, access: HubAccess) -> None:
    hub.private.add(REPO)
    with pytest.raises(NotFoundError, match=r"private.*hf auth login"):
        resolve_with(REPO, "main", HubAccess(hub.url, None, access.cache_folder))


def test_bad_token_is_told(hub: LocalHub, access: HubAccess) -> None:
    with pytest.raises(AuthenticationError, match="does not accept the hub token"):
        resolve_with(REPO, "main", HubAccess(hub.url, "hf_bad", access.cache_folder))


def test_missing_repository_is_not_found(access: HubAccess) -> None:
    with pytest.raises(NotFoundError, match="no model owner/other"):
        resolve_with("owner/other", "main", access)


def test_missing_revision_is_not_found(access: HubAccess) -> None:
    with pytest.raises(NotFoundError, match="no such revision"):
        resolve_with(REPO, "v9", access)


def test_name_that_no_hub_allows_is_not_found(access: HubAccess) -> None:
    with pytest.raises(NotFoundError, match="cannot be a hub id"):
        resolve_with("owner/mo--del", "main", access)


def test_repository_without_config_is_refused(hub: LocalHub, access: HubAccess) -> None:
    (hub.root / REPO / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no config.json"):
        resolve_with(REPO, "main", access)


def test_unsupported_model_is_refused_before_its_tokenizer_is_fetched(hub: LocalHub, access: HubAccess) -> None:
    change_config(hub.root / REPO, model_type="mamba")
    with pytest.raises(ConfigurationError, match="'mamba'"):
        resolve_with(REPO, "main", access)
    assert hub.fetched(REPO) == {"config.json"}


def test_shard_that_the_repository_lacks_is_named(hub: LocalHub, access: HubAccess) -> None:
    (hub.root / REPO / "part-1.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"lacks part-1.safetensors"):
        resolve_with(REPO, "main", access)


def test_complete_cache_serves_without_the_hub(hub: LocalHub, access: HubAccess) -> None:
    online = resolve_with(REPO, "main", access)
    for file in online.weight_files:
        huggingface_hub.hf_hub_download(
            REPO, file.name, revision=online.revision, endpoint=hub.url, token="hf_good", cache_dir=access.cache_folder
        )
    unreachable = HubAccess("http://127.0.0.1:9", "hf_good", access.cache_folder)
    offline = resolve_with(REPO, "main", unreachable)
    assert offline.revision == online.revision
    known = [(file.name, file.size_bytes) for file in online.weight_files]
    assert [(file.name, file.size_bytes) for file in offline.weight_files] == known
    assert resolve_with(REPO, online.revision, unreachable).weight_map == online.weight_map


def test_incomplete_cache_without_the_hub_names_what_is_missing(access: HubAccess) -> None:
    resolve_with(REPO, "main", access)
    with pytest.raises(ConfigurationError, match=r"part-0.safetensors"):
        resolve_with(REPO, "main", HubAccess("http://127.0.0.1:9", None, access.cache_folder))


def test_empty_cache_without_the_hub_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot reach http://127.0.0.1:9"):
        resolve_with(REPO, "main", HubAccess("http://127.0.0.1:9", None, tmp_path))


def test_offline_mode_asks_nobody(hub: LocalHub, access: HubAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(hub.root / "owner" / "other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE"):
        resolve_with("owner/other", "main", access)
    assert hub.requests == []


def test_new_commit_is_seen(hub: LocalHub, access: HubAccess) -> None:
    first = resolve_with(REPO, "main", access).revision
    truncate(hub.root / REPO / "part-0.safetensors")
    assert resolve_with(REPO, "main", access).revision != first


def test_endpoint_that_is_no_hub_is_told(hub: LocalHub, access: HubAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "describe", lambda *_: {"welcome": "please accept our terms to use this network"})
    with pytest.raises(ConfigurationError, match="does not answer like a hub"):
        resolve_with(REPO, "main", access)


def test_endpoint_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
    assert HubAccess().endpoint == "http://mirror.example"


def test_hub_that_fails_is_told_with_its_status(hub: LocalHub, access: HubAccess) -> None:
    hub.failing_with = 500
    with pytest.raises(ConfigurationError, match="status 500"):
        resolve_with(REPO, "main", access)
