"""The compiled kernels of `worker.native`, which are optional; everything else is in pyproject.toml.

They are shared libraries for ctypes rather than Python modules. Without a compiler, or on a processor that has none of
the instruction sets, they are left out and torch's operators take their place.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("worker/native/src")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wno-psabi",
]
BUILDS = {
    "avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
}
"""Compiler flags by the name of the build; `-ffp-contract=off` lets vector loops and their ends round alike."""


def kernels() -> list[Extension]:
    """Return one library per instruction set."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))).hexdigest()
    return [
        Extension(
            f"worker.native._{name}",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            define_macros=[("SPANWISE_SOURCES", f'"{digest}"')],
            extra_compile_args=FLAGS + flags,
            language="c++",
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]


setup(ext_modules=kernels())  # one after the other: both builds write the same object files
