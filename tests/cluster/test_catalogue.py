from __future__ import annotations

import re

from cluster.catalogue import CATALOGUE, find_entry, shipped_folder, unknown_model
from cluster.model_spec import SUPPORTED_ARCHITECTURES


def test_every_entry_can_be_served_and_has_a_name_of_its_own() -> None:
    assert len({entry.alias for entry in CATALOGUE}) == len(CATALOGUE)
    for entry in CATALOGUE:
        assert entry.architecture in SUPPORTED_ARCHITECTURES
        assert entry.alias == entry.alias.lower()
        assert entry.num_parameters > 0
        assert entry.licence


def test_every_supported_architecture_has_an_entry() -> None:
    assert {entry.architecture for entry in CATALOGUE} == set(SUPPORTED_ARCHITECTURES)


def test_entries_are_on_the_hub_or_in_the_package() -> None:
    for entry in CATALOGUE:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.repo_id) or (shipped_folder(entry.alias) / "config.json").exists()


def test_promised_aliases_name_the_right_repositories() -> None:
    flagship = find_entry("bloom-176b")
    assert flagship is not None
    assert flagship.repo_id == "bigscience/bloom"
    for size in ("7b1", "3b", "1b7", "1b1", "560m"):
        for family in ("bloom", "bloomz"):
            entry = find_entry(f"{family}-{size}")
            assert entry is not None
            assert entry.repo_id == f"bigscience/{family}-{size}"


def test_case_of_an_alias_does_not_matter() -> None:
    assert find_entry("BLOOM-176B") == find_entry("bloom-176b")


def test_name_like_nothing_gets_the_way_out_without_a_guess() -> None:
    message = str(unknown_model("zzzzzz"))
    assert "did you mean" not in message
    assert "cluster models" in message
