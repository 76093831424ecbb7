"""A machine that only talks to a cluster installs and imports little: neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

IMPORT_CLIENT = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not among the client's dependencies")

REFUSED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refusal())
from cluster.client import AsyncClient, Client
"""


def client_distributions() -> set[str]:
    """Return everything that `pip install spanwise` installs: the closure of the requirements without extras."""
    found: set[str] = set()
    waiting = [("spanwise", "")]
    while waiting:
        name, extra = waiting.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            dependency = canonicalize_name(requirement.name)
            if dependency not in found:
                found.add(dependency)
                waiting += [(dependency, extra) for extra in ("", *requirement.extras)]
    return found


def test_installing_the_client_pulls_neither_torch_nor_ray() -> None:
    assert "grpcio" in client_distributions()
    assert not client_distributions() & {"huggingface-hub", "numpy", "ray", "tokenizers", "torch", "transformers"}


def test_client_imports_with_its_own_dependencies_alone() -> None:
    allowed = client_distributions() | {"spanwise"}
    refused = [
        module
        for module, names in packages_distributions().items()
        if module.isidentifier() and not allowed & {canonicalize_name(name) for name in names}
    ]
    assert {"numpy", "ray", "torch", "transformers"} <= set(refused)
    subprocess.run([sys.executable, "-c", IMPORT_CLIENT, ",".join(refused)], cwd=ROOT, check=True)
