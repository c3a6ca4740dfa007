"""From what ``torch.export`` writes down to a functional graph of operators with rules.

PyTorch's own ``run_decompositions`` traces the whole program again, which takes longer than to export it, and changes
few nodes of it: a ``reshape`` becomes a ``view``, a ``dropout`` a copy. Networks repeat themselves: so each kind of
node that may change, which is an operator with the shapes and the other arguments it is given, is put once into a small
program, that is decomposed, and what became of it takes the place of all nodes of the kind. Where this cannot be done
(something is written in place, say), the whole program is traced.
"""

from __future__ import annotations

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

from districompile.registry import find_rule, is_pointwise

aten = torch.ops.aten

# Loops over a sequence, frames read by strides, factorisations that check their result: better computed whole
_KEPT_WHOLE = {
    "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::stft", "aten::istft", "aten::linalg_inv",
    "aten::linalg_cholesky", "aten::linalg_solve", "aten::linalg_lstsq", "aten::linalg_pinv", "aten::linalg_eigh",
    "aten::linalg_eig", "aten::linalg_det", "aten::linalg_slogdet", "aten::linalg_svd", "aten::linalg_svdvals",
}  # fmt: skip


def decompose(program: ExportedProgram) -> tuple[ExportedProgram, fx.Graph]:
    """The program made functional, with convolutions, norms, linears and attention whole, and operators that no rule
    knows written as those they are made of, where torch says which: an ``hstack`` is a ``cat``, an ``addmm`` a product
    and a sum.

    Gives the program whose signature (inputs, outputs, constants) holds for the graph, and the graph.
    """
    graph = _by_kinds(program)
    if graph is not None:
        return program, graph
    whole = trace_whole(program)
    return whole, whole.graph


def trace_whole(program: ExportedProgram) -> ExportedProgram:
    """The same by PyTorch's own means, node by node: each run traces the whole program again."""
    # One run, for most models, does both: functional, and without operators that are made of others
    program = _decomposed(program, _unknown(program)) or program.run_decompositions({})
    for _ in range(4):  # what operators are made of may be made of others
        table = _unknown(program)
        spelled = _decomposed(program, table) if table else None
        if spelled is None:
            break
        program = spelled
    return program


def _unknown(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """What operators without a rule are made of."""
    table = {}
    for node in program.graph.nodes:
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or op._schema.name in _KEPT_WHOLE:
            continue
        if not _known(op) and (made_of := _made_of(op)) is not None:
            table[op] = made_of
    return table


def _known(op: Any) -> bool:
    return find_rule(op) is not None or is_pointwise(op)


@functools.cache
def _core_table() -> dict[Any, Callable[..., Any]]:
    """PyTorch's, which takes a third of a second to put together."""
    table = dict(torch._decomp.core_aten_decompositions())
    table.update({op: torch._decomp.decomposition_table[op] for op in (aten.addmm.default, aten.addmv.default)})
    return table


@functools.cache
def _made_of(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What ``op`` is made of, or None. Libraries of operators may have been loaded since the table was put together."""
    if op in _core_table() or op.namespace == "aten":
        return _core_table().get(op)
    return dict(torch._decomp.core_aten_decompositions()).get(op)


def _decomposed(program: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram | None:
    """None where that fails, or leaves a check of values as a side effect, which a compiled program has no place for:
    then such operators are computed whole, on gathered inputs."""
    try:
        spelled = program.run_decompositions(table)
    except Exception:
        return None
    return None if any(s.kind == OutputKind.TOKEN for s in spelled.graph_signature.output_specs) else spelled


class _Unlike(Exception):
    """The program has something that is not decomposed node by node."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An operator with what it is given: ``arguments`` as text, tensors by number, and what these are like."""

    op: torch._ops.OpOverload
    arguments: str
    inputs: tuple[tuple[Any, ...], ...]


def _by_kinds(program: ExportedProgram) -> fx.Graph | None:
    """The program's graph decomposed kind by kind; None where only a trace of the whole can do it."""
    kinds: dict[_Kind, fx.Node] = {}
    of_node: dict[fx.Node, _Kind] = {}
    try:
        for node in program.graph.nodes:
            if node.op == "call_function" and _may_change(node):
                of_node[node] = kind = _kind_of(node)
                kinds.setdefault(kind, node)
        forms = dict(zip(kinds, _forms(list(kinds.values())), strict=True))
        return _rewritten(program.graph, {node: forms[kind] for node, kind in of_node.items()})
    except _Unlike:
        return None


def _may_change(node: fx.Node) -> bool:
    """Whether a trace may write other operators for a node's."""
    op = node.target
    if op is operator.getitem or _is_idle(node):
        return False
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        raise _Unlike
    if not all(isinstance(v, FakeTensor) for v in pytree.tree_leaves(node.meta.get("val"))):
        raise _Unlike  # numbers, which are known when it runs, or nothing
    return not _known(op) or _dissolves(op)


def _is_idle(node: fx.Node) -> bool:
    """Whether nothing is lost without the node."""
    return not node.users and (node.target is aten._assert_tensor_metadata.default or not node.is_impure())


@functools.cache
def _dissolves(op: torch._ops.OpOverload) -> bool:
    """Whether PyTorch's dispatcher makes it of others, and ``torch.export`` does not keep it all the same, as it does
    what is functional (linear, convolutions, attention). Where it cannot be asked, any may dissolve."""
    kept = getattr(torch._export.utils, "_is_preservable_cia_op", lambda op: False)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(str(cast(Any, op).name()), "CompositeImplicitAutograd")
    return bool(composite and not kept(op))


def _kind_of(node: fx.Node) -> _Kind:
    numbers = {n: i for i, n in enumerate(node.all_input_nodes)}

    def written(x: Any) -> str:
        return repr(fx.node.map_aggregate(x, lambda a: f"%{numbers[a]}" if isinstance(a, fx.Node) else a))

    inputs = []
    for value in (n.meta["val"] for n in numbers):
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise _Unlike
        inputs.append((tuple(value.shape), value.stride(), value.dtype, value.device))
    return _Kind(
        cast(torch._ops.OpOverload, node.target), f"{written(node.args)} {written(node.kwargs)}", tuple(inputs)
    )


@dataclasses.dataclass(frozen=True)
class _Form:
    """What takes the place of a node: ``nodes`` in order, which read each other and ``inputs``; its result's leaves."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]


def _forms(nodes: Sequence[fx.Node]) -> list[_Form]:
    """The nodes' forms, by one program that holds them side by side."""
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
        spelled = trace_whole(torch.export.export(module, tuple(examples), strict=False))
    except Exception as e:  # an operator that cannot be exported alone: the whole program, which was, decides
        raise _Unlike from e
    signature = spelled.graph_signature
    if any(s.kind != InputKind.USER_INPUT for s in signature.input_specs):
        raise _Unlike  # constants
    if any(s.kind != OutputKind.USER_OUTPUT for s in signature.output_specs):
        raise _Unlike
    placeholders = iter(spelled.graph.find_nodes(op="placeholder"))
    outputs = iter(spelled.graph.output_node().args[0])
    forms = []
    for node, result in zip(nodes, results, strict=True):
        inputs = tuple(next(placeholders) for _ in node.all_input_nodes)
        ends = tuple(next(outputs) for _ in result)
        forms.append(_Form(_between(inputs, ends), inputs, ends))
    return forms


def _between(inputs: Sequence[fx.Node], ends: Sequence[Any]) -> tuple[fx.Node, ...]:
    """The nodes that ``ends`` are computed by, in order."""
    found: set[fx.Node] = set()
    waiting = [n for n in ends if isinstance(n, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in inputs:
            found.add(node)
            waiting += node.all_input_nodes
    return tuple(sorted(found))


def _rewritten(old: fx.Graph, forms: Mapping[fx.Node, _Form]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in old.nodes:
        if node.op == "call_function" and _is_idle(node):
            continue
        if node in forms:
            env[node] = _inlined(graph, node, forms[node], env)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            env[node] = _added(graph, node, env)
            env[node].meta.update(node.meta)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].name = node.name  # a graph renames an ``input``, by which the signature knows it
    graph.eliminate_dead_code()
    return graph


def _added(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, Any]) -> fx.Node:
    """Named after its operator, as a trace does."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    return graph.create_node(node.op, node.target, args, kwargs, packet.__name__)


def _inlined(graph: fx.Graph, node: fx.Node, form: _Form, env: Mapping[fx.Node, Any]) -> Any:
    """What stands for the node's result: a node, or a tuple of nodes."""
    inner: dict[fx.Node, Any] = dict(zip(form.inputs, (env[n] for n in node.all_input_nodes), strict=True))
    mode = next(v.fake_mode for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, FakeTensor))
    for part in form.nodes:
        new = _added(graph, part, inner)
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
        with mode:
            new.meta["val"] = cast(Any, part.target)(*args, **kwargs)
        inner[part] = new
    ends = tuple(inner[e] if isinstance(e, fx.Node) else e for e in form.outputs)
    return ends if isinstance(node.meta["val"], list | tuple) else ends[0]
