# SPDX-License-Identifier: Apache-2.0
"""Select a C++ compiler whose programs can share a process with PyTorch.

A compiled program shares its process, and so its C++ library, with PyTorch. Some compilers put a copy of that library
into each program (``-static-libstdc++``, or a compiler built that way). The two copies then disagree on the numbers of
their locale facets, and the first ``std::regex`` jumps to an invalid address. PyTorch's own loader uses one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from districompile.backends.inductor.pytorch_private import default_cpp_compiler

_SOURCE = """
#include <stdexcept>
extern "C" int districompile_probe(int x) { if (x) throw std::runtime_error("x"); return x; }
"""
_SHARED = re.compile(rb"lib(std)?c\+\+\.(so|\d+\.dylib)")


def way_out(reason: str, custom_kernels: bool) -> str:
    """Return what a user may do about a compilation that failed, behind a colon; nothing if that is not known."""
    if "out of memory" in reason.lower():
        return ": free memory of the GPU, or give fewer processes (-o workers=2)"
    return ": try autotune=linear,conv, without custom kernels" if custom_kernels else ""


@functools.cache
def select_compiler() -> tuple[str | None, str | None]:
    """Return (compiler, reason).

    (None, None): Inductor's default is good; (path, None): use this compiler; (None, reason): no compiler is good.
    """
    first = default_cpp_compiler()
    if sys.platform == "win32":
        return None, None if first else "needs a C++ compiler to convert: install Visual Studio's"
    if first and links_shared(first):
        return None, None
    for other in _others():
        if other != first and links_shared(other):
            return other, None
    if first is None:
        return None, "needs a C++ compiler to convert: install g++ or clang++"
    return None, (
        f"cannot use the C++ compiler {first}: its programs do not use the system's C++ library (libstdc++ or "
        "libc++), and would crash in one process with PyTorch. Install your system's g++, or name one in CXX"
    )


def links_shared(compiler: str) -> bool:
    """Say whether shared libraries of ``compiler`` use the C++ library of the process that loads them."""
    with tempfile.TemporaryDirectory(prefix="districompile-") as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_SOURCE)
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and _SHARED.search(library.read_bytes()) is not None


def _others() -> Iterator[str]:
    """Iterate over the compilers on the search path and in the usual folders of systems."""
    for folder in dict.fromkeys((*os.get_exec_path(), "/usr/bin", "/usr/local/bin")):
        for name in ("g++", "clang++", "c++"):
            found = shutil.which(name, path=folder)
            if found is not None:
                yield found
