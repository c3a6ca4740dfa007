# SPDX-License-Identifier: Apache-2.0
"""Measure what 8 bits do to the layers of a network, on calls of it: for the pass ``quantise``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.errors import ConvertError
from districompile.ir.meta import tensor_of
from districompile.ir.ops import ANY_STRIDES, ops
from districompile.ir.quantised import F8_MAX, TINY, quantise_weight
from districompile.ir.unit import CompilationUnit

aten = torch.ops.aten

MARGIN = 4.0
"""Of a convolution's scale over the largest calibrated value. It costs nothing: see decision 48."""

_LINEARS = {aten.linear.default}
_PRODUCTS = {aten.mm.default, aten.matmul.default}
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One use of a layer: the node, its weight, and the operator in 8 bits with its arguments behind the scale."""

    node: fx.Node
    weight: fx.Node
    rest: tuple[Any, ...]  # bias; for convolutions then stride, padding, dilation, groups
    transposed: bool = False  # the weight is (I, O)

    @property
    def is_conv(self) -> bool:
        return self.node.target in _CONVOLUTIONS

    @property
    def per_pixel(self) -> bool:
        """Whether each token or pixel has a scale of its own."""
        if not self.is_conv:
            return True
        _, _, padding, _, groups = self.rest
        return math.prod(tensor_of(self.weight).shape[2:]) == 1 and not any(padding) and groups == 1

    @property
    def features(self) -> int:
        """The dim of ``x`` that holds its features."""
        return 1 - tensor_of(self.weight).ndim if self.is_conv else -1

    def in_f8(self, x: Any, values: Any, scale: Any, input_scale: Any, rest: Sequence[Any]) -> tuple[Any, ...]:
        """Return the operator in 8 bits and its arguments."""
        if self.is_conv:
            return ops.fp8_conv.default, x, values, scale, input_scale, *rest
        return ops.fp8_linear.default, x, values, scale, *rest


def calls_by_weight(unit: CompilationUnit) -> Iterator[tuple[str, list[LayerCall]]]:
    """Yield the layers that have a form in 8 bits: the weight's name, and its uses."""
    found: dict[str, list[LayerCall]] = {}
    for node in unit.graph.nodes:
        call = layer_call(node)
        if call is not None:
            found.setdefault(str(call.weight.target), []).append(call)
    return iter(found.items())


def layer_call(node: fx.Node) -> LayerCall | None:
    if node.op != "call_function" or node.target not in _LINEARS | _PRODUCTS | _CONVOLUTIONS:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not isinstance(node.args[0], fx.Node):
        return None
    if node.target in _LINEARS:
        return LayerCall(node, weight, (node.args[2] if len(node.args) > 2 else None,))
    if node.target in _PRODUCTS:
        flat = tensor_of(weight).ndim == 2 and tensor_of(node.args[0]).ndim > 1
        return LayerCall(node, weight, (None,), transposed=True) if flat else None
    n = tensor_of(weight).ndim - 2
    if tensor_of(node.args[0]).ndim != n + 2:
        return None
    bias, stride, padding, dilation, groups = (
        node.args[i] if len(node.args) > i else default for i, default in ((2, None), (3, 1), (4, 0), (5, 1), (6, 1))
    )
    s, d = _per_dim(stride, n), _per_dim(dilation, n)
    if isinstance(padding, str):
        kernel = tensor_of(weight).shape[2:]
        total = [(k - 1) * e if padding == "same" else 0 for k, e in zip(kernel, d, strict=True)]
        if any(t % 2 for t in total):
            return None  # one more row below than above
        padding = [t // 2 for t in total]
    return LayerCall(node, weight, (bias, s, _per_dim(padding, n), d, groups))


def _per_dim(value: Any, n: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * n if len(values) == 1 else values


@dataclasses.dataclass
class Evidence:
    """What calls show of a layer: squared signal and noise of its result, and the largest value of its input.

    ``share``: the noise that it adds to the network's output, as a share of the output's energy.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    share: float = 0.0

    @property
    def snr(self) -> float:
        """Signal to noise in dB, at most 99; NaN where a value is not finite."""
        if not math.isfinite(self.noise + self.signal):
            return math.nan
        if self.noise <= self.signal * 10**-9.9:
            return 99.0
        return 10 * math.log10(max(self.signal, 1e-30) / self.noise)

    @property
    def input_scale(self) -> float:
        """The scale of the input of a convolution."""
        return max(self.largest * MARGIN / F8_MAX, TINY)


class _Interpreter(fx.Interpreter):
    """Runs the global graph on real values. They are freed after their last use."""

    def __init__(self, unit: CompilationUnit, calls: Mapping[fx.Node, LayerCall]) -> None:
        super().__init__(torch.nn.Module(), graph=unit.graph)
        self._unit, self._calls = unit, calls
        self._stored: dict[str, tuple[Tensor, Tensor]] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._unit.captured.weight_on(str(target), self._unit.captured.device)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(ANY_STRIDES.get(target, target), args, kwargs)

    def outputs(self, call: Mapping[str, Tensor], *, gradients: bool = False) -> list[Tensor]:
        """Run one call, and return its outputs of floating-point numbers."""
        inputs = [call[n.name].detach() for n in self.graph.nodes if n.op == "placeholder"]
        if gradients:
            inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        return [t for t in self.run(*inputs, enable_io_processing=False) if t.is_floating_point()]

    def in_f8(self, call: LayerCall, evidence: Evidence) -> Tensor:
        """Compute a layer in 8 bits, from the values that stand before it."""
        x = self.env[call.node.args[0]]  # type: ignore[index]
        name = str(call.weight.target)
        if name not in self._stored:
            weight = self.env[call.weight]
            self._stored[name] = quantise_weight(weight.t() if call.transposed else weight)
        scale = None if call.per_pixel else torch.tensor([evidence.input_scale], device=x.device)
        op, *args = call.in_f8(x, *self._stored[name], scale, fx.map_arg(call.rest, lambda a: self.env[a]))
        return op(*args)  # type: ignore[no-any-return]


class _Beside(_Interpreter):
    """Computes each layer in 8 bits, too, and adds the difference to its evidence. Values go on as they are."""

    def __init__(
        self, unit: CompilationUnit, calls: Mapping[fx.Node, LayerCall], found: Mapping[fx.Node, Evidence]
    ) -> None:
        super().__init__(unit, calls)
        self._found = found
        self.gained: dict[fx.Node, Tensor] = {}  # of one call: the squared noise at the output

    def run_node(self, n: fx.Node) -> Any:
        call = self._calls.get(n)
        if call is None:
            return super().run_node(n)
        evidence = self._found[n]
        evidence.largest = max(evidence.largest, float(self.env[call.node.args[0]].detach().abs().max()))  # type: ignore[index]
        with torch.no_grad():
            rounded = self.in_f8(call, evidence)
        out = super().run_node(n)
        squared = (rounded.float() - out.detach().float()).square()
        evidence.noise += float(squared.sum())
        evidence.signal += float(out.detach().float().square().sum())
        if out.requires_grad:
            # Rounding errors are nearly independent: their squares add up, each by its squared gradient
            out.register_hook(lambda g: self.gained.__setitem__(n, (squared * g.float().square()).sum()))
        return out


class _Instead(_Interpreter):
    """Computes layers in 8 bits only."""

    def __init__(
        self, unit: CompilationUnit, calls: Mapping[fx.Node, LayerCall], found: Mapping[fx.Node, Evidence]
    ) -> None:
        super().__init__(unit, calls)
        self._found = found

    def run_node(self, n: fx.Node) -> Any:
        return self.in_f8(self._calls[n], self._found[n]) if n in self._calls else super().run_node(n)


class Calibration:
    """The calls of a unit, with the evidence that they give of each layer, by the name of its weight.

    Raise :class:`ConvertError` where there are no calls.
    """

    def __init__(self, unit: CompilationUnit, layers: Mapping[str, Sequence[LayerCall]]) -> None:
        if not unit.calibration:
            raise ConvertError(
                "quantise: layers are chosen by calls of the module, and there are none: pass the module with example "
                "arguments, or calibration=[(args, kwargs), ...]"
            )
        self._unit, self._layers = unit, layers
        self.evidence = {name: Evidence() for name in layers}
        self._by_node = {c.node: self.evidence[name] for name, uses in layers.items() for c in uses}
        self._expected: list[list[Tensor]] = []
        self._energy = 0.0
        self._measure()

    def _measure(self) -> None:
        interpreter = _Beside(self._unit, {c.node: c for uses in self._layers.values() for c in uses}, self._by_node)
        generator = torch.Generator().manual_seed(0)
        for call in self._unit.calibration:
            interpreter.gained.clear()
            with torch.enable_grad():
                outputs = interpreter.outputs(call, gradients=True)
                # The square of the gradient of a random sum is, in the mean, the sum of the squares over all outputs
                total = torch.stack([(t.float() * _signs(t, generator)).sum() for t in outputs]).sum()
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
            self._expected.append([t.detach() for t in outputs])
            self._energy += sum(float(t.detach().float().square().sum()) for t in outputs)
            for node, gained in interpreter.gained.items():
                self._by_node[node].share += float(gained)
        for evidence in self.evidence.values():
            evidence.share /= max(self._energy, 1e-30)

    def output_noise(self, names: Collection[str]) -> float:
        """Measure the noise of the network's output, as a share of its energy, with ``names`` in 8 bits together."""
        calls = {c.node: c for name in names for c in self._layers[name]}
        interpreter = _Instead(self._unit, calls, self._by_node)
        noise = 0.0
        with torch.no_grad():
            for call, expected in zip(self._unit.calibration, self._expected, strict=True):
                for got, want in zip(interpreter.outputs(call), expected, strict=True):
                    noise += float((got.float() - want.float()).square().sum())
        return noise / max(self._energy, 1e-30)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1).to(like.device)
