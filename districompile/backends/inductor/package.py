# SPDX-License-Identifier: Apache-2.0
"""Turn a segment into one AOTInductor program: a function of inputs, weights and output buffers that returns nothing.

The program writes each result into its output buffer, in the memory format that the job states. The composites of
:mod:`districompile.ir.ops` are traced in the form that makes the fewest passes over memory (``lowerings.py``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Argument, Target

from districompile.backends.inductor.lowerings import LOWERINGS, assemble_into_input
from districompile.backends.inductor.pytorch_private import clear_fake_tensor_cache, compile_program
from districompile.backends.inductor.split_linear import INSERT_LINEAR, in_place, insert_linear_in_place, plain_slice
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import graph_from_json
from districompile.ir.spec import TensorSpec, dtype_name, dtype_of

ConfigValue = bool | int | float | str | list[str | None] | None
"""A value of ``torch._inductor.config`` as JSON holds it."""


def _overloads(name: str) -> list[OpOverload]:
    packet: OpOverloadPacket[..., object] = getattr(torch.ops.aten, name)
    names: Callable[[], list[str]] = packet.overloads  # PyTorch declares no type for it
    return [getattr(packet, overload) for overload in names()]


CHANNELS_LAST = {
    4: ("channels_last", torch.channels_last),
    5: ("channels_last_3d", torch.channels_last_3d),
}
"""The memory format of images and volumes whose channels are innermost, by their dims."""

FORMATS = ("contiguous", "channels_last", "channels_last_3d")

_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default, ops.fp8_conv.default}
_ON_IMAGES = {
    overload
    for name in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "group_norm", "max_pool2d", "avg_pool2d")
    for overload in _overloads(name)
} | {ops.moments.default, ops.normalize.default, ops.fp8_conv.default}
_MOVE_DIMS = {
    overload
    for name in ("permute", "transpose", "reshape", "view", "_unsafe_view", "unflatten", "flatten", "movedim", "linear",
                 "matmul", "bmm", "scaled_dot_product_attention")
    for overload in _overloads(name)
} | {ops.moments.default, ops.fp8_linear.default}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operand:
    """Shape, dtype and memory format of an input, weight or output. A slice has the strides of the shape ``whole``."""

    spec: TensorSpec
    format: str = "contiguous"
    whole: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements. Compiled code may check those of dims of size 1 too, so they are exact."""
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
        """Allocate uninitialised memory of this format."""
        return torch.empty_strided(self.spec.shape, self.strides, dtype=self.spec.dtype, device=device)

    def fits(self, tensor: Tensor) -> bool:
        """Say whether ``tensor`` has the strides and the 16-byte alignment that compiled code assumes."""
        return tensor.stride() == self.strides and tensor.data_ptr() % 16 == 0

    def to_json(self) -> list[object]:
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
class InputSlice:
    """The elements [start, stop) of an input along ``dim``."""

    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slice of ``tensor`` as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


def lift_input_slices(
    graph: fx.Graph, inputs: int, kept: Sequence[int]
) -> tuple[fx.GraphModule, list[list[InputSlice] | None]]:
    """Copy ``graph`` with the outputs ``kept``, and make slices of an input inputs of their own.

    Returns the copy and, for each input, the list of slices that replace it (None: the input stays). The engine takes
    the slices as views when it calls the program. Layers that read different slices of one projection are then one and
    the same program.
    """
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()
    slices: list[list[InputSlice] | None] = []
    for number, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        found = [_aligned_slice(u) for u in node.users]
        if number < inputs and found and all(found):
            slices.append([s for s in found if s is not None])
            for user in node.users:
                env[user] = new.placeholder(user.name)
                env[user].meta = dict(user.meta)
        else:
            slices.append(None)
            env[node] = new.node_copy(node)
    for node in graph.nodes:
        if node.op == "output":
            results: Any = node.args[0]
            new.output(tuple(env[results[i]] for i in kept))
        elif node.op != "placeholder" and node not in env:
            env[node] = new.node_copy(node, lambda n: env[n])
    new.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return fx.GraphModule(torch.nn.Module(), new), slices[:inputs]


def _aligned_slice(node: fx.Node) -> InputSlice | None:
    """Return the slice that ``node`` takes, if its memory begins at a multiple of 16 bytes."""
    taken = plain_slice(node)
    if taken is None:
        return None
    args: Any = node.args
    source = args[0].meta["val"]
    offset = taken[1] * math.prod(source.shape[taken[0] + 1 :]) * source.element_size()
    return None if offset % 16 or source.ndim > 3 else InputSlice(*taken)


@dataclasses.dataclass(frozen=True)
class AliasedOutput:
    """An output that is the rows [start, stop) of the input ``source``. The program writes it there."""

    source: str
    start: int
    stop: int


def aliased_outputs(segment: SegmentGraph) -> dict[str, AliasedOutput]:
    """Find outputs that alias an input: own rows that the segment writes between received rows and sends from there."""
    graph = segment.graph.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = {node: name for node, (name, _) in zip(placeholders, segment.inputs, strict=False)}
    inserts = {n.args[1]: n for n in graph.nodes if in_place(n) and n.args[0] in names}
    results: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    found: dict[str, AliasedOutput] = {}
    for node, (name, _) in zip(results, segment.outputs, strict=True):
        insert = inserts.get(node.args[0]) if node.target is ops.pack_boundary.default else None
        if insert is None:
            continue
        packed: Any = node.args
        placed: Any = insert.args
        (_, dim, top, bottom), (source, x, at, before, start, stop) = packed, placed
        rows = x.meta["val"].shape[dim]
        if dim == at and top + bottom >= rows and (start, stop) == (0, rows):
            found[name] = AliasedOutput(names[source], before, before + rows)
    return found


def image_values(segment: SegmentGraph) -> set[str]:
    """Name the inputs and outputs of a segment that are images.

    An image (or volume) is what a convolution or a group norm reads or gives, directly or through operators that keep
    the order of the dims. Other values of as many dims, such as the heads of attention, need another memory format. So
    do maps whose rows and columns are one dim, which a group norm takes as well.
    """
    graph = segment.graph.graph
    tied: dict[fx.Node, set[fx.Node]] = {n: set() for n in graph.nodes}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _MOVE_DIMS and _dims(node) > 3:
            for operand in node.all_input_nodes:
                if _dims(operand) == _dims(node):
                    tied[node].add(operand)
                    tied[operand].add(node)
    waiting = [x for n in graph.nodes if n.target in _ON_IMAGES for x in n.all_input_nodes[:1] if _dims(x) > 3]
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


def slice_operand(whole: Operand, piece: InputSlice) -> Operand:
    """Return the operand of one slice of an input."""
    shape = list(whole.spec.shape)
    shape[piece.dim] = piece.stop - piece.start
    return Operand(TensorSpec(tuple(shape), whole.spec.dtype), whole.format, whole.spec.shape)


def weight_formats(segment: SegmentGraph) -> dict[str, str]:
    """Map the weights that only convolutions read to their channels-last format."""
    placeholders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"][len(segment.inputs) :]
    formats = {}
    for (name, spec), node in zip(segment.weights, placeholders, strict=True):
        known = CHANNELS_LAST.get(len(spec.shape))
        if known and node.users and all(u.target in _CONVOLUTIONS and u.args[1] is node for u in node.users):
            formats[name] = known[0]
    return formats


@dataclasses.dataclass(frozen=True)
class CompileJob:
    """The input of one compilation. It holds no names of values or weights."""

    graph: str  # see districompile.ir.serialize
    inputs: tuple[Operand, ...]  # the segment's inputs, then its weights
    outputs: tuple[Operand, ...]
    device: str
    options: tuple[tuple[str, ConfigValue], ...]  # settings of torch._inductor.config

    def to_json(self) -> str:
        """Return the job as JSON text, whose hash names the package."""
        data = {
            "graph": json.loads(self.graph),
            "inputs": [o.to_json() for o in self.inputs],
            "outputs": [o.to_json() for o in self.outputs],
            "device": self.device,
            "options": [list(o) for o in self.options],
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> CompileJob:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        inputs, outputs = (tuple(Operand.from_json(o) for o in data[k]) for k in ("inputs", "outputs"))
        options = tuple((str(name), value) for name, value in data["options"])
        return CompileJob(json.dumps(data["graph"], separators=(",", ":")), inputs, outputs, data["device"], options)


def compile_package(job: CompileJob, path: str) -> None:
    """Compile ``job`` into the AOTInductor package ``path``, which ends in ``.pt2``. Raises whatever PyTorch raises."""
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    from districompile.backends.inductor import torch_patches as patches
    from districompile.backends.inductor.interface_object import interface_apart

    device = torch.device(job.device)
    module = _Buffered(graph_from_json(job.graph, device), len(job.outputs))
    with FakeTensorMode(), torch.no_grad():
        example = tuple(o.empty(device) for o in (*job.inputs, *job.outputs))
    fixed = patches.fix_array_declarations(), patches.fix_tma_descriptors(), patches.light_headers()
    with torch.no_grad(), V.set_choices_handler(patches.Choices()), fixed[0], fixed[1], fixed[2], interface_apart():
        program = torch.export.export(module, example, strict=False)
        clear_fake_tensor_cache()  # it holds the strides of convolutions without cuDNN
        compile_program(program, path, dict(job.options))
    deflate(Path(path))


def deflate(path: Path) -> None:
    """Compress the members of the package ``path``, which PyTorch writes as they are and reads either way.

    They are machine code and its source text: a quarter of the size on a CPU. Dates are left out, so that equal members
    make equal files.
    """
    made = path.with_name(f"{path.name}.deflated")
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(made, "w") as smaller:
        for member in given.infolist():
            smaller.writestr(zipfile.ZipInfo(member.filename), given.read(member), zipfile.ZIP_DEFLATED)
    made.replace(path)


class _Buffered(torch.nn.Module):
    """Run a graph and copy its outputs into the last arguments."""

    def __init__(self, graph: fx.GraphModule, outputs: int) -> None:
        super().__init__()
        self._graph, self._outputs = (
            [graph],
            outputs,
        )  # in a list, so that it is no submodule, whose buffers would be lifted

    def forward(self, *args: Tensor) -> tuple[()]:
        count = len(args) - self._outputs
        results = _Tracer(self._graph[0]).run(*args[:count])
        for buffer, result in zip(args[count:], results, strict=True):
            buffer.copy_(result)
        return ()


class _Tracer(fx.Interpreter):
    """Run the graph with the lowerings of ``lowerings.py``."""

    def run_node(self, n: fx.Node) -> object:
        if in_place(n):
            return assemble_into_input(*self.fetch_args_kwargs_from_env(n)[0])
        if n.target is INSERT_LINEAR:
            return insert_linear_in_place(*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        return super().call_function(LOWERINGS.get(target, target), args, kwargs)
