# SPDX-License-Identifier: Apache-2.0
"""Compile the C interface of packages once, instead of with each package.

Inductor writes the same source text, ``interface.cpp``, into the host code of every package: the functions by which a
package is loaded and called. They need only the declaration of the model, so that one object serves all packages that
are compiled by the same command. Imports Inductor, and changes private API of PyTorch while a package is compiled (see
:mod:`~districompile.backends.inductor.pytorch_private`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._inductor import codecache
from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir

_INTERFACE = Path(torch.__file__).with_name("_inductor") / "codegen" / "aoti_runtime" / "interface.cpp"

# The members of the template that all models inherit from are compiled once, too
_MODEL = "namespace torch::aot_inductor {{ {}template class AOTInductorModelBase<AOTInductorModel>; }}\n"


def divided(host: str, interface: str) -> tuple[str, str] | None:
    """Divide the host code of a package at the text of the interface, which it has near its beginning.

    Returns the source of the interface, which also instantiates the base class of the model, and that of the rest. The
    rest has the includes of both, without the header of the container, which the interface alone uses. Returns None
    where ``host`` does not have the text ``interface``.
    """
    text = "\n".join(line.rstrip() for line in interface.strip().splitlines())
    if not text or text not in host:
        return None
    before, _, rest = host.partition(text)
    lines = text.splitlines()
    includes = "\n".join(line for line in lines if line.startswith("#include") and "model_container.h" not in line)
    return f"{before}{text}\n{_MODEL.format('')}", f"{before}{includes}\n{_MODEL.format('extern ')}{rest}"


@contextlib.contextmanager
def interface_apart() -> Iterator[None]:
    """Compile the host code of packages without their interface, and link the one object that has it.

    Files of Inductor's cache stay as they are, since a program that is not compiled in this context may read them. Host
    code that cannot be compiled in two parts is compiled as it is. If PyTorch's source of the interface is gone, or the
    host code does not have it, this context changes nothing.
    """
    original: type[CppBuilder] = vars(codecache)["CppBuilder"]
    if not _INTERFACE.is_file():
        yield
        return
    interface = _INTERFACE.read_text()
    objects: dict[str, str] = {}  # by the object of the host code that lacks the interface

    class Builder(original):  # type: ignore[misc, valid-type]
        whole: CppBuilder | None = None  # compiles the host code as it is

        def __init__(
            self, name: str, sources: str | list[str], BuildOption: BuildOptionsBase, output_dir: str = ""
        ) -> None:
            if isinstance(sources, list):
                sources = [*sources, *(objects[s] for s in sources if s in objects)]
            parts = None
            if isinstance(sources, str) and name.endswith(".wrapper"):
                parts = divided(Path(sources).read_text(), interface)
            if parts is None:
                super().__init__(name, sources, BuildOption, output_dir)
                return
            self.whole = original(name, sources, BuildOption, output_dir)
            apart = Path(str(sources)).with_suffix(".apart.cpp")
            _write(apart, parts[1])
            super().__init__(name, str(apart), BuildOption, output_dir)
            self.interface = parts[0]

        def build(self) -> None:
            if self.whole is None:
                super().build()
                return
            try:
                made = _object(original, self.interface, self._build_option)
                super().build()
            except CppCompileError:
                self.whole.build()
            else:
                objects[self.get_target_file_path()] = made

    vars(codecache)["CppBuilder"] = Builder
    try:
        yield
    finally:
        vars(codecache)["CppBuilder"] = original


def _object(builder: type[CppBuilder], source: str, options: BuildOptionsBase) -> str:
    """Return the path of the object of ``source``, which is compiled if it is not there.

    It is known by the command, which names the precompiled header by its content, and by the source.
    """
    command = builder("interface", "interface.cpp", options).get_command_line()
    key = hashlib.sha256("\0".join((torch.__version__, command, source)).encode()).hexdigest()[:16]
    made = Path(cache_dir(), "districompile", key, "interface.o")
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            text = Path(folder, "interface.cpp")
            text.write_text(source)
            compiler = builder("interface", str(text), options, folder)
            compiler.build()
            Path(compiler.get_target_file_path()).replace(made)
    return str(made)


def _write(path: Path, text: str) -> None:
    """Write a file that another process may write at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
