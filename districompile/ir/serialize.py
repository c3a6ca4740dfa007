# SPDX-License-Identifier: Apache-2.0
"""Serialize fx graphs as JSON: the text is canonical, so that equal graphs have equal hashes, and holds no code.

::

    {"inputs": [["float32", [1, 8, 4]], ["float32", [8]]],
     "nodes": [["aten.mul.Tensor", ["%0", "%1"], {}], ["aten.sum.dim_IntList", ["%2", [-1]], {}]],
     "outputs": ["%3"]}

Values are numbered in order: inputs (placeholders) first, then nodes. Nodes that no output needs are left out.
Arguments are JSON values. A value that JSON lacks is an object with one key: ``{"float": "inf"}``, ``{"str": "mean"}``
(a bare string is a reference), ``{"dtype": "float16"}``, ``{"device": "cpu"}``, ``{"layout": "strided"}``,
``{"memory_format": "contiguous_format"}``, ``{"slice": [0, 4, 1]}``, ``{"complex": [0.0, 1.0]}``. Tuples are written as
lists, which every operator takes as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

import districompile.ir.ops  # noqa: F401  (registers torch.ops.districompile)
from districompile.errors import BackendError
from districompile.ir.operators import NAMESPACES, find_operator, is_declared, is_foreign, name_of
from districompile.ir.spec import TensorSpec, dtype_name, dtype_of

_REFUSED = ("aten.from_file",)  # opens files
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.removeprefix('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ not_"),
        (math, "ceil floor sqrt trunc"),
    )
    for name in names.split()
}
_LAYOUTS = {str(x).removeprefix("torch."): x for x in (torch.strided, torch.sparse_coo)}
_MEMORY_FORMATS = {
    str(x).removeprefix("torch."): x
    for x in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def op_name(target: object) -> str:
    """Return the name of an operator, such as ``"aten.conv2d.default"`` or ``"operator.getitem"``.

    Raise :class:`BackendError` for an operator that a file may not hold.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if target.namespace in NAMESPACES and not name.startswith(_REFUSED):
            return name
        if is_foreign(target):
            if is_declared(target):
                return name_of(target)
            raise BackendError(
                f"the operator {name_of(target)} cannot be stored: no package declares it; give it a rule, or "
                "districompile.extend.operator, in an extension (docs/extending/operator.md)"
            )
    elif callable(target) and target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    allowed = ", ".join(NAMESPACES)
    raise BackendError(
        f"the operator {target} cannot be stored: only those of {allowed}, declared ones and plain arithmetic can"
    )


def op_of(name: str) -> Callable[..., Any]:
    """Return the operator called ``name``. Raise :class:`BackendError` if it is unknown or not allowed."""
    if not isinstance(name, str):
        raise BackendError(f"the graph uses {name!r} for an operator")
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in NAMESPACES and not name.startswith(_REFUSED):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and parts[2] in packet.overloads():  # type: ignore[no-untyped-call]
            overload: Callable[..., Any] = getattr(packet, parts[2])
            return overload
    found = find_operator(name)
    if found is not None:
        return found
    raise BackendError(f"the graph uses the operator {name!r}, which this version does not know or does not allow")


def needed(graph: fx.Graph) -> list[fx.Node]:
    """Return the call nodes that the output needs, in order."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in wanted:
            wanted.update(node.all_input_nodes)
    return [n for n in graph.nodes if n in wanted and n.op != "placeholder"]


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes in the flat output tuple. Raise :class:`BackendError` for any other output."""
    value = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, fx.Node) for v in values):
        raise BackendError(f"a segment's output must be a flat tuple of tensors, not {value}")
    return [v for v in values if isinstance(v, fx.Node)]


def spec_of(node: fx.Node) -> TensorSpec:
    """Return shape and dtype of a node's result. Raise :class:`BackendError` unless it is a tensor of static shape."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise BackendError(f"{node.name} ({node.target}) is not known to be a tensor")
    if not all(isinstance(s, int) for s in value.shape):
        raise BackendError(f"{node.name} ({node.target}) has the shape {tuple(value.shape)}, which is not static")
    return TensorSpec(tuple(int(s) for s in value.shape), value.dtype)


def graph_to_json(gm: fx.GraphModule) -> str:
    """Return the canonical text of a graph. Raise :class:`BackendError` naming a node that cannot be written."""
    names: dict[fx.Node, str] = {}
    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            spec = spec_of(node)
            names[node] = f"%{len(names)}"
            inputs.append([dtype_name(spec.dtype), list(spec.shape)])
    nodes = []
    for node in needed(gm.graph):
        if node.op != "call_function":
            raise BackendError(f"{node.name}: a segment holds operators only, not a {node.op} ({node.target})")
        try:
            args = [encode(a, names) for a in node.args]
            kwargs = {k: encode(v, names) for k, v in sorted(node.kwargs.items())}
            nodes.append([op_name(node.target), args, kwargs])
        except TypeError as e:
            raise BackendError(f"{node.name} ({node.target}): {e}") from e
        names[node] = f"%{len(names)}"
    outputs = [names[n] for n in output_nodes(gm.graph)]
    return canonical({"inputs": inputs, "nodes": nodes, "outputs": outputs})


def graph_from_json(text: str, device: torch.device | None = None) -> fx.GraphModule:
    """Read a graph that :func:`graph_to_json` wrote, for ``device``. Only placeholders carry ``meta["val"]``.

    Raise :class:`BackendError` for text that is not such a graph, or uses an operator that is not allowed.
    """
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    try:
        data = json.loads(text)
        for dtype, shape in data["inputs"]:
            node = graph.placeholder(f"v{len(values)}")
            node.meta["val"] = torch.empty([int(s) for s in shape], dtype=dtype_of(dtype), device="meta")
            values[f"%{len(values)}"] = node
        for name, args, kwargs in data["nodes"]:
            decoded = tuple(decode(a, values, device) for a in args)
            function = op_of(name)
            _check_keywords(function, kwargs)
            named = {k: decode(v, values, device) for k, v in kwargs.items()}
            node = graph.call_function(function, decoded, named)
            values[f"%{len(values)}"] = node
        graph.output(tuple(values[o] for o in data["outputs"]))
        return fx.GraphModule(torch.nn.Module(), graph)
    except BackendError:
        raise
    except Exception as e:  # of JSON, of lookups in it, and of torch.fx for arguments that are no call's
        raise BackendError(f"not a graph of this version: {type(e).__name__} {str(e).partition(chr(10))[0]}") from e


def _check_keywords(function: Callable[..., Any], kwargs: Any) -> None:
    """Raise ``ValueError`` for a keyword that the operator does not have.

    Keywords become Python source in :class:`torch.fx.GraphModule`, so no other text may be one.
    """
    known = {a.name for a in function._schema.arguments} if isinstance(function, torch._ops.OpOverload) else set()
    if odd := set(kwargs) - known:
        raise ValueError(f"{function} has no argument {min(odd)!r}")


def content_hash(text: str) -> str:
    """Return the first 20 hex digits of the sha256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def canonical(value: Any) -> str:
    """Return JSON in the canonical form, which is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode(x: object, names: dict[fx.Node, str]) -> Any:
    """Encode an argument as a JSON value; nodes become ``names``. Raise ``TypeError`` for a value of another type."""
    if isinstance(x, fx.Node):
        return names[x]
    if x is None or isinstance(x, bool | int):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else {"float": repr(x)}
    if isinstance(x, str):
        return {"str": x}
    if isinstance(x, list | tuple):
        return [encode(v, names) for v in x]
    if isinstance(x, torch.dtype):
        return {"dtype": dtype_name(x)}
    if isinstance(x, torch.device):
        return {"device": "cpu"}  # a segment is on one device, which its reader chooses
    if isinstance(x, torch.layout | torch.memory_format):
        kind = "layout" if isinstance(x, torch.layout) else "memory_format"
        return {kind: str(x).removeprefix("torch.")}
    if isinstance(x, slice):
        return {"slice": [encode(v, names) for v in (x.start, x.stop, x.step)]}
    if isinstance(x, complex):
        return {"complex": [encode(x.real, names), encode(x.imag, names)]}
    raise TypeError(f"an argument of type {type(x).__name__} cannot be stored (symbolic shapes must be made static)")


def decode(x: Any, values: dict[str, fx.Node], device: torch.device | None = None) -> Argument:
    """Decode an argument that :func:`encode` wrote; names become nodes of ``values``, devices ``device`` (cpu)."""
    if isinstance(x, str):
        return values[x]
    if isinstance(x, list):
        return [decode(v, values, device) for v in x]
    if not isinstance(x, dict):
        if isinstance(x, int) and not -(1 << 63) <= x < 1 << 63:
            raise ValueError(f"the number {str(x)[:20]}... has more than 64 bits")
        return x  # type: ignore[no-any-return]
    ((kind, value),) = x.items()
    if kind == "float":
        return float(value)
    if kind == "str":
        return str(value)
    if kind == "dtype":
        return dtype_of(value)
    if kind == "device":
        return device or torch.device("cpu")
    if kind == "layout":
        return _LAYOUTS[value]
    if kind == "memory_format":
        return _MEMORY_FORMATS[value]
    if kind == "slice":
        return slice(*(decode(v, values, device) for v in value))
    if kind == "complex":
        return complex(*(decode(v, values, device) for v in value))  # type: ignore[arg-type]
    raise ValueError(f"unknown kind of argument {kind!r}")
