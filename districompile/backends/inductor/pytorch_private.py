# SPDX-License-Identifier: Apache-2.0
"""The private API of PyTorch that this backend uses, in one place.

PyTorch gives no promise for names that begin with an underscore. The oldest supported release, 2.9, has each name
below. Each function says what is lost once a name is gone. :mod:`~districompile.backends.inductor.torch_patches` holds
the changes to Inductor itself; it uses private names as well, and is imported only by processes that compile.

Nothing here imports Inductor at import time, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class PackageLoader(Protocol):
    """A loaded AOTInductor package."""

    def run(self, inputs: list[Tensor], /) -> list[Tensor]:
        """Enqueue the program on the current stream. The programs of this backend return no tensors."""


class TritonKernel(Protocol):
    """A Triton kernel with its launch configuration, as ``triton.autotune`` returns it."""

    @property
    def arg_names(self) -> list[str]: ...


def has_aoti() -> bool:
    """Say whether PyTorch has ``torch._inductor.aoti_compile_and_package``. Without it the backend is unavailable."""
    return hasattr(torch._inductor, "aoti_compile_and_package")


def load_package(path: Path, device: torch.device) -> PackageLoader:
    """Load the package ``path`` on ``device``, whose index must be known for a GPU. Raises what PyTorch raises.

    ``torch._C._aoti.AOTIModelPackageLoader`` is what the public ``torch._inductor.aoti_load_package`` ends in. The
    public function first compiles probes for vector instructions, only to compare them with those of the machine that
    compiled; :func:`districompile.backends.inductor.target.check_here` does that comparison without a compiler. If the
    class is gone, use the public function: loading then takes longer, and needs a C++ compiler.
    """
    index = device.index if device.type == "cuda" else -1
    # Arguments: file, model, single-threaded, number of runners, index of the device
    loader: PackageLoader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
    return loader


def compile_program(program: torch.export.ExportedProgram, path: str, config: Mapping[str, object]) -> None:
    """Compile an exported program into the package ``path``. Raises whatever an operator's lowering raises.

    ``torch._inductor.aoti_compile_and_package`` is documented, but not stable. If it is gone, the backend is
    unavailable (:func:`has_aoti`).

    For a GPU, Inductor's analysis of tilings substitutes numbers into clamped indices, and raises for some, such as
    those of poolings ("is not comparable", pytorch/pytorch#172168). It only chooses how a kernel goes through memory.
    Such a program is compiled without it.
    """
    compiled = torch._inductor.aoti_compile_and_package
    try:
        compiled(program, package_path=path, inductor_configs=dict(config))
    except Exception as e:
        if "is not comparable" not in str(e):
            raise
        compiled(program, package_path=path, inductor_configs={**config, "triton.coalesce_tiling_analysis": False})


def clear_fake_tensor_cache() -> None:
    """Forget the strides that fake operators gave so far.

    ``torch._subclasses.fake_tensor.FakeTensorMode.cache_clear``. Exporting switches cuDNN off, and convolutions then
    give results with other strides. Inductor would take those from the cache, and read the channels-last results of
    cuDNN as if they were row-major. If the function is gone, the cache has to be switched off by configuration.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.cache_clear()


def default_cpp_compiler() -> str | None:
    """Name the C++ compiler that Inductor would use, or None if it finds none.

    ``torch._inductor.cpp_builder.get_cpp_compiler``. If it is gone,
    :func:`districompile.backends.inductor.compiler.select_compiler` has only the compilers on the search path.
    """
    try:
        from torch._inductor import cpp_builder

        return cpp_builder.get_cpp_compiler()
    except Exception:  # Inductor's own InvalidCxxCompiler, or whatever its search meets
        return None


def set_compile_threads(count: int) -> None:
    """Limit the threads with which Inductor compiles in this process.

    ``torch._inductor.config.compile_threads``. If it is gone, each worker process starts as many as there are cores.
    """
    import torch._inductor.config

    torch._inductor.config.compile_threads = count


def call_triton_kernel(
    kernel: TritonKernel, grid: Sequence[int], tensors: Mapping[str, Tensor], constants: Mapping[str, object],
    descriptors: Mapping[str, Sequence[int]],
) -> None:  # fmt: skip
    """Call a Triton kernel that writes into its arguments, eagerly or while Inductor traces it.

    ``descriptors`` gives the shape of a block for each tensor that the kernel reads through a descriptor of the tensor
    memory accelerator. ``torch._higher_order_ops.triton_kernel_wrap`` is what the public
    ``torch.library.wrap_triton`` ends in; ``wrap_triton`` cannot trace descriptors. If the module changes, the custom
    Triton kernels cannot be called, and autotuning excludes them with a warning.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    table = triton_kernel_wrap.kernel_side_table
    triton_kernel_wrap.triton_kernel_wrapper_mutation(
        kernel_idx=table.add_kernel(kernel),
        constant_args_idx=table.add_constant_args(dict(constants)),
        grid=[tuple(grid) + (1,) * (3 - len(grid))],
        tma_descriptor_metadata={
            name: triton_kernel_wrap.create_tma_stable_metadata(list(block)) for name, block in descriptors.items()
        },
        kwargs=dict(tensors),
    )
