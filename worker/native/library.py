"""The compiled kernels' library: finding the build for this CPU, and calling it.

Each kernel is a C function of pointers and 64-bit integers; the module that uses it declares it with `Kernel`. What is
built is in `setup.py`: the same sources once per instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Argument = Tensor | int | float | None
_log = logging.getLogger(__name__)


SOURCES = Path(__file__).with_name("src")
"""Where the kernels' sources are in a clone; an installed package has none."""


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernels for this CPU; None where they were not built, or where it has neither AVX-512 VNNI nor AVX2."""
    builds = _builds()
    for name in builds:
        path = Path(__file__).with_name(f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        if path.exists():
            return _open(path)
    if builds:
        _log.warning(
            "the compiled kernels are not here, so 8-bit and 4-bit models compute up to two times slower: install a "
            "C++ compiler (on Debian and Ubuntu: apt install g++) and install Spanwise again"
        )
    return None


def _open(path: Path) -> ctypes.CDLL | None:
    """Load a build, unless it was made of other sources than those beside it."""
    found = ctypes.CDLL(str(path))
    found.spanwise_sources.restype = ctypes.c_char_p
    if SOURCES.is_dir() and found.spanwise_sources().decode() != digest_of(SOURCES):
        _log.warning("the compiled kernels are older than their sources and stay unused: install Spanwise again")
        return None
    return found


def digest_of(sources: Path) -> str:
    """Return what `setup.py` puts into a build."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest()


def _builds() -> Sequence[str]:
    """Name the builds that this CPU runs, the fastest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return ("avx512", "avx2")
    return ("avx2",) if capability in ("AVX512", "AVX2") else ()


class Kernel:
    """A C function; tensors are passed as the address of their first element, None as a null pointer."""

    def __init__(self, name: str, arguments: str) -> None:
        """`arguments` has a letter for each: p a tensor or None, i an integer, f a float. Raises AttributeError
        unless `library` is there and has it."""
        found = library()
        self._call = getattr(found, f"spanwise_{name}")
        self._call.restype = None
        self._call.argtypes = [_TYPES[letter] for letter in arguments]

    def __call__(self, *arguments: Argument) -> None:
        """Call with tensors that are contiguous as the kernel wants them: nothing is checked."""
        self._call(*[one.data_ptr() if isinstance(one, Tensor) else one for one in arguments])


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
