# SPDX-License-Identifier: Apache-2.0
"""Decompose an exported program into a functional graph of operators with rules.

PyTorch's own ``run_decompositions`` traces the entire program again, which takes longer than its export, and changes
few nodes: a ``reshape`` becomes a ``view``, a ``dropout`` a copy. Most calls in a network occur many times. Each
distinct call (an operator with the shapes of its tensors and its other arguments) is therefore put once into a small
program, which is decomposed. Its decomposition then replaces all equal calls. Where this is not possible, as for
operators that write in place, the entire program is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

import districompile.passes.rules.table  # noqa: F401  (registers the rules that ship with the package)
from districompile.frontend import quantised
from districompile.ir.operators import decomposition_of, replace_functionalized
from districompile.sharding.registry import find_rule, is_pointwise

aten = torch.ops.aten

# Not decomposed: loops over a sequence, frames read by strides, factorisations that check their result
_NOT_DECOMPOSED = {
    "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::stft", "aten::istft", "aten::linalg_inv",
    "aten::linalg_cholesky", "aten::linalg_solve", "aten::linalg_lstsq", "aten::linalg_pinv", "aten::linalg_eigh",
    "aten::linalg_eig", "aten::linalg_det", "aten::linalg_slogdet", "aten::linalg_svd", "aten::linalg_svdvals",
}  # fmt: skip


def decompose(program: ExportedProgram) -> tuple[ExportedProgram, fx.Graph]:
    """Make a program functional, and decompose the operators without a rule, where torch has a decomposition.

    Convolutions, norms, linears and attention stay as they are. An ``hstack`` becomes a ``cat``, an ``addmm`` a product
    and a sum. Return the program whose signature (inputs, outputs, constants) holds for the graph, and the graph.
    """
    graph = _by_call(program)
    if graph is not None:
        return program, graph
    traced = trace_whole(program)
    replace_functionalized(traced.graph)
    return traced, traced.graph


def trace_whole(program: ExportedProgram) -> ExportedProgram:
    """Decompose by PyTorch's own ``run_decompositions``, of which each run traces the entire program again."""
    # In the older form, operators that write to their arguments have plain arguments, for views, too
    setting = "enable_auto_functionalized_v2_for_export"
    older = torch._export.config.patch({setting: False}) if hasattr(torch._export.config, setting) else None
    with older or contextlib.nullcontext():
        return _trace_whole(program)


def _trace_whole(program: ExportedProgram) -> ExportedProgram:
    # For most models, one run gives a functional program without composite operators
    program = _decomposed(program, _unknown(program)) or program.run_decompositions({})
    for _ in range(4):  # a decomposition may hold composite operators
        table = _unknown(program)
        decomposed = _decomposed(program, table) if table else None
        if decomposed is None:
            break
        program = decomposed
    return program


def _unknown(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """Return the decompositions of the operators without a rule, where there are any."""
    table = {}
    for node in program.graph.nodes:
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or op._schema.name in _NOT_DECOMPOSED:
            continue
        if not _known(op) and (found := decomposition_of(op) or _decomposition_of(op)) is not None:
            table[op] = found
    return table


def _known(op: Any) -> bool:
    return find_rule(op) is not None or is_pointwise(op)


@functools.cache
def _core_table() -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's table of decompositions, which takes a third of a second to build."""
    table = dict(torch._decomp.core_aten_decompositions())
    table.update({op: torch._decomp.decomposition_table[op] for op in (aten.addmm.default, aten.addmv.default)})
    return table


@functools.cache
def _decomposition_of(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """Return the decomposition of ``op``, or None. The table may be older than the operator's library."""
    if op in _core_table() or op.namespace == "aten":
        return _core_table().get(op)
    if op.namespace == quantised.NAMESPACE:
        return quantised.decomposition_of_quantised(op)
    return dict(torch._decomp.core_aten_decompositions()).get(op)


def _decomposed(program: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram | None:
    """Run decompositions; None where that fails, or leaves a check of values as a side effect.

    A compiled program cannot hold such a check. The operators are then computed on gathered inputs.
    """
    try:
        decomposed = program.run_decompositions(table)
    except Exception:
        return None
    return None if any(s.kind == OutputKind.TOKEN for s in decomposed.graph_signature.output_specs) else decomposed


class _NotByCall(Exception):
    """The program holds something that cannot be decomposed node by node."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A distinct call: operator, ``arguments`` as text with tensors by number, and shape, strides, dtype of these."""

    op: torch._ops.OpOverload
    arguments: str
    inputs: tuple[tuple[Any, ...], ...]


def _by_call(program: ExportedProgram) -> fx.Graph | None:
    """Decompose each distinct call once; None where only a trace of the entire program is possible."""
    calls: dict[_Call, fx.Node] = {}
    of_node: dict[fx.Node, _Call] = {}
    try:
        for node in program.graph.nodes:
            if node.op == "call_function" and _may_change(node):
                of_node[node] = call = _call_of(node)
                calls.setdefault(call, node)
        decompositions = dict(zip(calls, _decompositions(list(calls.values())), strict=True))
        return _rewritten(program.graph, {node: decompositions[call] for node, call in of_node.items()})
    except _NotByCall:
        return None


def _may_change(node: fx.Node) -> bool:
    """Return whether a trace may replace a node's operator by others."""
    op = node.target
    if op is operator.getitem or _is_idle(node):
        return False
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        raise _NotByCall
    if not all(isinstance(v, FakeTensor) for v in pytree.tree_leaves(node.meta.get("val"))):
        raise _NotByCall  # results that are numbers, known only at run time, or no results
    return not _known(op) or _dissolves(op)


def _is_idle(node: fx.Node) -> bool:
    """Return whether the node can be deleted."""
    return not node.users and (node.target is aten._assert_tensor_metadata.default or not node.is_impure())


@functools.cache
def _dissolves(op: torch._ops.OpOverload) -> bool:
    """Return whether PyTorch's dispatcher decomposes the operator, and ``torch.export`` does not keep it.

    It keeps functional composite operators (linear, convolutions, attention). Where this is unknown, the answer is yes.
    """
    kept = getattr(torch._export.utils, "_is_preservable_cia_op", lambda op: False)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(str(cast(Any, op).name()), "CompositeImplicitAutograd")
    return bool(composite and not kept(op))


def _call_of(node: fx.Node) -> _Call:
    numbers = {n: i for i, n in enumerate(node.all_input_nodes)}

    def written(x: Any) -> str:
        return repr(fx.node.map_aggregate(x, lambda a: f"%{numbers[a]}" if isinstance(a, fx.Node) else a))

    inputs = []
    for value in (n.meta["val"] for n in numbers):
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise _NotByCall
        inputs.append((tuple(value.shape), value.stride(), value.dtype, value.device))
    return _Call(
        cast(torch._ops.OpOverload, node.target), f"{written(node.args)} {written(node.kwargs)}", tuple(inputs)
    )


@dataclasses.dataclass(frozen=True)
class _Decomposition:
    """A decomposed call: ``nodes`` in order that read each other and ``inputs``, and the leaves of its result."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]


def _decompositions(nodes: Sequence[fx.Node]) -> list[_Decomposition]:
    """Decompose calls by one program that holds them side by side."""
    if not nodes:
        return []
    graph = fx.Graph()
    examples: list[Tensor] = []
    results: list[tuple[fx.Node, ...]] = []
    with FakeTensorMode():
        for node in nodes:
            given = {}
            for source in node.all_input_nodes:
                like = source.meta["val"]
                given[source] = graph.placeholder(f"x{len(examples)}")
                examples.append(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device))
            new = graph.node_copy(node, given.__getitem__)
            value = node.meta["val"]
            if isinstance(value, list | tuple):
                results.append(tuple(graph.call_function(operator.getitem, (new, i)) for i in range(len(value))))
            else:
                results.append((new,))
    graph.output(tuple(results))
    module = fx.GraphModule(torch.nn.Module(), graph)
    try:
        decomposed = trace_whole(torch.export.export(module, tuple(examples), strict=False))
    except Exception as e:  # an operator that cannot be exported alone: trace the entire program
        raise _NotByCall from e
    signature = decomposed.graph_signature
    if any(s.kind != InputKind.USER_INPUT for s in signature.input_specs):
        raise _NotByCall  # constants
    if any(s.kind != OutputKind.USER_OUTPUT for s in signature.output_specs):
        raise _NotByCall
    placeholders = iter(decomposed.graph.find_nodes(op="placeholder"))
    outputs = iter(decomposed.graph.output_node().args[0])
    decompositions = []
    for node, result in zip(nodes, results, strict=True):
        inputs = tuple(next(placeholders) for _ in node.all_input_nodes)
        ends = tuple(next(outputs) for _ in result)
        decompositions.append(_Decomposition(_between(inputs, ends), inputs, ends))
    return decompositions


def _between(inputs: Sequence[fx.Node], ends: Sequence[Any]) -> tuple[fx.Node, ...]:
    """Return the nodes that compute ``ends`` from ``inputs``, in order."""
    found: set[fx.Node] = set()
    waiting = [n for n in ends if isinstance(n, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in inputs:
            found.add(node)
            waiting += node.all_input_nodes
    return tuple(sorted(found))


def _rewritten(old: fx.Graph, decompositions: Mapping[fx.Node, _Decomposition]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in old.nodes:
        if node.op == "call_function" and _is_idle(node):
            continue
        if node in decompositions:
            env[node] = _inlined(graph, node, decompositions[node], env)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            env[node] = _added(graph, node, env)
            env[node].meta.update(node.meta)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].name = node.name  # a graph renames ``input``, but the signature has that name
    graph.eliminate_dead_code()
    return graph


def _added(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, Any]) -> fx.Node:
    """Add a copy of a call, named after its operator, as a trace does."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    return graph.create_node(node.op, node.target, args, kwargs, packet.__name__)


def _inlined(graph: fx.Graph, node: fx.Node, decomposition: _Decomposition, env: Mapping[fx.Node, Any]) -> Any:
    """Add the decomposition of a node. Return what replaces its result: a node, or a tuple of nodes."""
    inner: dict[fx.Node, Any] = dict(zip(decomposition.inputs, (env[n] for n in node.all_input_nodes), strict=True))
    mode = next(v.fake_mode for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, FakeTensor))
    for part in decomposition.nodes:
        new = _added(graph, part, inner)
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
        with mode:
            new.meta["val"] = cast(Any, part.target)(*args, **kwargs)
        inner[part] = new
    ends = tuple(inner[e] if isinstance(e, fx.Node) else e for e in decomposition.outputs)
    return ends if isinstance(node.meta["val"], list | tuple) else ends[0]
