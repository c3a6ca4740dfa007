# SPDX-License-Identifier: Apache-2.0
"""Changes to Inductor while it compiles a package: one heuristic, and fixes of two faults.

Imports Inductor, which takes seconds: only for processes that compile. Everything that is imported here is private API
of PyTorch (see :mod:`~districompile.backends.inductor.pytorch_private`). Each change says what happens once it is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

if TYPE_CHECKING:
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.ir import TMADescriptorStable

_ROW = 2048


class Choices(InductorChoices):
    """Inductor's heuristics, but reductions of up to 2048 elements keep a row in registers.

    By default, Inductor reads rows of more than 1024 elements twice, in pieces; layer norms of up to 2048 channels are
    faster this way. ``InductorChoices`` and ``V.set_choices_handler`` exist in torch 2.9 and later. If they are gone,
    compiling fails; without this class everything works, and such layer norms are slower.
    """

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        return inner and bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _ROW))


@contextlib.contextmanager
def fix_array_declarations() -> Iterator[None]:
    """Fix the declarations of arrays in generated C++ code, in torch 2.11.

    Inductor remembers the arrays that it has declared by the ``id`` of the bound method that wrote them. That object is
    freed at once, and another method may get its ``id``. Generated code then sometimes uses an array before its
    declaration, and the C++ compiler refuses it. torch 2.13 uses the owner of the method instead. This context keeps
    the methods alive. If ``CppWrapperCpu.codegen_int_array_var`` is gone, it does nothing.
    """
    original = getattr(CppWrapperCpu, "codegen_int_array_var", None)
    if original is None:
        yield
        return
    kept: dict[tuple[int, str], Callable[..., None]] = {}

    def declare(
        self: CppWrapperCpu, int_array: str, writeline: Callable[..., None], *args: object, **kwargs: object
    ) -> str:
        owner = getattr(writeline, "__self__", None)
        if owner is not None:
            writeline = kept.setdefault((id(owner), writeline.__name__), writeline)
        return str(original(self, int_array, writeline, *args, **kwargs))

    CppWrapperCpu.codegen_int_array_var = declare  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = original  # type: ignore[method-assign]


@contextlib.contextmanager
def fix_tma_descriptors() -> Iterator[None]:
    """Fix the code with which Inductor times kernels that use tensor descriptors, in torch 2.11 to 2.13.

    That code is Python, but Inductor writes the view of the tensor of a descriptor (of the tensor memory accelerator)
    in C++. If ``PythonWrapperCodegen._generate_tma_descriptor_call_stable`` is gone, this context does nothing.
    """
    original = getattr(PythonWrapperCodegen, "_generate_tma_descriptor_call_stable", None)
    if original is None:
        yield
        return

    def call(self: PythonWrapperCodegen, desc: TMADescriptorStable, apply_size_hints: bool = False) -> str:
        if not apply_size_hints:
            return str(original(self, desc, apply_size_hints))
        shapes = desc.tensor.get_size(), desc.tensor.get_stride(), desc.block_shape
        size, stride, block = ([int(n) for n in shape] for shape in shapes)
        view = f"torch.as_strided({desc.get_tensor().get_name()}, {size}, {stride}, 0)"
        return f"triton.tools.tensor_descriptor.TensorDescriptor.from_tensor({view}, {block})"

    PythonWrapperCodegen._generate_tma_descriptor_call_stable = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        PythonWrapperCodegen._generate_tma_descriptor_call_stable = original  # type: ignore[method-assign]
