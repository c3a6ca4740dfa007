# SPDX-License-Identifier: Apache-2.0
"""Compute linears and convolutions in 8-bit floating point, where calls show that this is accurate.

Before:

    %linear = aten.linear(%transpose, @ff.weight, @ff.bias)

After:

    %linear = dc.fp8_linear(%transpose, @ff.weight:fp8, @ff.weight:scale, @ff.bias)

The 8-bit weight is stored in place of the other one. A layer stays as it is where its rows are few, where it is the
first or the last of the network, where ``unit.faster`` says that 8 bits are not faster (decision 59), and where 8 bits
disturb its result too much on the calibration's calls. Then those layers stay that disturb the network's output most
for their share of the work, until the output has the signal to noise that is asked for (decision 48).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import fx

from districompile.errors import ConvertError
from districompile.ir.flops import flops_of
from districompile.ir.graph import insert_weight, set_fake_result
from districompile.ir.layer_size import LayerSize, computed_apart
from districompile.ir.meta import module_path_of, tensor_of
from districompile.ir.quantised import F8, read_quantised
from districompile.ir.report_builder import NOT_FASTER, QuantisedLayer
from districompile.ir.spec import TensorSpec
from districompile.ir.unit import CompilationUnit, Stage
from districompile.passes.calibrate import Calibration, Evidence, LayerCall, calls_by_weight

FEWEST_ROWS = 32
"""Rows of a product below which loading the weights takes the time. The layers of a timestep are such ones."""

SMALLEST_SIDE = 16
"""Of the matrix of a product: 8-bit units take no smaller ones."""

LEAST_DB = 23.0
"""Signal to noise of a layer's own result, in dB. Rounding both operands gives 29; this is twice that noise."""

OUTPUT_DB = 33
"""Signal to noise of the network's output, in dB, where no other is asked for: ``fp8`` is ``fp8:33``."""

_ATTEMPTS = 8  # to reach it; the last one keeps all layers


@dataclasses.dataclass(frozen=True)
class Quantise:
    """The pass ``quantise``: it computes the layers in 8 bits that ``unit.quantised`` lists, or chooses them.

    The choice takes ``unit.calibration``. Raise :class:`ConvertError` where there is neither.
    """

    name: ClassVar[str] = "quantise"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        # One capture may serve several conversions, so its own dict of weights must not change
        unit.captured = dataclasses.replace(unit.captured, weights=dict(unit.captured.weights))
        layers = dict(calls_by_weight(unit))
        chosen = unit.quantised if unit.quantised is not None else _choose(unit, layers)
        for layer in chosen:
            if layer.reason is None:
                if layer.weight not in layers:
                    raise ConvertError(f"quantise: the module has no layer with the weight {layer.weight}")
                _replace(unit, layer, layers[layer.weight])
        unit.report.quantised = tuple(chosen)


# -- the choice -----------------------------------------------------------------------------------------------------


def _choose(unit: CompilationUnit, layers: Mapping[str, list[LayerCall]]) -> list[QuantisedLayer]:
    """Return all layers, with the reason of those that stay."""
    reasons = _reasons(unit, layers)
    open_layers = {name: uses for name, uses in layers.items() if name not in reasons}
    evidence: dict[str, Evidence] = {}
    if open_layers:
        calibration = Calibration(unit, open_layers)
        evidence = calibration.evidence
        reasons |= _by_evidence(unit, open_layers, calibration)
    chosen = []
    for name, uses in layers.items():
        scale = None
        if name not in reasons and not all(c.per_pixel for c in uses):
            scale = evidence[name].input_scale
        snr = evidence[name].snr if name in evidence and evidence[name].snr == evidence[name].snr else None
        path = module_path_of(uses[0].node)
        chosen.append(QuantisedLayer(name, path, reasons.get(name), snr, scale, uses[0].transposed))
    return chosen


def _by_evidence(
    unit: CompilationUnit, layers: Mapping[str, list[LayerCall]], calibration: Calibration
) -> dict[str, str]:
    """Return why layers stay that the calls tell against: by their own results, and by the network's output."""
    evidence = calibration.evidence
    reasons = {
        name: f"its result has {e.snr:.1f} dB of signal to noise in 8 bits, not {LEAST_DB:g}"
        for name, e in evidence.items() if not e.snr >= LEAST_DB
    }  # fmt: skip
    work = {name: sum(flops_of(c.node) for c in uses) for name, uses in layers.items()}
    shares = {name: e.share for name, e in evidence.items() if name not in reasons}
    wanted = wanted_db(unit.options.quantise)
    most = budget = 10 ** (-wanted / 10)
    kept: list[str] = []
    for attempt in range(_ATTEMPTS):
        # What layers add together is measured: errors of weights are the same for all rows, and add up otherwise
        kept = list(_noisiest(shares, work, budget)) if attempt < _ATTEMPTS - 1 else list(shares)
        noise = calibration.output_noise(shares.keys() - set(kept))
        if noise <= most:
            break
        budget *= 0.9 * most / noise if math.isfinite(noise) else 0.0
    for name in kept:
        level = 10 * math.log10(max(shares[name], 1e-30))
        reasons[name] = f"8 bits here disturb the output by {level:.1f} dB; {-wanted:g} dB are for all layers together"
    return reasons


def wanted_db(quantise: str) -> float:
    """Return the signal to noise of the output that a choice such as ``fp8:40`` asks for, in dB."""
    _, _, level = quantise.partition(":")
    return float(level) if level else OUTPUT_DB


def _noisiest(shares: Mapping[str, float], work: Mapping[str, float], most: float) -> Iterator[str]:
    """Yield the layers that add most noise for their work, until the noise of the others is at most ``most``."""
    order = sorted(shares, key=lambda name: -shares[name] / max(1.0, work[name]))
    left = sum(shares.values())
    for name in order:
        if left <= most:
            return
        left -= shares[name]
        yield name


def _reasons(unit: CompilationUnit, layers: Mapping[str, list[LayerCall]]) -> dict[str, str]:
    """Return why layers stay, as far as the graph tells."""
    calls = {c.node for uses in layers.values() for c in uses}
    first, last = _first(unit, calls), _last(unit, calls)
    speeds: dict[LayerSize, bool | None] = {}
    found = {}
    for name, uses in layers.items():
        weight = tensor_of(uses[0].weight)
        groups = uses[0].rest[4] if uses[0].is_conv else 1
        sides = (weight.shape[0] // groups, math.prod(weight.shape[1:]))
        rows = min(_rows(c) for c in uses)
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            found[name] = f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        elif len({c.is_conv for c in uses}) > 1 or len({c.transposed for c in uses}) > 1:
            found[name] = "its weight serves several kinds of layer"
        elif {u for c in uses for u in c.weight.users} - calls or _all_readers(unit, name) - calls:
            found[name] = "its weight is read by other operators"
        elif any(c.node in first for c in uses):
            found[name] = "it is the first layer after an input of the image"
        elif any(c.node in last for c in uses):
            found[name] = "it is the last layer before an output"
        elif rows < FEWEST_ROWS:
            found[name] = f"{rows} rows: it takes little time, and its error reaches every pixel"
        elif min(sides) < SMALLEST_SIDE:
            found[name] = f"its products are of {sides[0]} by {sides[1]} weights"
        elif unit.faster is not None:
            sizes = [_size_on_a_rank(unit, c) for c in uses]
            speeds |= {size: unit.faster(size) for size in sizes if size not in speeds}
            if any(speeds[size] is False for size in sizes):
                found[name] = NOT_FASTER
    return found


def _size_on_a_rank(unit: CompilationUnit, call: LayerCall) -> LayerSize:
    """Return the size of a layer on one rank, as if every rank had as many rows."""
    ranks, weight = unit.options.ranks, tuple(tensor_of(call.weight).shape)
    source, dtype = call.node.all_input_nodes[0], tensor_of(call.weight).dtype
    shape, rows = tuple(tensor_of(source).shape), max(1, _rows(call) // ranks)
    if not call.is_conv:
        columns, inner = weight[::-1] if call.transposed else weight
        return LayerSize(rows, inner, columns, call.rest[0] is not None, dtype, computed_apart(source))
    bias, stride, padding, dilation, groups = call.rest
    image, sides = list(shape), list(padding)
    if ranks > 1:  # rows of neighbours take the place of padding
        image[2], sides[0] = -(-shape[2] // ranks) + 2 * sides[0], 0
    return LayerSize(
        rows, weight[1], weight[0], bias is not None, dtype, computed_apart(source), tuple(image), weight,
        tuple(stride), tuple(sides), tuple(dilation), groups,
    )  # fmt: skip


def _all_readers(unit: CompilationUnit, name: str) -> set[fx.Node]:
    return {u for n in unit.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users}


def _rows(call: LayerCall) -> int:
    """Return the rows of a layer's product: tokens or pixels."""
    out = tensor_of(call.node)
    return out.numel() // max(1, out.shape[1] if call.is_conv else out.shape[-1])


def _first(unit: CompilationUnit, calls: set[fx.Node]) -> set[fx.Node]:
    """Return the layers that read an input of the image with no layer between."""
    raw: set[fx.Node] = set()
    for node in unit.graph.nodes:
        image = node.op == "placeholder" and node.name in unit.rows
        if image or (node not in calls and any(n in raw for n in node.all_input_nodes)):
            raw.add(node)
    return {c for c in calls if any(n in raw for n in c.all_input_nodes)}


def _last(unit: CompilationUnit, calls: set[fx.Node]) -> set[fx.Node]:
    """Return the layers whose result reaches an output with no layer between."""
    final: set[fx.Node] = set()
    for node in reversed(unit.graph.nodes):
        if node.op == "output" or any(u in final and u not in calls for u in node.users):
            final.add(node)
    return final & calls


# -- the replacement ------------------------------------------------------------------------------------------------


def _replace(unit: CompilationUnit, layer: QuantisedLayer, uses: Sequence[LayerCall]) -> None:
    """Replace all uses of a layer by its form in 8 bits, and its weight by the 8-bit values and their scales."""
    weights, graph = unit.captured.weights, unit.graph
    spec, read = weights[layer.weight]
    shape = spec.shape[::-1] if layer.transposed else spec.shape
    weights[layer.values_name] = TensorSpec(shape, F8), functools.partial(read_quantised, read, layer.transposed, False)
    scales = functools.partial(read_quantised, read, layer.transposed, True)
    weights[layer.scale_name] = TensorSpec(shape[:1], torch.float32), scales
    if layer.input_scale is not None:
        spec_of_one = TensorSpec((1,), torch.float32)
        weights[layer.input_scale_name] = spec_of_one, functools.partial(torch.tensor, [layer.input_scale])
    for call in uses:
        node = call.node

        def read_at(name: str, suffix: str, call: LayerCall = call) -> fx.Node:
            new = insert_weight(call.node, name, call.weight, weights[name][0].shape, f"{call.weight.name}_{suffix}")
            new.meta["val"] = new.meta["val"].to(weights[name][0].dtype)
            return new

        values, scale = read_at(layer.values_name, "fp8"), read_at(layer.scale_name, "scale")
        own = layer.input_scale is not None and not call.per_pixel
        input_scale = read_at(layer.input_scale_name, "input_scale") if own else None
        op, *args = call.in_f8(node.args[0], values, scale, input_scale, call.rest)
        node.target, node.args, node.kwargs = op, tuple(args), {}
        set_fake_result(node)
        if not call.weight.users:
            graph.erase_node(call.weight)
