"""What is set before torch is imported, and what the user's own settings are worth."""

from __future__ import annotations

import subprocess
import sys

from worker.spinning import NUM_SPINS, limit_spinning


def test_spinning_is_limited_unless_the_user_has_decided() -> None:
    environment: dict[str, str] = {}
    limit_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": NUM_SPINS}
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(chosen)
        limit_spinning(environment)
        assert environment == chosen


def test_neither_the_actor_nor_the_local_model_imports_torch_before() -> None:
    program = "import sys, cluster.local, worker.actor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
