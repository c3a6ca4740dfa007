# SPDX-License-Identifier: Apache-2.0
"""Modules that come in 8 bits are taken as they are: their operators stay local, and nothing is silently local."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

import districompile as dc
from districompile.plan.plan import Reduction

quantised = torch.ops.quantized_decomposed


class Around(nn.Module):
    """An operation on tokens between two convolutions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(4, 32, 3, padding=1), inner, nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.first(sample)
        y = self.inner(x.flatten(2).transpose(1, 2).reshape(-1, 32))
        z: Tensor = self.last(x + y.reshape(x.shape[0], -1, 32).transpose(1, 2).reshape(x.shape))
        return z


class Scaled(nn.Module):
    """``aten._scaled_mm`` with a scale of the tensor, or one of each row."""

    def __init__(self, by_row: bool) -> None:
        super().__init__()
        self.by_row = by_row
        self.register_buffer("weight", (torch.randn(32, 32) / 6).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) if self.by_row else x.abs().max()) / 448
        values = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        own = torch.ones(1, 32) if self.by_row else torch.ones(())
        out = torch.bfloat16 if self.by_row else torch.float32
        return torch._scaled_mm(values, self.weight.t(), scale, own, out_dtype=out).float()  # type: ignore[operator]


class Static(nn.Module):
    """Pairs of an exported model with constant scales: of a tensor, and of the channels of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (32, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(32) / 1000)
        self.register_buffer("zero", torch.zeros(32, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        values = quantised.quantize_per_tensor(x, 0.02, 3, -128, 127, torch.int8)
        rounded = quantised.dequantize_per_tensor(values, 0.02, 3, -128, 127, torch.int8)
        weight = quantised.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        return nn.functional.linear(rounded, weight)


class Dynamic(nn.Module):
    """Pairs of an exported model whose scale comes from the extremes of the whole tensor."""

    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.choose = quantised.choose_qparams_symmetric.tensor if symmetric else quantised.choose_qparams.tensor

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.choose(x, -128, 127, 1e-6, torch.int8)
        values = quantised.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8)
        y: Tensor = quantised.dequantize_per_tensor.tensor(values, scale, zero, -128, 127, torch.int8)
        return y


class Simulated(nn.Module):
    """Pairs as a toolkit writes them that simulates 8 bits: casts, and PyTorch's own operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x * (448 / 3.0)).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * (3.0 / 448)
        return torch.fake_quantize_per_tensor_affine(y, 0.03, 0, -128, 127)


@pytest.mark.parametrize(
    ("inner", "reductions"),
    [(lambda: Scaled(False), 1), (lambda: Scaled(True), 0), (Static, 0), (lambda: Dynamic(False), 2),
     (lambda: Dynamic(True), 2), (Simulated, 0)],
)  # fmt: skip
def test_ranks_compute_what_the_module_does(inner: Any, reductions: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Around(inner()).eval(), torch.randn(2, 4, 13, 8)
    x[:, :, 0] *= 5  # the extremes are on the first rank alone
    program = dc.convert(module, (x,), ranks=3, phases="exact")
    assert not program.plan.report.fallbacks
    assert sum(isinstance(c, Reduction) for c in program.plan.collectives.values()) == reductions
    with torch.no_grad():
        expected = module(x)
    assert (program.simulate(x) - expected).abs().max() < 1e-5
    program.save(tmp_path / "bundle", "eager")
    loaded = dc.load(tmp_path / "bundle", lockstep=True)
    with loaded.exact():
        assert torch.equal(loaded(x), program.simulate(x))


@pytest.mark.parametrize("inner", [lambda: Scaled(False), lambda: Scaled(True), Static, lambda: Dynamic(False)])
def test_onnx_has_a_translation(inner: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module, x = Around(inner()).eval(), torch.randn(1, 4, 12, 8)
    program = dc.convert(module, (x,), ranks=2, phases="exact")
    program.save(tmp_path / "bundle", "onnxruntime")
    loaded = dc.load(tmp_path / "bundle", lockstep=True)
    expected = program.simulate(x)
    with loaded.exact():
        assert (loaded(x) - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize(
    "kind", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao(kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    module, x = Around(nn.Linear(32, 32)).eval(), torch.randn(2, 4, 13, 8)
    plain = copy.deepcopy(module)
    torchao.quantize_(module, getattr(torchao, kind)())
    with torch.no_grad():
        expected = module(x)
        assert not torch.equal(expected, plain(x))
    program = dc.convert(module, (x,), ranks=3, phases="exact")
    assert not program.plan.report.fallbacks
    assert (program.simulate(x) - expected).abs().max() < 1e-5
    matrices = [s for n, s in program.plan.weights.items() if n.startswith("inner") and s.shape == (32, 32)]
    assert [s.dtype.itemsize for s in matrices] == [1]
