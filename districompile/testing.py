# SPDX-License-Identifier: Apache-2.0
"""Checks for extensions, to be called from any test runner: they raise ``AssertionError`` with what is wrong.

:func:`check_rule` and :func:`check_rules` test rules by their samples, :func:`check_pass` a pass on a model,
:func:`check_backend` a backend by what the runtime expects of all of them.
:meth:`districompile.Program.compare_nodes` compares a whole model, operator by operator.
"""

from __future__ import annotations

import importlib
import json
import operator
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.api import convert
from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, InputError
from districompile.frontend.capture import capture
from districompile.ir.captured import CapturedModule
from districompile.ir.interpret import interpret, join
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import TensorSpec
from districompile.passes.manager import Pass
from districompile.passes.pipelines import add_passes
from districompile.runtime.load import load
from districompile.sharding.builder import ShardedValue
from districompile.sharding.compare import relative_error
from districompile.sharding.propagate import Propagated, propagate
from districompile.sharding.registry import Rule, Sample, all_rules, find_rule

CUT_POINTS: tuple[tuple[float, ...], ...] = (
    (0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.3, 1.0), (0.0, 0.25, 0.6, 1.0), (0.0, 0.4, 0.6, 1.0),
    (0.0, 0.2, 0.5, 0.7, 1.0),
)  # fmt: skip
"""Where samples are cut by default: even and uneven, for one to four ranks."""

TOLERANCE = 1e-5


class RuleCase:
    """An operator on a sample: its graph, made once for all cut points, and what the operator computes."""

    def __init__(self, op: Any, sample: Sample) -> None:
        self.mode = FakeTensorMode()
        self.graph, self.inputs, self.rows = graph_of(op, sample, self.mode)
        self.annotation = propagate(self.graph, self.rows, (0.0, 1.0), self.mode).values
        whole = op(*sample.args, **sample.kwargs)
        many = isinstance(whole, list | tuple)
        self.want: list[Tensor] = [whole[i] for i in used_results(whole, sample)] if many else [whole]

    def cut(self, cut_points: Sequence[float]) -> tuple[Propagated, list[Tensor]]:
        """Return the propagated graph, and what the ranks compute (joined)."""
        found = propagate(self.graph, self.rows, cut_points, self.mode, self.annotation)
        seen: dict[str, list[Any]] = {}
        ranks = len(cut_points) - 1
        interpret(found.graph, self.inputs, self.inputs.__getitem__, ranks, lambda n, v: seen.__setitem__(n.name, v))
        got = []
        (ends,) = self.graph.output_node().args
        for node in ends if isinstance(ends, tuple) else ():
            value = found.values[node.name] if isinstance(node, fx.Node) else None
            if not isinstance(value, ShardedValue):
                raise AssertionError(f"the rule gives {value!r}, not a ShardedValue")
            got.append(join(seen[value.node.name], value.layout))
        return found, got

    def check(self, cut_points: Sequence[float], tolerance: float = TOLERANCE) -> None:
        """Raise ``AssertionError`` where the ranks compute something else than the operator, or the rule refuses."""
        found, got = self.cut(cut_points)
        for g, w in zip(got, self.want, strict=True):
            assert_close(g, w, tolerance)
        # A sample shows what the rule can do: a fallback would show nothing
        refused = [f for f in found.fallbacks if "too few" not in f.reason]
        assert not refused, f"the rule refuses its own sample at {tuple(cut_points)}: {refused}"


def graph_of(op: Any, sample: Sample, mode: FakeTensorMode) -> tuple[fx.Graph, dict[str, Tensor], dict[str, int]]:
    """Return a graph of one operator, its inputs by name, and the sharded dim of those that are sharded."""
    graph = fx.Graph()
    inputs: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            node = graph.placeholder(f"x{len(inputs)}")
            node.meta["val"] = mode.from_tensor(x)
            cut = sample.rows[len(inputs)]
            if cut is not None:
                rows[node.name] = cut
            inputs[node.name] = x
            return node
        return [leaf(v) for v in x] if isinstance(x, list) else x

    args = tuple(leaf(a) for a in sample.args)
    node = graph.call_function(op, args, sample.kwargs)
    fake_args = fx.map_arg(args, lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = op(*fake_args, **sample.kwargs)
    many = isinstance(node.meta["val"], list | tuple)
    outputs = []
    for i in used_results(node.meta["val"], sample):
        item = graph.call_function(operator.getitem, (node, i)) if many else node
        item.meta["val"] = node.meta["val"][i] if many else node.meta["val"]
        outputs.append(item)
    graph.output(tuple(outputs))
    return graph, inputs, rows


def used_results(result: Any, sample: Sample) -> Sequence[int]:
    """Return which results of an operator are compared: those that the sample says are used."""
    return sample.used or range(len(result) if isinstance(result, list | tuple) else 1)


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise ``AssertionError`` unless ``got`` has shape and dtype of ``want``, and its numbers up to ``tolerance`` of
    their norm (integers and truth values: exactly)."""
    assert got.shape == want.shape, f"the shape is {list(got.shape)}, not {list(want.shape)}"
    assert got.dtype == want.dtype, f"the dtype is {got.dtype}, not {want.dtype}"
    if want.is_floating_point():
        error = relative_error(got, want)
        assert error <= tolerance, f"the relative error is {error:.2e}, above {tolerance:g}"
    else:
        assert torch.equal(got, want), "the values differ"


def check_rule(op: Any, cut_points: Iterable[Sequence[float]] = CUT_POINTS, tolerance: float = TOLERANCE) -> None:
    """Raise ``AssertionError`` unless the rule of ``op``, on each of its samples, computes what the operator does.

    ``cut_points`` are the places at which samples are cut: numbers from 0 to 1, one more than there are ranks.
    """
    found = find_rule(op)
    assert found is not None, f"{op} has no rule"
    samples = list(found.samples()) if found.samples is not None else []
    assert samples, f"the rule of {op} has no samples: give rule(..., samples=lambda: [Sample(...)])"
    for i, sample in enumerate(samples):
        case = RuleCase(op, sample)
        for points in cut_points:
            try:
                case.check(points, tolerance)
            except AssertionError as e:
                raise AssertionError(f"{op}, sample {i}, cut at {tuple(points)}: {e}") from e


def check_rules(module: ModuleType | str) -> list[Rule]:
    """Check every rule whose function is defined in ``module`` (:func:`check_rule`); return the rules.

    A module given by its name is imported, as that is what registers its rules.
    """
    if isinstance(module, str):
        module = importlib.import_module(module)
    rules = [r for r in all_rules() if r.function.__module__ == module.__name__]
    assert rules, f"{module.__name__} registers no rule"
    for found in rules:
        check_rule(found.op)
    return rules


def check_pass(
    p: Pass | str, module: nn.Module | CapturedModule, kwargs: Mapping[str, Any], ranks: int = 2, *,
    tolerance: float = TOLERANCE, **options: Any,
) -> None:  # fmt: skip
    """Raise ``AssertionError`` unless ``module`` converted with the pass computes, in the exact phase, what it computes
    without the pass.

    A pass with ``exact = False`` may change numbers: of it only shapes and finite values are checked. Its own graph is
    verified after it as always. ``options`` are those of :func:`districompile.convert`.
    """
    (made,) = add_passes([p])
    captured = module if isinstance(module, CapturedModule) else capture(module, kwargs=kwargs)
    results = []
    for passes in ([], [made]):
        program = convert(captured, ranks=ranks, passes=passes, **options)
        results.append(
            [x for x in torch.utils._pytree.tree_leaves(program.simulate(**kwargs)) if isinstance(x, Tensor)]
        )
        if passes:
            names = [record.name for record in program.plan.report.passes]
            assert made.name in names, f"the pass {made.name} did not run"
    for want, got in zip(*results, strict=True):
        if made.exact:
            assert_close(got, want, tolerance)
        else:
            assert got.shape == want.shape and bool(torch.isfinite(got).all()), f"{made.name} gives no finite result"


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        result = self.function(*args)
        return tuple(result) if isinstance(result, tuple | list) else (result,)


def make_segment(
    function: Callable[..., Any], inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] = {},
    name: str = "segment",
) -> SegmentGraph:  # fmt: skip
    """Return ``function(*inputs, *weights)``, which gives a tensor or a tuple, as a segment with outputs ``y0``, ..."""
    with torch.no_grad():
        program = torch.export.export(_Function(function), (*inputs.values(), *weights.values()), strict=False)
        program = program.run_decompositions({})
    (returned,) = program.graph_module.graph.output_node().args
    ends = returned if isinstance(returned, tuple) else ()
    return SegmentGraph(
        name,
        program.graph_module,
        tuple((n, _spec(t)) for n, t in inputs.items()),
        tuple((n, _spec(t)) for n, t in weights.items()),
        tuple((f"y{i}", _spec(n.meta["val"])) for i, n in enumerate(ends) if isinstance(n, fx.Node)),
    )


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> WeightFile:
    """Write a weight file as a bundle has it, and open it."""
    WeightFile.write(path, [(n, _spec(t), partial(tensors.__getitem__, n)) for n, t in tensors.items()])
    return WeightFile.open(path)


def check_backend(backend: Backend | str, device: str = "cpu", tolerance: float = 1e-4) -> None:
    """Raise ``AssertionError`` unless ``backend`` keeps what the runtime expects of every backend.

    Checked are its attributes, segments of usual operators against PyTorch, the contract of its engines (bound inputs
    and outputs, memory, errors), its refusal of what it cannot load, and a small model from ``convert`` over ``save``
    and ``load`` to its output on two ranks.
    """
    made = get_backend(backend)
    assert made.name and made.suffix.startswith(".") and made.version, "name, suffix (.xyz) and version are needed"
    json.dumps(made.describe())
    assert made.unavailable_reason() is None, made.unavailable_reason()
    where = torch.device(device)
    with tempfile.TemporaryDirectory(prefix="districompile-") as folder:
        for name, check in (("operators", _check_operators), ("contract", _check_contract), ("model", _check_model)):
            scratch = Path(folder, name)
            scratch.mkdir()
            check(made, scratch, where, tolerance)


def _segments() -> Iterable[tuple[str, Callable[..., Any], list[Tensor], list[Tensor]]]:
    """Usual operators, by name: a function, its inputs and its weights."""
    f = nn.functional
    yield (
        "linear",
        lambda x, w, b: f.silu(f.linear(x, w, b)),
        [torch.randn(2, 5, 8)],
        [torch.randn(4, 8), torch.randn(4)],
    )
    yield "conv", lambda x, w: f.conv2d(x, w, padding=1) + 1, [torch.randn(1, 4, 6, 5)], [torch.randn(8, 4, 3, 3)]
    yield "attention", lambda q, k: f.scaled_dot_product_attention(q, k, k), [
        torch.randn(1, 2, 6, 4), torch.randn(1, 2, 3, 4)
    ], []  # fmt: skip
    yield "norm", lambda x, w: f.group_norm(x, 2, w, w), [torch.randn(2, 4, 3, 5)], [torch.randn(4)]
    yield "several results", lambda x: tuple(torch.split(x, [1, 4, 2], 1)), [torch.randn(2, 7)], []
    yield "input as output", lambda x: (x, x + 1), [torch.randn(3)], []


def _check_operators(backend: Backend, folder: Path, device: torch.device, tolerance: float) -> None:
    for number, (name, function, args, weights) in enumerate(_segments()):
        inputs, named = {f"x{i}": t for i, t in enumerate(args)}, {f"{number}.{i}": t for i, t in enumerate(weights)}
        segment = make_segment(function, inputs, named, f"segment{number}")
        opened = write_weights(folder / f"weights{number}.safetensors", named)
        reasons = backend.unsupported_ops(segment)
        assert all(isinstance(r, str) for r in reasons), "unsupported_ops gives one text for each operator"
        if reasons:
            continue
        path = folder / f"segment{number}{backend.suffix}"
        backend.prepare([segment])
        backend.build(segment, opened, path)
        assert path.is_file(), f"build writes no file {path.name}"
        outputs = tuple(n for n, _ in segment.outputs)
        engine = backend.load(path, outputs, opened, device)
        got = engine.run({n: t.to(device) for n, t in inputs.items()}, outputs)
        want = function(*args, *weights)
        for key, w in zip(outputs, want if isinstance(want, tuple) else (want,), strict=True):
            try:
                assert_close(got[key].cpu(), w, tolerance)
            except AssertionError as e:
                raise AssertionError(f"{backend.name}, {name}, output {key}: {e}") from e


def _check_contract(backend: Backend, folder: Path, device: torch.device, tolerance: float) -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 3)
    segment = make_segment(lambda x, w: (nn.functional.linear(x, w), x + 1), {"x": x}, {"w": w})
    weights = write_weights(folder / "weights.safetensors", {"w": w, "other": torch.randn(2)})
    path = folder / f"s{backend.suffix}"
    backend.build(segment, weights, path)
    engine = backend.load(path, ("y0", "y1"), weights, device)
    _raises(InputError, lambda: engine.bind("z", x.to(device)), "bind takes an unknown input")
    wrong = "bind and enqueue take an input of another"
    _raises(InputError, lambda: engine.run({"x": x.double().to(device)}, ("y0",)), f"{wrong} dtype")
    _raises(InputError, lambda: engine.run({"x": torch.randn(3, 3, device=device)}, ("y0",)), f"{wrong} shape")
    for known, group in ((engine.input_specs, segment.inputs), (engine.output_specs, segment.outputs)):
        assert known is None or dict(known) == dict(group), f"the engine's specs are {known}, not {dict(group)}"
    first = engine.run({"x": x.to(device)}, ("y0", "y1"))
    want = nn.functional.linear(x, w)
    assert_close(first["y0"].cpu(), want, tolerance)
    strided = x.t().contiguous().t().to(device)
    assert_close(engine.run({"x": strided}, ("y0",))["y0"].cpu(), want, tolerance)
    if engine.binds_outputs:
        memory = torch.full((2, 3), float("nan"), device=device)
        engine.bind("y0", memory)
        both = engine.run({"x": x.to(device)}, ("y0", "y1"))
        assert both["y0"].data_ptr() == memory.data_ptr(), "output gives another tensor than the one that was bound"
        assert_close(memory.cpu(), want, tolerance)
        kept = memory.clone()
        engine.run({"x": x.to(device) + 1}, ("y0",))
        assert torch.equal(memory, kept), "the binding of an output outlives its call"
    _raises(BackendError, lambda: backend.load(path, ("y1", "y0"), weights, device), "load takes another segment")
    bad = folder / f"bad{backend.suffix}"
    bad.write_text("{}")
    _raises(BackendError, lambda: backend.load(bad, ("y0",), weights, device), "load takes a file that is no engine")


def _raises(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{what}, and should raise {kind.__name__}")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, sample: Tensor) -> Tensor:
        x: Tensor = self.last(nn.functional.silu(self.norm(self.first(sample))))
        return x


def _check_model(backend: Backend, folder: Path, device: torch.device, tolerance: float) -> None:
    module, x = _Model().eval(), torch.randn(1, 3, 9, 8)
    program = convert(module, kwargs={"sample": x}, ranks=2)
    program.save(folder / "bundle", backend)
    compiled = load(folder / "bundle", lockstep=True, backend=backend, device=device)
    with torch.no_grad():
        want = module(x)
        for _ in range(2):
            with compiled.exact():
                assert_close(compiled(sample=x.to(device)).cpu(), want, tolerance)
        assert compiled(sample=x.to(device)).shape == want.shape
