"""Generated programs declare what they use; a compiler's error is told without its command."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from districompile.backends.inductor import workers
from districompile.backends.inductor.package import CompileJob
from districompile.backends.inductor.pytorch_private import default_cpp_compiler
from districompile.errors import BackendError


class _Wrapper:
    """As much of Inductor's wrapper as declares lists of sizes."""

    def __init__(self) -> None:
        self.int_array_id = itertools.count()
        self.codegen_int_array_var_cache: dict[Any, str] = {}

    def _codegen_int_array_var_impl(self, int_array: str, writeline: Any, known_statically: bool) -> str:
        name = f"int_array_{next(self.int_array_id)}"
        writeline(f"{name} = {int_array}")
        return name


def test_each_place_declares_what_it_uses() -> None:
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    from districompile.backends.inductor.torch_patches import fix_array_declarations

    wrapper, places = _Wrapper(), [SimpleNamespace(lines=list[str]()) for _ in range(8)]
    usual = CppWrapperCpu.codegen_int_array_var
    with fix_array_declarations():
        assert CppWrapperCpu.codegen_int_array_var is not usual
        for place in places * 2:
            name = CppWrapperCpu.codegen_int_array_var(wrapper, "{1L}", place.lines.append)  # type: ignore[arg-type]
            assert place.lines == [f"{name} = {{1L}}"]
    assert CppWrapperCpu.codegen_int_array_var is usual


def test_a_compilers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: CompileJob, path: str) -> None:
        raise RuntimeError(
            f"C++ compile error\nCommand: g++ {'-x ' * 300}\nOutput:\na.cpp:3:7: error: 'x' was not declared"
        )

    monkeypatch.setattr(workers, "compile_package", fail)
    job: Any = None
    with pytest.raises(BackendError) as failure:
        workers.compile_here(job, Path("x.pt2"))
    assert str(failure.value) == "RuntimeError: a.cpp:3:7: error: 'x' was not declared"


def test_host_code_is_compiled_without_regular_expressions(tmp_path: Path) -> None:
    """PyTorch's header parses the name of a device, and its regular expression takes g++ as long as all the rest."""
    from torch.utils import cpp_extension

    from districompile.backends.inductor.torch_patches import light_header, light_headers

    usual = cpp_extension.include_paths
    with light_headers():
        first = Path(cpp_extension.include_paths()[0], "torch/csrc/inductor/aoti_runtime/model_base.h")
        assert "std::regex" not in first.read_text() and cpp_extension.include_paths()[1:] == usual()
    assert cpp_extension.include_paths is usual
    assert light_header('inline void parse_device_str() { std::regex re("other"); }') is None
    compiler = default_cpp_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    body = first.read_text().partition("inline void parse_device_str(")[2].partition("\n}\n")[0]
    source = f"""
#include <iostream>
#include <string>
#define AOTI_RUNTIME_CHECK(ok, text) if (!(ok)) throw std::string(text)
int aoti_torch_device_type_cpu() {{ return 0; }}
int aoti_torch_device_type_cuda() {{ return 1; }}
inline void parse_device_str({body}
}}
int main(int count, char** names) {{
  for (int i = 1; i < count; i++) {{
    int type = -9, index = -9;
    try {{ parse_device_str(names[i], type, index); std::cout << type << "," << index << " "; }}
    catch (std::string& text) {{ std::cout << "refused "; }}
  }}
}}"""
    (tmp_path / "x.cpp").write_text(source)
    subprocess.run([compiler, "-std=c++17", str(tmp_path / "x.cpp"), "-o", str(tmp_path / "x")], check=True)
    names = ["cpu", "cuda", "cuda:0", "cuda:12", "cpu:1", "cuda:", "cuda:x", "tpu", "", "cpu|cuda", ":1"]
    given = subprocess.run([str(tmp_path / "x"), *names], check=True, capture_output=True, text=True).stdout.split()
    assert given == ["0,-1", "1,-1", "1,0", "1,12", "0,1", *["refused"] * 6]
