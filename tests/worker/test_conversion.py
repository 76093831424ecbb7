"""A conversion ends with every part that was asked for, or says which are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError
from cluster.hub.resolve import resolve
from cluster.load_order import LoadProgress, StoreOptions
from cluster.model_spec import Precision
from cluster.span import Span
from tests.checkpoints import make_checkpoint
from worker.conversion import Conversion, convert
from worker.store.inventory import Pruned, list_entries, prune
from worker.store.key import all_parts


@pytest.fixture
def asked(tmp_path: Path) -> Conversion:
    spec = resolve(str(make_checkpoint(tmp_path / "model", "llama")))
    return Conversion(spec, Precision.INT8, Span(0, spec.num_blocks), StoreOptions(str(tmp_path / "store")))


def test_nothing_of_a_folder_is_pruned_between_two_parts_of_a_conversion(asked: Conversion, tmp_path: Path) -> None:
    pruned: list[Pruned] = []

    def show(_: LoadProgress) -> None:
        pruned.extend(prune(entry) for entry in list_entries(tmp_path / "store"))

    store = convert(asked, 1, show)
    assert set(pruned) == {Pruned(0, (store.key,))}
    assert store.parts() == all_parts(asked.spec.num_blocks)


def test_a_part_that_vanished_meanwhile_is_told(asked: Conversion) -> None:
    store = convert(asked, 1, lambda _: None)
    store.remove("head")

    def show(_: LoadProgress) -> None:
        store.remove("embedding")

    with pytest.raises(ConfigurationError, match=rf"^embedding of {store.folder} vanished .*: convert again"):
        convert(asked, 1, show)
    assert convert(asked, 1, lambda _: None).parts() == all_parts(asked.spec.num_blocks)


def test_a_damaged_description_is_written_again(asked: Conversion) -> None:
    store = convert(asked, 1, lambda _: None)
    description = store.description()
    (store.folder / "model.json").write_text("{")
    convert(asked, 1, lambda _: None)
    assert store.description() == description is not None


def test_a_folder_of_its_own_has_no_locks_and_is_refused_as_that_of_another_version(
    asked: Conversion, tmp_path: Path
) -> None:
    output = replace(asked, output=tmp_path / "out")
    store = convert(output, 1, lambda _: None)
    assert not list(store.folder.glob("*.lock"))
    description = store.description()
    assert description is not None
    store.describe(replace(description, version=0))
    with pytest.raises(ConfigurationError, match="as another version of Spanwise wrote it: choose a new folder"):
        convert(output, 1, lambda _: None)
    store.describe(replace(description, model="other"))
    with pytest.raises(ConfigurationError, match="holds something else"):
        convert(output, 1, lambda _: None)
