import subprocess
import sys

import pytest

from cluster.version import VERSION

COMMANDS = ("serve", "status", "generate", "chat", "logs", "stop", "models", "demo", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"cluster {command}" in result.output
    assert "Examples" in result.output


def test_version(run):
    assert run("--version").output.strip() == f"spanwise {VERSION}"


def test_wrong_usage_exits_with_2(run):
    assert run("serve", "--wokers", "3").exit_code == 2
    assert run("nonsense").exit_code == 2
    result = run("serve", "m", env={"SPANWISE_WORKERS": "three"})
    assert result.exit_code == 2
    assert "SPANWISE_WORKERS" in result.output


def test_error_is_one_sentence_without_traceback(run):
    result = run("serve", "m", "--precision", "int3")
    assert result.exit_code == 1
    assert "precision must be one of" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("--debug", "serve", "m", "--port", "-1"), ("serve", "m", "--port", "-1", "--debug")]
)
def test_debug_shows_the_traceback(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "port must be between" in result.stderr


def test_bug_is_told_as_one(run, monkeypatch):
    def broken(_):
        raise RuntimeError("surprise")

    monkeypatch.setattr("cluster.client.Client.describe", broken)
    result = run("status")
    assert result.exit_code == 1
    assert "unexpected RuntimeError: surprise" in result.stderr


def test_help_loads_neither_grpc_nor_anything_of_the_server():
    heavy = ("grpc", "torch", "ray", "transformers", "numpy", "cluster.client", "rich.live")
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom cluster.cli.main import app\n"
        f"CliRunner().invoke(app, ['--help'])\nprint([m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
