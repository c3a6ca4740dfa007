# SPDX-License-Identifier: Apache-2.0
"""Find writes to weights that have no effect, such as a clamp of a parameter that is within its limits.

Networks project parameters in ``forward`` for training's sake. Such a write computes a function of the weight alone. If
it gives the weight's own value, bit for bit, the module is the same before and after a call, and the write can go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx


def keeps_weight(written: object, name: str, placeholders: Mapping[str, str], weights: Mapping[str, Tensor]) -> bool:
    """Return whether the node ``written`` computes the value that the weight ``name`` has already.

    ``placeholders`` maps placeholders of the graph to the names of their weights. The answer is no if the value depends
    on inputs of the module, if a weight has no data, and if it holds a NaN.
    """
    kept = weights.get(name)
    if not isinstance(written, fx.Node) or kept is None:
        return False
    value = _value(written, placeholders, weights, {})
    same = isinstance(value, Tensor) and value.dtype == kept.dtype and value.shape == kept.shape
    return same and torch.equal(value, kept)


def _value(
    node: fx.Node, placeholders: Mapping[str, str], weights: Mapping[str, Tensor], known: dict[fx.Node, Any]
) -> Any:
    """Compute a node from weights; None where that is impossible."""
    needed = [node]
    while needed:
        at = needed[-1]
        missing = [n for n in at.all_input_nodes if n not in known]
        if missing and at.op == "call_function":
            needed += missing
            continue
        known[needed.pop()] = _computed(at, placeholders, weights, known)
    return known[node]


def _computed(
    node: fx.Node, placeholders: Mapping[str, str], weights: Mapping[str, Tensor], known: Mapping[fx.Node, Any]
) -> Any:
    if node.op == "placeholder":
        weight = weights.get(placeholders.get(node.name, ""))
        return None if weight is None or weight.device.type == "meta" else weight.detach()
    if node.op != "call_function" or any(known[n] is None for n in node.all_input_nodes):
        return None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
    with torch.no_grad():
        return cast(Any, node.target)(*args, **kwargs)
