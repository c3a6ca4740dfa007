"""Packages that are compiled without their interface load and run as others do, and share the object that has it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.backends.inductor.package import CompileJob, Operand
from districompile.backends.inductor.pytorch_private import default_cpp_compiler, load_package
from districompile.backends.inductor.workers import compile_here
from districompile.ir.serialize import graph_to_json
from districompile.ir.spec import TensorSpec


def job(operator: Any) -> CompileJob:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator, (x,))
    x.meta["val"] = y.meta["val"] = torch.empty(24, device="meta")
    graph.output((y,))
    one = (Operand(TensorSpec((24,), torch.float32), "contiguous"),)
    settings = (("aot_inductor.compile_wrapper_opt_level", "O0"),)
    return CompileJob(graph_to_json(torch.fx.GraphModule({}, graph)), one, one, "cpu", settings)


def result(path: Path, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, torch.nan)
    load_package(path, torch.device("cpu")).run([x, y])
    return y


def test_host_code_is_divided() -> None:
    from districompile.backends.inductor.interface_object import divided

    interface = "// of all\n#include <a.h>  \n#include <torch/model_container.h>\n\nint load() { return 0; }\n"
    text = "#include <torch/cuda.h>\n" + interface.replace("a.h>  ", "a.h>") + "\nint run() { return 1; }\n"
    parts = divided(text, interface)
    assert parts is not None
    base = "template class AOTInductorModelBase<AOTInductorModel>; }"
    whole, rest = ([line for line in part.splitlines() if line] for part in parts)
    assert whole == ["#include <torch/cuda.h>", "// of all", "#include <a.h>", "#include <torch/model_container.h>",
                     "int load() { return 0; }", f"namespace torch::aot_inductor {{ {base}"]  # fmt: skip
    assert rest == ["#include <torch/cuda.h>", "#include <a.h>", f"namespace torch::aot_inductor {{ extern {base}",
                    "int run() { return 1; }"]  # fmt: skip
    assert divided("int run() { return 1; }\n", interface) is None
    assert divided(text, "") is None


@pytest.mark.skipif(default_cpp_compiler() is None, reason="needs a C++ compiler")
def test_packages_share_the_object_of_their_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache

    from districompile.backends.inductor import interface_object

    usual, find, made = codecache.CppBuilder, interface_object._object, []

    def recorded(*args: Any) -> str:
        made.append(find(*args))
        return made[-1]

    monkeypatch.setattr(interface_object, "_object", recorded)
    x = torch.randn(24)
    for name, operator in (("sin", torch.ops.aten.sin.default), ("exp", torch.ops.aten.exp.default)):
        compile_here(job(operator), tmp_path / f"{name}.pt2")
        assert torch.allclose(result(tmp_path / f"{name}.pt2", x), operator(x), rtol=1e-6)
    assert len(made) == 2 and made[0] == made[1] and Path(made[0]).is_file()
    assert codecache.CppBuilder is usual
    # Inductor's own file of the source stays whole
    with zipfile.ZipFile(tmp_path / "sin.pt2") as package:
        source = next(n for n in package.namelist() if n.endswith(".wrapper.cpp"))
        assert b"AOTInductorModelContainerRun" in package.read(source)

    # What cannot be compiled in two parts is compiled whole
    monkeypatch.setattr(interface_object, "divided", lambda *args: ("int x;\n", "this is no C++\n"))
    compile_here(job(torch.ops.aten.cos.default), tmp_path / "cos.pt2")
    assert torch.allclose(result(tmp_path / "cos.pt2", x), x.cos(), rtol=1e-6)
