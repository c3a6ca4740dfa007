"""A segment as AOTInductor compiles it: one function of inputs, weights and output buffers that returns nothing.

The compiled program writes each result into the buffer it is given, in the memory format that the job states. The
composites of :mod:`districompile.ir.ops` are traced in the form that gives the fewest passes over memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.base import BuildSegment
from districompile.backends.inductor_direct import INSERT_PRODUCT, in_place, insert_product_in_place, plain_slice
from districompile.backends.inductor_forms import FUSED, insert_in_place
from districompile.ir.ops import ops
from districompile.ir.plan import TensorSpec, dtype_name, dtype_of
from districompile.ir.serialize import graph_from_json


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


FORMATS = ("contiguous", "channels_last", "channels_last_3d")

_ON_IMAGES = {
    overload
    for name in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "group_norm", "max_pool2d", "avg_pool2d")
    for overload in _overloads(getattr(torch.ops.aten, name))
} | {ops.moments.default, ops.normalize.default}
_MOVE_DIMS = {
    overload
    for name in ("permute", "transpose", "reshape", "view", "_unsafe_view", "unflatten", "flatten", "movedim", "linear",
                 "matmul", "bmm", "scaled_dot_product_attention")
    for overload in _overloads(getattr(torch.ops.aten, name))
} | {ops.moments.default}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operand:
    """Shape, dtype and memory format of an input, a weight or an output; a part of a tensor has ``whole``'s strides."""

    spec: TensorSpec
    format: str = "contiguous"
    whole: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements, also for dims of size 1, where any stride would do: compiled code may look at them."""
        shape = self.whole or self.spec.shape
        ndim = len(shape)
        inner = list(range(ndim - 1, -1, -1))
        if self.format != "contiguous":  # channels innermost, batch outermost
            inner = [1, *range(ndim - 1, 1, -1), 0]
        strides = [0] * ndim
        step = 1
        for dim in inner:
            strides[dim] = step
            step *= max(1, shape[dim])
        return tuple(strides)

    def empty(self, device: torch.device) -> Tensor:
        """Uninitialised memory of this format."""
        return torch.empty_strided(self.spec.shape, self.strides, dtype=self.spec.dtype, device=device)

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the strides, and the 16-byte alignment, that compiled code counts on."""
        return tensor.stride() == self.strides and tensor.data_ptr() % 16 == 0

    def to_json(self) -> list[Any]:
        return [dtype_name(self.spec.dtype), list(self.spec.shape), self.format, self.whole and list(self.whole)]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Operand:
        """Raises ``ValueError`` (or :class:`BundleError` for a dtype) for what :meth:`to_json` does not write."""
        dtype, shape, memory_format, whole = data
        if memory_format not in FORMATS:
            raise ValueError(f"{memory_format!r} is no memory format")
        spec = TensorSpec(tuple(int(s) for s in shape), dtype_of(dtype))
        return Operand(spec, memory_format, None if whole is None else tuple(int(s) for s in whole))


@dataclasses.dataclass(frozen=True)
class Part:
    """Elements [start, stop) of an input along ``dim``."""

    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


def lift_parts(graph: fx.Graph, inputs: int, kept: Sequence[int]) -> tuple[fx.GraphModule, list[list[Part] | None]]:
    """A copy of ``graph`` with the outputs ``kept`` in which slices of an input are inputs of their own, and which
    those are for each input.

    The slices are taken when the program is called, as views: layers that read different parts of one projection are
    then one and the same program.
    """
    new, env = fx.Graph(), {}
    parts: list[list[Part] | None] = []
    for number, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        found = [_part(u) for u in node.users]
        if number < inputs and found and all(found):
            parts.append([p for p in found if p is not None])
            for user in node.users:
                env[user] = new.placeholder(user.name)
                env[user].meta = dict(user.meta)
        else:
            parts.append(None)
            env[node] = new.node_copy(node)
    for node in graph.nodes:
        if node.op == "output":
            results: Any = node.args[0]
            new.output(tuple(env[results[i]] for i in kept))
        elif node.op != "placeholder" and node not in env:
            env[node] = new.node_copy(node, lambda n: env[n])
    new.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return fx.GraphModule(torch.nn.Module(), new), parts[:inputs]


def _part(node: fx.Node) -> Part | None:
    taken = plain_slice(node)
    if taken is None:
        return None
    args: Any = node.args
    source = args[0].meta["val"]
    offset = taken[1] * math.prod(source.shape[taken[0] + 1 :]) * source.element_size()
    return None if offset % 16 or source.ndim > 3 else Part(*taken)


@dataclasses.dataclass(frozen=True)
class Room:
    """An output that is rows [start, stop) of the input ``source``, which the program writes there."""

    source: str
    start: int
    stop: int


def rooms(segment: BuildSegment) -> dict[str, Room]:
    """Outputs that the segment need not write: own rows that it puts between those of others, and sends from there."""
    graph = segment.graph.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = {node: name for node, (name, _) in zip(placeholders, segment.inputs, strict=False)}
    inserts: dict[Any, fx.Node] = {n.args[1]: n for n in graph.nodes if in_place(n) and n.args[0] in names}
    results: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    found: dict[str, Room] = {}
    for node, (name, _) in zip(results, segment.outputs, strict=True):
        insert = inserts.get(node.args[0]) if node.target is ops.strips.default else None
        if insert is None:
            continue
        sent: Any = node.args
        put: Any = insert.args
        (_, dim, top, bottom), (source, x, at, before, start, stop) = sent, put
        rows = x.meta["val"].shape[dim]
        if dim == at and top + bottom >= rows and (start, stop) == (0, rows):
            found[name] = Room(names[source], before, before + rows)
    return found


def image_values(segment: BuildSegment) -> set[str]:
    """Inputs and outputs of a segment that convolutions or group norms read or make, directly or through operators that
    keep the dims as they are. Others of as many dims, the heads of attention, want another memory format."""
    graph = segment.graph.graph
    tied: dict[fx.Node, set[fx.Node]] = {n: set() for n in graph.nodes}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _MOVE_DIMS and _dims(node) > 3:
            for operand in node.all_input_nodes:
                if _dims(operand) == _dims(node):
                    tied[node].add(operand)
                    tied[operand].add(node)
    waiting = [x for n in graph.nodes if n.target in _ON_IMAGES for x in n.all_input_nodes[:1]]
    images = set(waiting)
    while waiting:
        new = tied[waiting.pop()] - images
        images |= new
        waiting += new
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    named = (*zip(placeholders, segment.inputs, strict=False), *zip(results, segment.outputs, strict=True))
    return {name for node, (name, _) in named if node in images}


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What one package is compiled from. Names of values and weights are not part of it."""

    graph: str  # see districompile.ir.serialize
    inputs: tuple[Operand, ...]  # the segment's inputs, then its weights
    outputs: tuple[Operand, ...]
    device: str
    options: tuple[tuple[str, Any], ...]

    def to_json(self) -> str:
        data = {
            "graph": json.loads(self.graph),
            "inputs": [o.to_json() for o in self.inputs],
            "outputs": [o.to_json() for o in self.outputs],
            "device": self.device,
            "options": [list(o) for o in self.options],
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Job:
        data = json.loads(text)
        inputs, outputs = (tuple(Operand.from_json(o) for o in data[k]) for k in ("inputs", "outputs"))
        options = tuple((str(name), value) for name, value in data["options"])
        return Job(json.dumps(data["graph"], separators=(",", ":")), inputs, outputs, data["device"], options)


def compile_package(job: Job, path: str) -> None:
    """Compile ``job`` into the AOTInductor package ``path`` (which ends in ``.pt2``). Raises whatever torch raises."""
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    from districompile.backends.inductor_choices import Choices, declared_before_use, described_views

    device = torch.device(job.device)
    module = _Buffered(graph_from_json(job.graph, device), len(job.outputs))
    with FakeTensorMode(), torch.no_grad():
        example = tuple(o.empty(device) for o in (*job.inputs, *job.outputs))
    with torch.no_grad(), V.set_choices_handler(Choices()), declared_before_use(), described_views():
        program = torch.export.export(module, example, strict=False)
        # Exporting switches cuDNN off, and what convolutions give then has other strides. Inductor would remember
        # those, and read channels-last results of cuDNN's as if they were row-major.
        FakeTensorMode.cache_clear()
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=dict(job.options))


class _Buffered(torch.nn.Module):
    """Runs a graph and copies its outputs into the last arguments."""

    def __init__(self, graph: fx.GraphModule, outputs: int) -> None:
        super().__init__()
        self._graph, self._outputs = [graph], outputs  # in a list: no submodule whose buffers would be lifted

    def forward(self, *args: Tensor) -> tuple[()]:
        count = len(args) - self._outputs
        results = _Tracer(self._graph[0]).run(*args[:count])
        for buffer, result in zip(args[count:], results, strict=True):
            buffer.copy_(result)
        return ()


class _Tracer(fx.Interpreter):
    """Runs the graph with composites in the form that fuses best."""

    def run_node(self, n: fx.Node) -> Any:
        if in_place(n):
            return insert_in_place(*self.fetch_args_kwargs_from_env(n)[0])
        if n.target is INSERT_PRODUCT:
            return insert_product_in_place(*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(FUSED.get(target, target), args, kwargs)
