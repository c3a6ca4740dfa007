"""Inductor's heuristics, where ours differ. Imports Inductor, which takes seconds: for processes that compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

_ROW = 2048


class Choices(InductorChoices):
    """Layer norms of up to 2048 channels keep a row while they reduce it; by default, rows of more than 1024 are read
    twice, in pieces."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        return inner and bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _ROW))


@contextlib.contextmanager
def declared_before_use() -> Iterator[None]:
    """Inductor as it should be in torch 2.11: it remembers the lists of sizes that it has declared by the ``id`` of the
    method that wrote them, an object that is gone at once, and whose number the next one may get. A program of a second
    pass then uses what only stands further down, now and then, and the C++ compiler refuses it. (torch 2.13 looks at
    what the method belongs to.) Here such methods stay."""
    usual = getattr(CppWrapperCpu, "codegen_int_array_var", None)
    if usual is None:  # a torch that has none has not this fault
        yield
        return
    held: dict[tuple[int, str], Callable[..., None]] = {}

    def declare(self: Any, int_array: str, writeline: Callable[..., None], *args: Any, **kwargs: Any) -> str:
        owner = getattr(writeline, "__self__", None)
        if owner is not None:
            writeline = held.setdefault((id(owner), writeline.__name__), writeline)
        return str(usual(self, int_array, writeline, *args, **kwargs))

    CppWrapperCpu.codegen_int_array_var = declare  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = usual  # type: ignore[method-assign]


@contextlib.contextmanager
def described_views() -> Iterator[None]:
    """Inductor as it should be in torch 2.11 to 2.13: what it tries a kernel with is Python, and there it writes in C++
    which view of a tensor a descriptor (of the GPU's tensor memory accelerator) is made of."""
    usual = getattr(PythonWrapperCodegen, "_generate_tma_descriptor_call_stable", None)
    if usual is None:
        yield
        return

    def call(self: Any, desc: Any, apply_size_hints: bool = False) -> str:
        if not apply_size_hints:
            return str(usual(self, desc, apply_size_hints))
        shapes = desc.tensor.get_size(), desc.tensor.get_stride(), desc.block_shape
        size, stride, block = ([int(n) for n in shape] for shape in shapes)
        view = f"torch.as_strided({desc.get_tensor().get_name()}, {size}, {stride}, 0)"
        return f"triton.tools.tensor_descriptor.TensorDescriptor.from_tensor({view}, {block})"

    PythonWrapperCodegen._generate_tma_descriptor_call_stable = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        PythonWrapperCodegen._generate_tma_descriptor_call_stable = usual  # type: ignore[method-assign]
