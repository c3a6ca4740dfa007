# SPDX-License-Identifier: Apache-2.0
"""Translations of products in 8 bits: pairs of QuantizeLinear and DequantizeLinear around a plain product.

The scales of these pairs are 1: values are divided by their scale before, and products multiplied by it behind. A
reader without 8-bit kernels then computes what :mod:`districompile.ir.quantised` describes, to the bit up to the sums.
One with such kernels finds the pattern that it replaces by them.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from districompile.backends.onnx.proto import Kind, Template, element_type
from districompile.ir.quantised import F8, F8_MAX, TINY

if TYPE_CHECKING:
    import onnx

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _Nodes:
    """The nodes of one template, each with a name of its own, and its constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, name: str, dtype: torch.dtype, dims: list[int], values: list[Any]) -> str:
        from onnx import helper

        self.constants[name] = helper.make_tensor(name, element_type(dtype), dims, values)
        return name

    def sizes(self, name: str, values: list[int]) -> str:
        return self.constant(name, torch.int64, [len(values)], values)

    def number(self, name: str, value: float) -> str:
        return self.constant(name, torch.float32, [], [value])

    def as_float(self, name: str, dtype: torch.dtype) -> str:
        return name if dtype == torch.float32 else self("Cast", name, to=element_type(torch.float32))

    def rounded(self, x: str) -> str:
        """Round float32 values to 8 bits, whose largest stands for larger ones, and give them as float32 again."""
        one, zero = self.number("one", 1.0), self.constant("zero", F8, [], [0.0])
        return self("DequantizeLinear", self("QuantizeLinear", x, one, zero), one, zero)

    def weight(self, name: str) -> str:
        return self("DequantizeLinear", name, self.number("one", 1.0), self.constant("zero", F8, [], [0.0]))

    def quantised(self, x: str, axis: int) -> tuple[str, str]:
        """Return values rounded to 8 bits, and their scales: one for all features along ``axis``."""
        largest = self("ReduceMax", self("Abs", x), self.sizes("axis", [axis]), keepdims=1)
        scale = self("Max", self("Div", largest, self.number("most", F8_MAX)), self.number("tiny", TINY))
        return self.rounded(self("Div", x, scale)), scale

    def template(self, y: str, kind: Kind, bias: str | None, shape: list[int]) -> Template:
        """Add the bias (O), which has ``shape`` beside ``y``, and give the result its dtype."""
        if bias is not None:
            wide = self.as_float(bias, kind.inputs[int(bias[1:])].dtype)
            y = self("Add", y, self("Reshape", wide, self.sizes("bias_shape", shape)))
        if kind.outputs[0].dtype != torch.float32:
            y = self("Cast", y, to=element_type(kind.outputs[0].dtype))
        names = tuple(f"x{i}" for i in range(len(kind.inputs)))
        return Template(tuple(self.nodes), tuple(self.constants.values()), names, (y,))


def _operands(kind: Kind) -> list[Any] | None:
    """Return the arguments, with tensors named ``x0``, ``x1`` and so on; None for dtypes without a translation."""
    positional, _ = json.loads(kind.arguments)
    if kind.inputs[0].dtype not in _FLOATS or 0 in kind.inputs[0].shape:
        return None
    return [f"x{a[1:]}" if isinstance(a, str) else a for a in positional]


def translate_linear(kind: Kind) -> Template | None:
    """Translate ``districompile.fp8_linear``."""
    operands = _operands(kind)
    if operands is None:
        return None
    x, weight, scale, bias = operands
    features, outputs = kind.inputs[1].shape[1], kind.inputs[1].shape[0]
    n = _Nodes()
    values, own = n.quantised(n.as_float(x, kind.inputs[0].dtype), -1)
    rows = n("Reshape", values, n.sizes("rows", [-1, features]))
    product = n("Gemm", rows, n.weight(weight), transB=1)
    y = n("Reshape", product, n.sizes("shape", list(kind.outputs[0].shape)))
    return n.template(n("Mul", n("Mul", y, own), scale), kind, bias, [outputs])


def translate_int_mm(kind: Kind) -> Template:
    """Translate a product of int8 matrices to int32."""
    from onnx import helper

    return Template((helper.make_node("MatMulInteger", ["a", "b"], ["y"]),), (), ("a", "b"), ("y",))


def translate_scaled_mm(kind: Kind) -> Template | None:
    """Translate ``aten._scaled_mm`` to a product in float32 and its scales."""
    positional, named = json.loads(kind.arguments)
    given = [*positional, *[None] * (8 - len(positional))]
    a, b, scale_a, scale_b, bias, scale_result = (None if g is None else f"x{g[1:]}" for g in given[:6])
    if scale_result is not None or named.get("bias") is not None or named.get("scale_result") is not None:
        return None
    specs = {f"x{i}": spec for i, spec in enumerate(kind.inputs)}
    if any(
        _numel(specs[str(s)].shape) not in (1, n)
        for s, n in zip((scale_a, scale_b), kind.outputs[0].shape, strict=True)
    ):
        return None  # scales of blocks
    n = _Nodes()
    y = n("MatMul", *(n("Cast", str(x), to=element_type(torch.float32)) for x in (a, b)))
    for scale in (scale_a, scale_b):
        y = n("Mul", y, str(scale))
    return n.template(y, kind, bias, [kind.outputs[0].shape[1]])


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def translate_move(kind: Kind) -> Template | None:
    """Translate a transposition of 8-bit values by way of float32: opset 20 has none of their own."""
    if kind.inputs[0].dtype not in (F8, torch.float8_e5m2):
        return None
    from onnx import helper

    (_, *dims), _ = json.loads(kind.arguments)
    rank = len(kind.inputs[0].shape)
    order = list(range(rank))
    if kind.op == "aten.permute.default":
        order = [d % rank for d in dims[0]]
    elif rank > 1:
        first, second = (d % rank for d in dims or (0, 1))
        order[first], order[second] = order[second], order[first]
    nodes = (
        helper.make_node("Cast", ["x"], ["wide"], to=element_type(torch.float32)),
        helper.make_node("Transpose", ["wide"], ["moved"], perm=order),
        helper.make_node("Cast", ["moved"], ["y"], to=element_type(kind.inputs[0].dtype)),
    )
    return Template(nodes, (), ("x",), ("y",))


def translate_cast(kind: Kind) -> Template | None:
    """Translate a cast to or from 8-bit floating point. What 8 bits cannot hold becomes NaN, as in PyTorch."""
    from onnx import helper

    given, made = kind.inputs[0].dtype, kind.outputs[0].dtype
    if not {given, made} & {F8, torch.float8_e5m2} or given == made:
        return None
    node = helper.make_node("Cast", ["x"], ["y"], to=element_type(made))
    if made in (F8, torch.float8_e5m2):
        node.attribute.append(helper.make_attribute("saturate", 0))
    return Template((node,), (), ("x",), ("y",))


def translate_conv(kind: Kind) -> Template | None:
    """Translate ``districompile.fp8_conv``."""
    operands = _operands(kind)
    if operands is None:
        return None
    x, weight, scale, input_scale, bias, stride, padding, dilation, groups = operands
    outputs, _, *kernel = kind.inputs[1].shape
    channels = [outputs, *[1] * len(kernel)]
    n = _Nodes()
    wide = n.as_float(x, kind.inputs[0].dtype)
    if input_scale is not None:
        values, own = n.rounded(n("Div", wide, input_scale)), input_scale
    else:
        values, own = n.quantised(wide, 1)
        if any(s != 1 for s in stride):
            axes = list(range(2, 2 + len(kernel)))
            last = n.sizes("ends", [2**31 - 1] * len(kernel))
            own = n("Slice", own, n.sizes("starts", [0] * len(kernel)), last, n.sizes("axes", axes),
                    n.sizes("steps", stride))  # fmt: skip
    y = n(
        "Conv", values, n.weight(weight), kernel_shape=kernel, strides=stride, pads=[*padding, *padding],
        dilations=dilation, group=groups,
    )  # fmt: skip
    factors = n("Reshape", scale, n.sizes("channels", channels))
    return n.template(n("Mul", n("Mul", y, own), factors), kind, bias, channels)
