# SPDX-License-Identifier: Apache-2.0
"""The size of a layer on one rank, by which a backend tells whether 8 bits make it faster, and what its input is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from districompile.ir.meta import is_view, operator_name

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """A linear layer of ``rows`` tokens or pixels, or a convolution of ``image`` (N, C, ...) by ``kernel`` (O, ...).

    ``inner`` and ``columns`` are the channels of the input and of the result. ``apart``: a product or attention
    computes the input, so that it is rounded to 8 bits by a kernel of its own.
    """

    rows: int
    inner: int
    columns: int
    bias: bool
    dtype: torch.dtype
    apart: bool = False
    image: tuple[int, ...] | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


Faster = Callable[[LayerSize], bool | None]
"""Return whether 8 bits make a layer faster, or None where that is unknown."""

_COPIES = {aten.clone.default, aten.contiguous.default}
_FUSED = {
    "add", "sub", "mul", "div", "silu", "gelu", "relu", "sigmoid", "tanh", "layer_norm", "native_layer_norm",
    "group_norm", "rms_norm", "normalize", "to", "_to_copy", "cat", "pow", "rsqrt", "leaky_relu", "hardswish", "mish",
}  # fmt: skip


def computed_apart(node: fx.Node) -> bool:
    """Return whether ``node`` is the result of a product or attention, into which no rounding to 8 bits is fused.

    Half of a product times the GELU of its other half counts as one: a kernel computes both.
    """
    while (is_view(node) or node.target in _COPIES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    name = _short(node)
    return name not in _FUSED or (name == "mul" and any(_short(n) == "gelu" for n in node.all_input_nodes))


def _short(node: fx.Node) -> str:
    return operator_name(node).rpartition("::")[2]
