# SPDX-License-Identifier: Apache-2.0
"""Put all tensors of a captured graph on one device.

A module on a GPU may make constants on the CPU and copy them: ``torch.arange(n).to(x.device)``. A segment of a program
runs on one device, and passes delete copies that keep the dtype. Constants are therefore made where the module is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from districompile.ir.graph import fake_mode_of, replace


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device of the module's parameters, or else of its buffers; the CPU for a module without either."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def put_on_one_device(graph: fx.Graph, device: torch.device) -> None:
    """Change ``graph``, whose calls are functional, so that every fake result is on ``device``.

    Arguments that name a device name ``device`` afterwards. Nothing changes where all results are there already.
    """
    if all(_is_on(n, device) for n in graph.nodes):
        return
    mode = next(m for m in map(fake_mode_of, graph.nodes) if m is not None)
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = replace(node.args, torch.device, lambda _: device)
            node.kwargs = replace(node.kwargs, torch.device, lambda _: device)
            if _makes_tensor(node):
                node.kwargs = {**node.kwargs, "device": device}
        if node.meta.get("val") is None or (_is_on(node, device) and moved.isdisjoint(node.all_input_nodes)):
            continue
        moved.add(node)
        with mode, torch.no_grad():
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = cast(Any, node.target)(*args, **kwargs)
            else:
                node.meta["val"] = node.meta["val"].to(device)


def _is_on(node: fx.Node, device: torch.device) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return all(x.device == device for x in leaves if isinstance(x, Tensor))


def _makes_tensor(node: fx.Node) -> bool:
    """Return whether a call takes a device, and would choose the default one: it reads no tensor and names none."""
    schema: Any = getattr(node.target, "_schema", None)
    takes = schema is not None and any(a.name == "device" for a in schema.arguments)
    return takes and not node.all_input_nodes and node.kwargs.get("device") is None
