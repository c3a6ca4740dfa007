# SPDX-License-Identifier: Apache-2.0
"""Changes to Inductor while it compiles a package: one heuristic, a header, and fixes of two faults.

Imports Inductor, which takes seconds: only for processes that compile. Everything that is imported here is private API
of PyTorch (see :mod:`~districompile.backends.inductor.pytorch_private`). Each change says what happens once it is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.utils import cpp_extension

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


_HEADER = "torch/csrc/inductor/aoti_runtime/model_base.h"
_PARSED = re.compile(
    r'std::regex re\("\(([a-z|]+)\)\(:\(\[0-9\]\+\)\)\?"\);\s+std::smatch sm;\s+'
    r"bool matched = std::regex_match\(device_str, sm, re\);"
)
_LIGHT = """struct Part {
    bool matched;
    std::string text;
    const std::string& str() const { return text; }
  };
  const auto colon = device_str.find(':');
  const bool indexed = colon != std::string::npos;
  const Part sm[4] = {
      {}, {true, device_str.substr(0, colon)}, {}, {indexed, indexed ? device_str.substr(colon + 1) : std::string()}};
  const bool known = std::string("|KINDS|").find("|" + sm[1].text + "|") != std::string::npos;
  const bool digits = !sm[3].text.empty() && sm[3].text.find_first_not_of("0123456789") == std::string::npos;
  const bool matched = known && (digits || !indexed);"""


def light_header(text: str) -> str | None:
    """Return PyTorch's header ``model_base.h`` without ``std::regex``, or None where it has another form."""
    light, count = _PARSED.subn(lambda found: _LIGHT.replace("KINDS", found[1]), text)
    return light if count == 1 else None


@contextlib.contextmanager
def light_headers() -> Iterator[None]:
    """Compile the host code of a package without ``std::regex``: in half the time.

    A header of PyTorch parses the name of a device by a regular expression, whose templates are instantiated in every
    package: g++ takes 7.2 s with and 3.75 s without them, for a program of one operator. A copy of the header without
    it comes first on the search path. The same copy serves all processes, as precompiled headers depend on its place.
    If ``torch.utils.cpp_extension.include_paths`` or the header is another one, this context does nothing.
    """
    original = cpp_extension.include_paths
    text = next((f.read_text() for p in original() if (f := Path(p, _HEADER)).is_file()), "")
    light = light_header(text)
    if light is None:
        yield
        return
    folder = Path(cache_dir(), "districompile", hashlib.sha256(light.encode()).hexdigest()[:16])
    if not (target := folder / _HEADER).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}.part")
        part.write_text(light)
        part.replace(target)
    cpp_extension.include_paths = lambda *args, **kwargs: [str(folder), *original(*args, **kwargs)]
    try:
        yield
    finally:
        cpp_extension.include_paths = original


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
