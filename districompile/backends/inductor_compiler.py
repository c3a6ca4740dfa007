"""The C++ compiler that AOTInductor is to use: one whose libraries get on with those of the Python process.

A compiled program shares its process with torch, and so its C++ library. Where the compiler puts a copy of that
library into each program (``-static-libstdc++``, or a compiler built that way), the two copies disagree on the numbers
of their locale facets, and the first ``std::regex`` jumps into nothing. torch's own loader uses one.
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

_SOURCE = """
#include <stdexcept>
extern "C" int districompile_probe(int x) { if (x) throw std::runtime_error("x"); return x; }
"""
_SHARED = re.compile(rb"lib(std)?c\+\+\.(so|\d+\.dylib)")


@functools.cache
def choose_compiler() -> tuple[str | None, str | None]:
    """``(None, None)`` if torch's choice will do; otherwise what to use instead, or why nothing will do."""
    from torch._inductor import cpp_builder

    try:
        first = cpp_builder.get_cpp_compiler()
    except Exception:  # torch's own InvalidCxxCompiler, or what its search runs into
        first = None
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
        f"cannot use the C++ compiler {first}: what it links does not use the system's C++ library (libstdc++ or "
        "libc++), and would crash beside torch's. Install your system's g++, or name another compiler in CXX"
    )


def links_shared(compiler: str) -> bool:
    """Whether a shared library that ``compiler`` makes uses the C++ library of the process it is loaded into."""
    with tempfile.TemporaryDirectory(prefix="districompile-") as folder:
        source, made = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_SOURCE)
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and _SHARED.search(made.read_bytes()) is not None


def _others() -> Iterator[str]:
    """Compilers on the search path, and where systems keep theirs."""
    for folder in dict.fromkeys((*os.get_exec_path(), "/usr/bin", "/usr/local/bin")):
        for name in ("g++", "clang++", "c++"):
            found = shutil.which(name, path=folder)
            if found is not None:
                yield found
