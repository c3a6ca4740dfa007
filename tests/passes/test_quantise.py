# SPDX-License-Identifier: Apache-2.0
"""Layers in 8 bits: which are chosen and why, and that any number of ranks computes what one device does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import districompile as dc
from districompile.errors import ConvertError
from districompile.frontend.capture import capture
from districompile.ir import quantised
from districompile.ir.layer_size import LayerSize
from districompile.ir.quantised import F8, dequantise_weight, fp8_conv, fp8_linear, quantise_weight
from districompile.ir.report_builder import NOT_FASTER, QuantisedLayer
from tests.small_models import sd15


class Layers(nn.Module):
    """A convolution, a block of linears and its surroundings: each kind of layer that the pass knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.time = nn.Linear(1, 32)
        self.wide = nn.Conv2d(32, 32, 3, padding="same", dilation=2)
        self.point = nn.Conv2d(32, 48, 1, stride=2)
        self.up = nn.Linear(48, 64)
        self.down = nn.Parameter(torch.randn(64, 48) / 8)
        self.thin = nn.Linear(48, 4)
        self.back = nn.Linear(4, 48)
        self.last = nn.Conv2d(48, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        x = self.norm(self.first(sample)) + self.time(timestep.reshape(1, 1)).reshape(1, -1, 1, 1)
        x = self.point(torch.nn.functional.silu(self.wide(x)))
        y = x.flatten(2).transpose(1, 2)
        y = y + torch.matmul(torch.nn.functional.gelu(self.up(y)), self.down)
        y = y + self.back(self.thin(y))
        return self.last(y.transpose(1, 2).reshape(x.shape))


def layers(dtype: torch.dtype = torch.float32) -> tuple[Layers, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Layers().eval().to(dtype), (torch.randn(2, 4, 24, 16, dtype=dtype), torch.tensor(0.5, dtype=dtype))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def found(program: dc.Program) -> Mapping[str, QuantisedLayer]:
    return {x.weight: x for x in program.plan.report.quantised}


def test_a_stored_weight_is_quantised_to_itself() -> None:
    weight = torch.randn(7, 5, 3, 3) * torch.logspace(-6, 3, 7).reshape(-1, 1, 1, 1)
    weight[3] = 0
    values, scale = quantise_weight(weight)
    assert values.dtype == F8 and scale.dtype == torch.float32
    again, same = quantise_weight(dequantise_weight(values, scale))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) and torch.equal(same, scale)
    assert (dequantise_weight(values, scale) - weight).abs().max() <= weight.abs().max() * 2**-4


def test_operators_are_the_product_of_rounded_operands() -> None:
    x, weight, bias = torch.randn(2, 6, 5, 4), torch.randn(3, 6, 3, 3), torch.randn(3)
    values, scale = quantise_weight(weight)
    own = torch.tensor([0.01])
    rounded = (x / own).clamp(-448, 448).to(F8).float() * own
    expected = torch.conv2d(rounded, dequantise_weight(values, scale), bias, padding=1)
    got = fp8_conv(x, values, scale, own, bias, [1, 1], [1, 1], [1, 1], 1)
    assert relative(got, expected) < 1e-6
    assert relative(got, torch.conv2d(x, weight, bias, padding=1)) > 1e-3  # it does round
    tokens, matrix = torch.randn(5, 8) * torch.logspace(-3, 3, 5).reshape(-1, 1), torch.randn(4, 8)
    values, scale = quantise_weight(matrix)
    expected = tokens @ matrix.t()
    error = (fp8_linear(tokens, values, scale, None) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.15  # of every token, whatever its size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_multiplies_8_bit_matrices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # On fake tensors of a GPU: PyTorch checks sizes, types and memory of the operands there
    monkeypatch.setattr(quantised, "has_f8_units", lambda device: device.type == "cuda")
    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Record(), torch.no_grad():
        x = torch.empty(2, 9, 32, dtype=dtype, device="cuda")
        weight, scale = torch.empty(48, 32, dtype=F8, device="cuda"), torch.empty(48, device="cuda")
        y = fp8_linear(x, weight, scale, torch.empty(48, dtype=dtype, device="cuda"))
        assert (y.shape, y.dtype) == ((2, 9, 48), dtype) and called.count("aten._scaled_mm.default") == 1
        image = torch.empty(2, 32, 9, 6, dtype=dtype, device="cuda")
        y = fp8_conv(image, weight.reshape(48, 32, 1, 1), scale, None, None, [2, 2], [0, 0], [1, 1], 1)
        assert (y.shape, y.dtype) == ((2, 48, 5, 3), dtype) and called.count("aten._scaled_mm.default") == 2
        # one image that is not channels-last: its pixels lie by columns
        one = torch.empty(1, 32, 9, 6, dtype=dtype, device="cuda")
        y = fp8_conv(one, weight.reshape(48, 32, 1, 1), scale, None, None, [1, 1], [0, 0], [1, 1], 1)
        assert (y.shape, y.dtype) == ((1, 48, 9, 6), dtype) and called.count("aten._scaled_mm.default") == 3
        kernel, own = torch.empty(48, 32, 3, 3, dtype=F8, device="cuda"), torch.empty(1, device="cuda")
        y = fp8_conv(image, kernel, scale, own, None, [1, 1], [1, 1], [1, 1], 1)
        assert (y.shape, y.dtype) == ((2, 48, 9, 6), dtype) and "aten._scaled_mm.default" not in called[-3:]


def test_choice_and_reasons() -> None:
    module, args = layers()
    program = dc.convert(module, args, ranks=2, quantise="fp8:20")
    chosen = found(program)
    in_f8 = {name for name, x in chosen.items() if x.reason is None}
    assert in_f8 == {"wide.weight", "point.weight", "up.weight", "down"}
    for name, words in {
        "first.weight": "first layer", "last.weight": "last layer", "time.weight": "1 rows", "thin.weight": "4 by 48",
        "back.weight": "48 by 4",
    }.items():  # fmt: skip
        assert words in (chosen[name].reason or ""), chosen[name]
    assert chosen["wide.weight"].input_scale and chosen["point.weight"].input_scale is None
    assert chosen["down"].transposed
    weights = program.plan.weights
    assert weights["wide.weight:fp8"].dtype == F8 and "wide.weight" not in weights
    assert weights["down:fp8"].shape == (48, 64)
    text = str(program.report())
    assert "4 of 9 layers in 8 bits" in text and "it is the first layer after an input of the image" in text


def test_layers_that_are_not_faster_stay() -> None:
    module, args = layers()
    asked: list[LayerSize] = []

    def faster(size: LayerSize) -> bool | None:
        asked.append(size)
        return None if size.columns == 4 else size.image is not None

    program = dc.convert(module, args, ranks=2, rows={"sample": 2}, quantise="fp8:9", faster=faster)
    reasons = {name: x.reason for name, x in found(program).items()}
    assert reasons["wide.weight"] is None and reasons["point.weight"] is None
    assert "2 of 9 layers in 8 bits" in str(program.report()) and "; 2 are not faster in 8 bits" in str(
        program.report()
    )
    assert [n for n, r in reasons.items() if r == NOT_FASTER] == ["up.weight", "down"]
    wide, point, up, down, *_ = asked
    # Two images of 24 x 16 pixels on two ranks, with two rows of each neighbour
    assert (wide.image, wide.padding, wide.dilation) == ((2, 32, 12 + 4, 16), (0, 2), (2, 2)) and not wide.apart
    assert (point.rows, point.inner, point.columns, point.stride) == (96, 32, 48, (2, 2))
    assert (up.rows, up.inner, up.columns, up.bias, up.apart) == (96, 48, 64, True, True)
    assert (down.inner, down.columns, down.bias, down.apart) == (64, 48, False, False)
    assert len(set(asked)) == len(asked)  # each size once


def test_what_is_asked_of_the_output_is_kept() -> None:
    module, args = layers()
    with torch.no_grad():
        expected = module(*args)
    counts = []
    for level in (20, 30, 36, 60):
        program = dc.convert(module, args, ranks=1, quantise=f"fp8:{level}")
        assert relative(program.simulate(*args), expected) <= 10 ** (-level / 20) * 1.001
        counts.append(sum(x.reason is None for x in program.plan.report.quantised))
    assert counts[0] == 4 and counts[-1] == 0 and counts == sorted(counts, reverse=True)


def test_a_layer_with_one_far_larger_feature_stays() -> None:
    module, args = layers()
    with torch.no_grad():  # of which the layer reads nothing, while the scale of each token comes from it
        module.point.weight[0] *= 1e7
        module.up.weight[:, 0] = 0
    reason = found(dc.convert(module, args, ranks=1, quantise="fp8:1"))["up.weight"].reason
    assert reason is not None and "its result has" in reason


class Block(nn.Module):
    """A transformer block between a patch embedding and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(4, 32, 2, stride=2), nn.Linear(32, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.embed(sample).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        z: Tensor = self.out(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return z


def block(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Block().eval().to(dtype), (torch.randn(1, 4, 24, 16, dtype=dtype),)


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    module, kwargs = sd15(2, 16, 16)
    return module.double(), tuple(v.double() for v in kwargs.values())


def every_layer(module: nn.Module) -> list[QuantisedLayer]:
    """All of a module's layers but the first and the last, in 8 bits."""
    modules = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    scales = {n: 0.02 if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) else None for n, m in modules.items()}
    names = [n for n in modules if n not in ("conv_in", "conv_out", "first", "last", "embed", "out")]
    return [QuantisedLayer(f"{n}.weight", n, None, None, scales[n]) for n in names]


@pytest.mark.parametrize(
    "made", [pytest.param(unet, marks=pytest.mark.slow), lambda: layers(torch.float64), lambda: block(torch.float64)]
)
def test_any_number_of_ranks_computes_what_one_does(made: Any) -> None:
    # In float64 a rounding to 8 bits falls the same way on all ranks, so that a wrong row would show
    module, args = made()
    captured, chosen = capture(module, args), every_layer(module)
    one, two, three = (dc.convert(captured, ranks=n, phases="exact", quantise=chosen) for n in (1, 2, 3))
    assert sum(str(n.target).startswith("districompile.fp8") for n in one.graph().nodes) >= len(chosen)
    expected = _first(one.simulate(*args))
    for several in (two, three):
        assert relative(_first(several.simulate(*args)), expected) < 1e-12
        assert not several.plan.report.fallbacks


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else next(iter(out.values())) if isinstance(out, Mapping) else out[0]


def test_in_float32_ranks_differ_by_less_than_8_bits_do() -> None:
    module, args = layers()
    one = dc.convert(module, args, ranks=1, quantise="fp8:15")
    three = dc.convert(module, args, ranks=3, quantise=one.plan.report.quantised)
    with torch.no_grad():
        plain = module(*args)
    a, b = one.simulate(*args), three.simulate(*args)
    assert relative(b, a) < relative(a, plain) and abs(relative(b, plain) / relative(a, plain) - 1) < 0.3


def test_fused_linears_are_one_layer() -> None:
    module, args = block()
    program = dc.convert(module, args, ranks=2, quantise="fp8:15", optimise="fuse-parallel-linears")
    assert found(program)["q.weight+2"].reason is None
    with torch.no_grad():
        assert relative(program.simulate(*args), module(*args)) < 0.18


def test_refusals() -> None:
    module, args = layers()
    with pytest.raises(ConvertError, match="there is no quantisation 'int3'; there are: none, fp8, or fp8:DB"):
        dc.convert(module, args, ranks=2, quantise="int3")
    with pytest.raises(ConvertError, match="quantise calls the module: pass the module"):
        dc.convert(capture(module, args), ranks=2, quantise="fp8")
    other = (torch.randn(2, 4, 16, 16), args[1])
    with pytest.raises(ConvertError, match=r"calibration: sample is torch.float32 \[2, 4, 16, 16\]"):
        dc.convert(module, args, ranks=2, quantise="fp8", calibration=[(other, {})])
    alien = QuantisedLayer("gone.weight", "gone", None, 30.0, None)
    with pytest.raises(ConvertError, match="no layer with the weight gone.weight"):
        dc.convert(module, args, ranks=2, quantise=[alien])
