from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigurationError, NotFoundError
from cluster.hub.resolve import resolve, tokenizer_folder
from cluster.model_spec import CheckpointFile, FolderSource
from tests.small_checkpoints import change_config, write_rest, write_sharded, write_single


def test_folder_tells_what_its_config_says(tmp_path: Path) -> None:
    spec = resolve(str(write_single(tmp_path)))
    assert (spec.architecture, spec.num_blocks, spec.hidden_size, spec.vocab_size) == ("bloom", 4, 8, 16)
    assert spec.max_context == 64
    assert spec.eos_token_ids == {2, 3}
    assert spec.weight_files == (CheckpointFile("model.safetensors", (tmp_path / "model.safetensors").stat().st_size),)
    assert spec.weight_map == {}
    assert tokenizer_folder(spec) == tmp_path


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shard_names_come_from_the_index(tmp_path: Path, suffix: str) -> None:
    spec = resolve(str(write_sharded(tmp_path, suffix)))
    assert [file.name for file in spec.weight_files] == [f"part-0.{suffix}", f"part-1.{suffix}"]
    assert spec.weight_map["h.3.bias"] == f"part-1.{suffix}"


def test_safetensors_is_preferred_to_pickles(tmp_path: Path) -> None:
    write_sharded(tmp_path, "bin")
    spec = resolve(str(write_sharded(tmp_path, "safetensors")))
    assert {file.name for file in spec.weight_files} == {"part-0.safetensors", "part-1.safetensors"}


def test_shipped_model_resolves_without_network() -> None:
    spec = resolve("bloom-tiny")
    assert spec.name == "bloom-tiny"
    assert isinstance(spec.source, FolderSource)
    assert (spec.num_blocks, spec.max_context, spec.eos_token_ids) == (6, 2048, {2})


@pytest.mark.parametrize(
    ("architecture", "config", "expected"),
    [
        ("gpt2", {"n_layer": 4, "n_embd": 8, "hidden_size": None, "n_positions": 128}, (4, 8, 128)),
        (
            "llama",
            {"n_layer": None, "num_hidden_layers": 5, "hidden_size": 16, "max_position_embeddings": 4096},
            (5, 16, 4096),
        ),
        ("bloom", {"hidden_size": None, "n_embed": 24, "seq_length": None}, (4, 24, 2048)),
    ],
)
def test_config_is_read_under_each_architecture_s_names(
    tmp_path: Path, architecture: str, config: dict[str, object], expected: tuple[int, int, int]
) -> None:
    change_config(write_single(tmp_path), model_type=architecture, **config)
    spec = resolve(str(tmp_path))
    assert (spec.num_blocks, spec.hidden_size, spec.max_context) == expected


def test_eos_comes_from_config_when_generation_config_is_absent(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert resolve(str(tmp_path)).eos_token_ids == {2}


def test_model_without_eos_never_stops_by_itself(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    change_config(tmp_path, eos_token_id=None)
    assert resolve(str(tmp_path)).eos_token_ids == frozenset()


def test_revision_tells_whether_the_folder_changed(tmp_path: Path) -> None:
    first = resolve(str(write_single(tmp_path / "a"))).revision
    assert resolve(str(write_single(tmp_path / "b"))).revision == first
    change_config(tmp_path / "b", eos_token_id=5)
    assert resolve(str(tmp_path / "b")).revision != first


def test_digest_sees_a_change_within_a_large_file(tmp_path: Path) -> None:
    write_single(tmp_path)
    extra = tmp_path / "extra.bin"
    extra.write_bytes(bytes(3 << 20))
    first = resolve(str(tmp_path)).revision
    extra.write_bytes(bytes([1]) * (3 << 20))
    assert resolve(str(tmp_path)).revision != first


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json of .* cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "part-1.safetensors").unlink(), "lacks part-1.safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no weights in a format"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda folder: change_config(folder, model_type="falcon"), "'falcon'; Spanwise serves bloom, gpt2"),
        (lambda folder: change_config(folder, model_type=None), "architecture None"),
        (lambda folder: change_config(folder, model_type=["bloom"]), "Spanwise serves"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
        (lambda folder: (folder / "quantize_config.json").write_text("{}"), r"quantized \(gptq\).* --precision int8"),
        (lambda folder: (folder / "quant_config.json").write_text("{}"), r"quantized \(awq\)"),
        (lambda folder: change_config(folder, n_layer=None), "no usable num_hidden_layers"),
        (lambda folder: change_config(folder, vocab_size="many"), "no usable vocab_size"),
        (lambda folder: change_config(folder, n_layer=0), "no usable num_hidden_layers"),
    ],
)
def test_bad_folder_is_told_by_what_is_wrong(tmp_path: Path, damage: object, message: str) -> None:
    write_sharded(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=message):
        resolve(str(tmp_path))


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="omit --revision"):
        resolve(str(write_single(tmp_path)), revision="v2")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_folder_is_not_found(name: str) -> None:
    with pytest.raises(NotFoundError, match="there is no folder /"):
        resolve(name)


def test_unknown_name_suggests_the_likely_one() -> None:
    with pytest.raises(NotFoundError, match="did you mean bloom-560m"):
        resolve("blom-560m")


def test_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rest(tmp_path / "owner" / "name")
    write_single(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert isinstance(resolve("owner/name").source, FolderSource)
