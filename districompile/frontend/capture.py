# SPDX-License-Identifier: Apache-2.0
"""Capture a module as a graph: ``torch.export`` on fake tensors, with weights by name and inputs by path."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from districompile.common.extensions import load_extensions
from districompile.common.tensors import unusual
from districompile.errors import CaptureError, InputError
from districompile.frontend.call_tree import describe_output, flatten_call
from districompile.frontend.decompose import decompose
from districompile.frontend.known_values import KnownValues
from districompile.frontend.one_device import device_of, put_on_one_device
from districompile.frontend.writes import keeps_weight
from districompile.ir.captured import CapturedModule
from districompile.ir.graph import source_line
from districompile.ir.spec import InputSpec, TensorSpec, usual_timestep

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_WRITES = {getattr(OutputKind, name, None) for name in ("PARAMETER_MUTATION", "BUFFER_MUTATION")}
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


def capture(
    module: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    timestep: str | None = None,
) -> CapturedModule:  # fmt: skip
    """Export ``module`` as called with ``args`` and ``kwargs``, on fake tensors: no weight is copied.

    Python numbers passed where the signature takes a tensor (``timestep=5``), or for the input ``timestep`` if it is
    given, become 0-dim inputs, not constants.
    Raise :class:`CaptureError`, with the place and the reason, for a module that cannot be exported, that writes to its
    buffers or inputs, or whose output holds something else than tensors and constants.
    """
    load_extensions()  # the rules and decompositions of installed packages decide which operators are kept
    _check_module(module)
    signature, args, kwargs = bind_call(module, args, dict(kwargs or {}), timestep)
    leaves = flatten_call(signature, args, kwargs)
    if timestep is not None and not isinstance(leaves.get(timestep), Tensor):
        tensors = ", ".join(path for path, value in leaves.items() if isinstance(value, Tensor))
        raise InputError(f"timestep={timestep!r}: the call has no such tensor or number, it has {tensors}")
    program, functional = _export(module, args, kwargs)
    held = _held(program, module)
    graph, names = _graph_of(program, functional, held)
    put_on_one_device(graph, device_of(module))
    _refuse_unknown_sizes(graph)
    inputs, constants = _inputs_of(program, names, leaves)
    weights = _weights_of(held)
    fake_mode = next(n.meta["val"].fake_mode for n in graph.nodes if isinstance(n.meta.get("val"), Tensor))
    out = pytree.tree_unflatten([n.meta["val"] if isinstance(n, fx.Node) else n for n in graph.output_node().args[0]],  # type: ignore[union-attr]
                                program.call_spec.out_spec)  # fmt: skip
    described = describe_output(out)
    _flatten_outputs(graph)
    config = getattr(module, "config", None)
    known = dict(config) if isinstance(config, Mapping) else None  # diffusers' config is a mapping
    return CapturedModule(
        graph,
        inputs,
        constants,
        signature,
        described,
        weights,
        fake_mode,
        type(module).__name__,
        known,
        _timestep_of(leaves, timestep),
    )


def bind_call(
    module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], timestep: str | None = None
) -> tuple[tuple[str, ...], Any, Any]:
    """Return forward's parameter names, and its arguments in that order, with numbers converted to tensors."""
    parameters = inspect.signature(module.forward).parameters
    names = tuple(_STARS.get(p.kind, "") + n for n, p in parameters.items())
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise InputError(f"{type(module).__name__}.forward: {e}") from None
    for name, value in bound.arguments.items():
        takes_tensor = "Tensor" in str(parameters[name].annotation) or "timestep" in name or name == timestep
        if takes_tensor and isinstance(value, int | float) and not isinstance(value, bool):
            bound.arguments[name] = torch.tensor(value)
    device = device_of(module)
    for path, value in flatten_call(names, bound.args, bound.kwargs).items():
        _check_input(path, value, device)
    # A fresh container for every call, because a forward may pop from a list among its arguments
    moved = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (bound.args, bound.kwargs))
    return names, moved[0], moved[1]


def _check_input(path: str, value: Any, device: torch.device) -> None:
    """Raise :class:`InputError` for an example that the export would refuse without its name."""
    if not isinstance(value, Tensor):
        return
    kind = unusual(value)
    if kind is None and value.device.type == "meta" and device.type != "meta":
        kind = "meta"
    if kind is not None:
        raise InputError(f"the example input {path} is a {kind} tensor: pass an ordinary one, of strided memory")


def _check_module(module: torch.nn.Module) -> None:
    """Raise :class:`CaptureError` for weights that cannot be stored, and for a module with weights without data."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in held.items():
        kind = unusual(tensor)
        if kind is not None:
            raise CaptureError(f"weight {name} is a {kind} tensor: convert a module with ordinary ones")
    empty = [name for name, tensor in held.items() if tensor.device.type == "meta"]
    if empty and len(empty) < len(held):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise CaptureError(
            f"{', '.join(empty[:3])}{more}: no data (on the meta device), unlike the other weights: load them all first"
        )


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Set the module to eval mode, and restore every submodule's own mode afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def _known_outputs(module: torch.nn.Module) -> Iterator[None]:
    """Register dataclasses that the module returns with torch.export, which accepts no others."""

    def register(_: torch.nn.Module, args: Any, output: Any) -> None:
        waiting = [output]
        while waiting:
            x = waiting.pop()
            if isinstance(x, Mapping):
                waiting += x.values()
            elif isinstance(x, list | tuple):
                waiting += x
            elif dataclasses.is_dataclass(x) and not isinstance(x, type):
                waiting += [getattr(x, f.name) for f in dataclasses.fields(x)]
                if type(x) not in pytree.SUPPORTED_NODES:
                    torch.export.register_dataclass(type(x))

    hook = module.register_forward_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _export(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[torch.export.ExportedProgram, fx.Graph]:
    try:
        # torch.export prints the graph so far to stderr where it fails; this error has the place and the reason
        quiet = contextlib.redirect_stderr(io.StringIO())
        with _evaluating(module), _known_outputs(module), torch.no_grad(), warnings.catch_warnings(), quiet:
            warnings.simplefilter("ignore")
            with KnownValues():
                program = torch.export.export(module, tuple(args), dict(kwargs), strict=False)
            return decompose(program)
    except Exception as e:
        raise CaptureError(f"{type(module).__name__} cannot be exported: {_reason(e)}") from e


def _reason(error: BaseException) -> str:
    """Return in one line why an error was raised, and where in the model's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    own = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]
    where = f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: {own[-1].line})" if own else ""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}{where}"


def _graph_of(
    program: torch.export.ExportedProgram, functional: fx.Graph, held: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, str]]:
    """Return the functional graph with weights and constants as ``get_attr`` nodes, and user inputs as placeholders.

    ``held`` are the weights and constants by name. The second result maps the name of every user input in the export to
    its placeholder.
    """
    signature = program.graph_signature
    lifted = {s.arg.name: s.target for s in signature.input_specs if s.kind != InputKind.USER_INPUT}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    for node in functional.nodes:
        if node.op == "placeholder" and not node.users and not isinstance(node.meta.get("val"), Tensor):
            continue  # a constant, which is part of the graph
        if node.op == "placeholder" and node.name in lifted:
            new = graph.create_node("get_attr", str(lifted[node.name]), name=node.name)
            new.meta.update(node.meta)
        elif node.op == "output":
            new = _output(graph, program, env, node, held)
        else:
            new = graph.node_copy(node, lambda n: env[n])
            if node.op == "placeholder":
                names[node.name] = new.name
        if new.meta.get("nn_module_stack"):
            path = next(reversed(new.meta["nn_module_stack"].values()))[0]
            new.meta["module_path"] = path or new.name
        env[node] = new
    return graph, names


def _output(
    graph: fx.Graph, program: torch.export.ExportedProgram, env: dict[fx.Node, fx.Node], node: fx.Node,
    held: Mapping[str, Any],
) -> fx.Node:  # fmt: skip
    values: list[Any] = []
    lifted = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    for spec, value in zip(program.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind in _WRITES and keeps_weight(value, str(spec.target), lifted, held):
            continue
        if spec.kind != OutputKind.USER_OUTPUT:
            what = spec.target or getattr(spec.arg, "name", "?")
            raise CaptureError(
                f"the module writes to {what} as it runs ({spec.kind.name.lower()}): "
                "call it in eval mode, without caches"
            )
        values.append(env[value] if isinstance(value, fx.Node) else value)
    return graph.output(tuple(values))  # type: ignore[no-any-return]


def _refuse_unknown_sizes(graph: fx.Graph) -> None:
    """Raise :class:`CaptureError` for a size that depends on the values of an input: engines have fixed shapes."""
    for node in graph.nodes:
        leaves = pytree.tree_leaves(node.meta.get("val"))
        if any(isinstance(s, torch.SymInt) for x in leaves for s in (x.shape if isinstance(x, Tensor) else [x])):
            where = source_line(node)
            raise CaptureError(
                f"{node.target} ({node.name}{', ' + where if where else ''}) makes a tensor whose size depends on the "
                "values of its input: use a mask of fixed size instead, as torch.where does"
            )


def _flatten_outputs(graph: fx.Graph) -> None:
    """Keep only the tensors among the outputs. Constants are in the description."""
    output = graph.output_node()
    output.args = (tuple(v for v in output.args[0] if isinstance(v, fx.Node)),)  # type: ignore[union-attr]


def _timestep_of(leaves: Mapping[str, Any], chosen: str | None) -> float | None:
    """Return the timestep of the example call: the largest by magnitude where it is a vector."""
    tensors = {path: v for path, v in leaves.items() if isinstance(v, Tensor)}
    value = tensors.get(chosen or usual_timestep(tensors) or "")
    if value is None or not value.numel() or value.device.type == "meta" or isinstance(value, FakeTensor):
        return None
    flat = value.detach().reshape(-1).double()
    largest = float(flat[flat.abs().argmax()])
    return largest if math.isfinite(largest) else None


def _inputs_of(
    program: torch.export.ExportedProgram, names: dict[str, str], leaves: Mapping[str, Any]
) -> tuple[tuple[InputSpec, ...], dict[str, Any]]:
    """Return the tensor inputs with their placeholders, and constants by path. ``leaves`` have the export's order."""
    user = [s.arg for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    if len(user) != len(leaves):
        raise CaptureError(
            f"{len(leaves)} inputs were passed, but the export has {len(user)}: pass plain containers of tensors"
        )
    inputs, constants = [], {}
    for argument, (path, leaf) in zip(user, leaves.items(), strict=True):
        if isinstance(leaf, Tensor):
            spec = TensorSpec(tuple(int(s) for s in leaf.shape), leaf.dtype)
            inputs.append(InputSpec(path, names[argument.name], spec))
        elif isinstance(leaf, _CONSTANTS):
            constants[path] = leaf if not isinstance(leaf, torch.dtype) else str(leaf)
        else:
            raise CaptureError(
                f"input {path} is a {type(leaf).__name__}: pass tensors, numbers, strings, None or containers of them"
            )
    return tuple(inputs), constants


def _held(program: torch.export.ExportedProgram, module: torch.nn.Module) -> dict[str, Any]:
    """Return every lifted tensor by name. Parameters and buffers are the module's own."""
    live = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    names = [str(s.target) for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    return {n: live.get(n, program.constants.get(n, program.state_dict.get(n))) for n in names}


def _weights_of(held: Mapping[str, Any]) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """Return every lifted tensor by name. Parameters and buffers are read from the module when they are needed."""
    weights: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for name, tensor in held.items():
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__}, not a tensor: such a constant cannot be compiled")
        weights[name] = TensorSpec(tuple(tensor.shape), tensor.dtype), _reader(name, tensor)
    return weights


def _reader(name: str, tensor: Tensor) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if tensor.device.type == "meta":
            raise CaptureError(
                f"weight {name} is on the meta device: load the module's weights before saving or running it"
            )
        return tensor.detach()

    return read
