from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from cluster.errors import ConfigurationError, StorageError
from cluster.model_spec import Precision
from tests.worker.store.parts import make_plan, make_store, write
from worker.store.manifest import from_json, to_json


@pytest.mark.parametrize("precision", list(Precision))
def test_a_manifest_survives_its_file(precision: Precision, tmp_path: Path) -> None:
    manifest = write(make_store(tmp_path, precision), precision=precision)
    assert from_json(to_json(manifest), "m") == manifest
    assert to_json(from_json(to_json(manifest), "m")) == to_json(manifest)


def test_another_version_is_refused_with_the_way_out() -> None:
    other = to_json(replace(make_plan(Precision.INT8), version=99))
    with pytest.raises(ConfigurationError, match=r"its format is 99.*cluster convert.*cluster store prune"):
        from_json(other, "m")


def test_a_changed_version_is_damage() -> None:
    text = to_json(make_plan(Precision.INT8))
    for version in (b"7", b"0", b"-1", b"1e9", b'"1"', b"null"):
        with pytest.raises(StorageError, match=r"m\.json is damaged"):
            from_json(text.replace(b'"version":1', b'"version":' + version), "m.json")


def test_the_first_versions_checksum_is_that_of_the_manifest_alone() -> None:
    document = json.loads(to_json(make_plan(Precision.INT8)))
    body = json.dumps(document["manifest"], separators=(",", ":")).encode()
    assert document["checksum"] == xxhash.xxh3_128_hexdigest(body)


def test_every_changed_byte_is_noticed() -> None:
    text = to_json(make_plan(Precision.INT8))
    for offset in range(0, len(text) - 1, 7):
        changed = text[:offset] + bytes([text[offset] ^ 1]) + text[offset + 1 :]
        with pytest.raises((StorageError, ConfigurationError), match=r"m\.json"):
            from_json(changed, "m.json")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"version": 1, "checksum": "", "manifest": []}', b"\xff"])
def test_what_is_no_manifest_is_damaged(text: bytes) -> None:
    with pytest.raises(StorageError, match=r"m\.json is damaged"):
        from_json(text, "m.json")


def test_a_manifest_cut_short_is_damaged() -> None:
    text = to_json(make_plan(Precision.INT8))
    with pytest.raises(StorageError, match="is damaged"):
        from_json(text[: len(text) // 2], "m.json")


def test_an_unknown_weight_is_named() -> None:
    manifest = make_plan(Precision.INT8)
    assert manifest.weight("mlp.down").shape == (77, 100)
    with pytest.raises(StorageError, match=r"block-0000 of the block store holds no weight mlp\.up"):
        manifest.weight("mlp.up")
