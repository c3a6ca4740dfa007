"""What of a graph our own kernels compute, and which of them have to be in the bundle."""

from __future__ import annotations

from typing import Any

from torch import fx

from districompile.backends.attention import KERNEL_ATTENTION, PRODUCT_ATTENTION
from districompile.backends.gpu.gated import GATED_PRODUCT
from districompile.backends.gpu.hopper import Kernel, convolution_kernel, gated_kernel
from districompile.backends.inductor_direct import INSERT_PRODUCT
from districompile.backends.inductor_unfold import KERNEL_CONVOLUTION

_OURS = {KERNEL_ATTENTION, PRODUCT_ATTENTION, GATED_PRODUCT, KERNEL_CONVOLUTION, INSERT_PRODUCT}
# The last argument of each says how: no blocks, or tile, are two products without a kernel


def has_kernels(graph: fx.Graph) -> bool:
    """Whether any kernel of ours is in ``graph``."""
    return any(n.target in _OURS and n.args[-1] for n in graph.nodes)


def called_kernels(graph: fx.Graph) -> tuple[Kernel, ...]:
    """The kernels that an engine of ``graph`` calls, which are not in its program."""
    found = set()
    for node in graph.nodes:
        args: Any = node.args
        if node.target is GATED_PRODUCT:
            x, _, bias, columns = args
            found.add(gated_kernel(columns, bias is not None, x.meta["val"].dtype))
        elif node.target is KERNEL_CONVOLUTION:
            found.add(convolution_kernel(args[-1], args[0].meta["val"].dtype))
    return tuple(sorted(found, key=str))
