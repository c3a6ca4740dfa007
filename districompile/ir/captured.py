# SPDX-License-Identifier: Apache-2.0
"""The captured module: graph, inputs, weights and output structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.ir.graph import copy_graph
from districompile.ir.spec import InputSpec, TensorSpec


@dataclasses.dataclass
class CapturedModule:
    """A module as one functional graph of aten operators.

    Placeholders are the tensor inputs (``inputs``, in order), ``get_attr`` nodes the weights (parameters, buffers and
    constants), and the output is a flat tuple. ``weights`` maps each weight to its spec and a function that reads its
    data. The graph holds fake tensors only. ``timestep`` is that of the example call.
    """

    graph: fx.Graph
    inputs: tuple[InputSpec, ...]
    constants: dict[str, Any]
    signature: tuple[str, ...]
    output: Any
    weights: dict[str, tuple[TensorSpec, Callable[[], Tensor]]]
    fake_mode: FakeTensorMode
    model_class: str = ""
    config: dict[str, Any] | None = None
    timestep: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the module, on which all tensors of the graph are."""
        values = (n.meta.get("val") for n in self.graph.nodes)
        return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))

    def weight_on(self, name: str, device: torch.device) -> Tensor:
        """Read a weight, on ``device``: constants of a module on a GPU may be on the CPU."""
        return self.weights[name][1]().to(device)

    def copy_graph(self) -> fx.Graph:
        """Copy the graph for one compilation: passes change the copy, since a capture may serve several of them."""
        return copy_graph(self.graph)
