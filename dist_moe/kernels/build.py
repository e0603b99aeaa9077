"""Build the C extension: cffi in API mode; csrc/dist_moe.h and its parts alone declare what Python may call."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

# setuptools runs this file with the directory of setup.py as the working directory, in a checkout and in an sdist.
SOURCES = Path("csrc")

# Last on the command line, so that no CFLAGS of the environment can change the bits (NUMERICS rule 2).
NUMERICS_FLAGS = ["-ffp-contract=off", "-fno-fast-math", "-fno-associative-math", "-fno-reciprocal-math"]
FLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", "-fvisibility=hidden"]


def declarations(header: str, folder: Path) -> str:
    """The part of dist_moe.h that cffi parses.

    Preprocessor lines are left out, except for integer constants; the headers in quotes are read in their place.
    """
    lines = []
    for line in header.splitlines():
        part = re.fullmatch(r'#include "(\w+\.h)"', line)
        if part is not None:
            lines.append(declarations((folder / part[1]).read_text(encoding="utf-8"), folder))
        elif not line.startswith("#") or re.fullmatch(r"#define \w+ (0x)?[0-9a-fA-F]+", line):
            lines.append(line)
    return "\n".join(lines)


def sources() -> list[str]:
    """All translation units, relative to setup.py; csrc/tests holds programs of its own."""
    return sorted(path.as_posix() for path in SOURCES.rglob("*.c") if "tests" not in path.parts)


def headers() -> list[str]:
    """All files whose change must rebuild the extension."""
    return sorted(path.as_posix() for path in SOURCES.rglob("*.h"))


def builder() -> FFI:
    """The FFI object that setuptools compiles into dist_moe.kernels._native."""
    werror = ["-Werror"] if os.environ.get("DIST_MOE_WERROR") == "1" else []
    ffi = FFI()
    ffi.cdef(declarations((SOURCES / "dist_moe.h").read_text(encoding="utf-8"), SOURCES))
    ffi.set_source(
        "dist_moe.kernels._native",
        '#include "dist_moe.h"',
        sources=sources(),
        include_dirs=[SOURCES.as_posix()],
        depends=headers(),
        libraries=["m"],
        extra_compile_args=[*FLAGS, *werror, *NUMERICS_FLAGS],
        extra_link_args=["-pthread"],
    )
    return ffi


ffi = builder()
