"""Generated programs declare what they use; a compiler's error is told without its command."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from districompile.backends.inductor import workers
from districompile.backends.inductor.package import CompileJob


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
    assert workers._attempt(job, "x.pt2") == "RuntimeError: a.cpp:3:7: error: 'x' was not declared"
