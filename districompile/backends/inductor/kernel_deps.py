# SPDX-License-Identifier: Apache-2.0
"""Find custom-kernel calls in a graph and the binaries the bundle must ship."""

from __future__ import annotations

from typing import Any

from torch import fx

from districompile.backends.inductor.attention import KERNEL_ATTENTION, PROJECTED_ATTENTION
from districompile.backends.inductor.convolution import KERNEL_CONVOLUTION
from districompile.backends.inductor.fp8 import KERNEL_CONV, KERNEL_GATED_LINEAR, KERNELS, LIBRARY
from districompile.backends.inductor.gated import GATED_LINEAR
from districompile.backends.inductor.kernels.fp8 import fp8_kernel
from districompile.backends.inductor.kernels.hopper import Kernel, convolution_kernel, gated_kernel
from districompile.backends.inductor.split_linear import INSERT_LINEAR

_CUSTOM = {KERNEL_ATTENTION, PROJECTED_ATTENTION, GATED_LINEAR, KERNEL_CONVOLUTION, INSERT_LINEAR, *KERNELS}
# The last argument of each is the configuration; without one, INSERT_LINEAR is two matrix products and no kernel


def has_kernels(graph: fx.Graph) -> bool:
    """Say whether ``graph`` calls any custom kernel."""
    return any(n.target in _CUSTOM and n.args[-1] for n in graph.nodes)


def called_kernels(graph: fx.Graph) -> tuple[Kernel, ...]:
    """List the CUDA kernels that an engine of ``graph`` calls. They are not part of its compiled program."""
    found = set()
    for node in graph.nodes:
        args: Any = node.args
        if node.target is GATED_LINEAR:
            x, _, bias, columns = args
            found.add(gated_kernel(columns, bias is not None, x.meta["val"].dtype))
        elif node.target is KERNEL_CONVOLUTION:
            found.add(convolution_kernel(args[-1], args[0].meta["val"].dtype))
        elif node.target in KERNELS and args[-1] != LIBRARY:
            bias = args[4 if node.target is KERNEL_CONV else 3] is not None
            found.add(fp8_kernel(args[-1], node.target is KERNEL_GATED_LINEAR, bias, args[0].meta["val"].dtype))
    return tuple(sorted(found, key=str))
