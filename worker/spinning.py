"""How long the threads that compute wait busily for each other.

Between two parallel pieces of work GNU's OpenMP, which torch uses on Linux, lets threads spin for milliseconds. Where
somebody else needs a core, too, one of them spins there while the other, which it waits for, does not get to run: with
one busy neighbour on two cores a step took 15 times as long. This many spins last a fraction of a millisecond: longer
than the pauses within a step, too short to do harm.
"""

from __future__ import annotations

from collections.abc import MutableMapping

NUM_SPINS = "10000"


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set what OpenMP reads when torch is imported first; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", NUM_SPINS)
