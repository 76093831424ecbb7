from dataclasses import fields, replace

import pytest
import typer
from typer.testing import CliRunner

from cluster.cli.parameters import takes
from cluster.cli.settings import load, serve_options, to_arguments, variable_of, without_settings
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError


def parse(*arguments, env=None):
    """Return what the command line and the environment give, as `cluster serve` gets it."""
    seen = {}
    app = typer.Typer()

    @app.command()
    @takes(serve_options(), into="given")
    def serve(given: dict) -> None:
        seen.update(given)

    result = CliRunner().invoke(app, list(arguments), env=env)
    assert result.exit_code == 0, result.output
    return seen


def test_every_setting_is_a_flag_a_variable_and_a_key():
    names = {field.name for field in fields(ServeConfig)}
    assert {option.name for option in serve_options()} == names
    assert {option.variable for option in serve_options()} == {variable_of(name) for name in names}


def test_flag_beats_variable_beats_file_beats_default(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('model = "from-file"\nworkers = 2\nport = 2\nthreads = 2\n')
    given = parse("--workers", "4", env={"SPANWISE_WORKERS": "3", "SPANWISE_PORT": "3"})
    config = load(given, file)
    assert (config.workers, config.port, config.threads, config.max_running) == (4, 3, 2, 256)
    assert config.model == "from-file"
    assert load(parse("from-flag", env={"SPANWISE_MODEL": "from-variable"}), file).model == "from-flag"


def test_a_flag_may_take_back_what_the_file_says(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("exact = true\n")
    assert load(parse("m"), file).exact
    assert not load(parse("m", "--no-exact"), file).exact
    assert not load(parse("m", env={"SPANWISE_EXACT": "0"}), file).exact


def test_sizes_are_understood_from_everywhere(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('memory = "1GiB"\nkv_memory = 4096\ngpu-memory = 4096\n')
    assert load(parse("m"), file).gpu_memory == "4096"
    assert load(parse("m"), file).memory == "1GiB"
    assert load(parse("m"), file).kv_memory == 4096
    assert load(parse("m", "--memory", "2GiB,big=4GiB"), file).memory == "2GiB,big=4GiB"
    assert load(parse("m", env={"SPANWISE_KV_MEMORY": "1MB"}), None).kv_memory == 10**6


def test_help_writes_sizes_as_a_person_would():
    about = {option.name: option.about for option in serve_options()}
    assert about["disk_reserve"].endswith("[default: 1.0 GiB]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("worker = 3", r"serve.toml has the unknown setting 'worker'; did you mean workers\?"),
        ("zzz = 3", "unknown setting 'zzz'; the settings are model, revision, workers"),
        ("workers = 'three'", "workers must be a whole number, not 'three'"),
        ("workers = true", "workers must be a whole number, not True"),
        ("exact = 1", "exact must be true or false, not 1"),
        ("host = 5", "host must be text in quotes, not 5"),
        ("step_timeout = 'x'", "step_timeout must be a number, not 'x'"),
        ("memory = 'lots'", "memory must be a size like 12GiB"),
        ("workers = ", "is not TOML"),
        ("precision = 'int3'", "precision must be one of"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path, content, message):
    file = tmp_path / "serve.toml"
    file.write_text(content + "\n")
    with pytest.raises(ConfigurationError, match=message):
        load({"model": "m"}, file)


def test_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read .*none\.toml: No such file"):
        load({"model": "m"}, tmp_path / "none.toml")


def test_keys_may_have_hyphens_and_whole_numbers_may_stand_for_seconds(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("kv-dtype = 'fp16'\nstep-timeout = 30\n")
    config = load({"model": "m"}, file)
    assert config.kv_dtype == "fp16"
    assert config.step_timeout == 30.0


def test_no_model_is_an_error_that_says_how_to_name_one():
    with pytest.raises(ConfigurationError, match="cluster serve bloom-560m"):
        load({}, None)


def test_arguments_give_the_same_settings_again():
    config = replace(
        ServeConfig(model="org/name"),
        **{"workers": 3, "exact": True, "memory": "8GiB", "kv_memory": 2**33, "discard_source": True},
        **{"gpus": 0.5, "stage_ports": "7100-7110", "step_timeout": 9.5},
    )
    assert load(parse(*to_arguments(config)), None) == config


def test_environment_for_a_child_has_none_of_our_settings():
    environment = {"SPANWISE_WORKERS": "3", "SPANWISE_CONFIG": "x", "SPANWISE_SERVER": "h:1", "HF_TOKEN": "t"}
    assert without_settings(environment) == {"SPANWISE_SERVER": "h:1", "HF_TOKEN": "t"}
