# SPDX-License-Identifier: Apache-2.0
"""Bundles with layers in 8 bits: their size, other weights for them, further shapes, and backends that agree."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.bundle.refit import Lora, refit
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError
from districompile.ir.quantised import F8, dequantise_weight, quantise_weight
from districompile.ir.report_builder import QuantisedLayer
from districompile.shapes import convert_like


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.point, self.last = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 4, 1)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.point(torch.nn.functional.silu(self.conv(self.first(sample))))
        y = x.flatten(2).transpose(1, 2)
        y = y + self.down(torch.nn.functional.gelu(self.up(y)))
        z: Tensor = self.last(y.transpose(1, 2).reshape(x.shape))
        return z


LAYERS = [QuantisedLayer(f"{n}.weight", n, None, None, 0.02 if n == "conv" else None)
          for n in ("conv", "point", "up", "down")]  # fmt: skip


def net(seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net().eval(), torch.randn(1, 4, 12, 8)


def exact(path: Path, x: Tensor) -> Tensor:
    loaded = dc.load(path, lockstep=True)
    with loaded.exact():
        out: Tensor = loaded(x)
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    module, x = net()
    path: Path = tmp_path_factory.mktemp("fp8") / "bundle"
    dc.convert(module, (x,), ranks=2, quantise=LAYERS).save(path, "eager")
    return path


def test_weights_are_stored_once_in_8_bits(bundle: Path, tmp_path: Path) -> None:
    module, x = net()
    dc.convert(module, (x,), ranks=2).save(tmp_path / "float", "eager")
    sizes = [(p / "weights.safetensors").stat().st_size for p in (bundle, tmp_path / "float")]
    assert sizes[0] < 0.35 * sizes[1]  # 8 of 32 bits, but for the first and the last layer and the scales
    weights = WeightFile.open(bundle / "weights.safetensors")
    assert "conv.weight" not in weights and weights.spec("conv.weight:fp8").dtype == F8
    values, scale = quantise_weight(module.conv.weight)
    assert torch.equal(weights.tensor("conv.weight:fp8").float(), values.float())
    assert torch.equal(weights.tensor("conv.weight:scale"), scale)


def test_a_bundle_computes_what_its_program_does(bundle: Path) -> None:
    module, x = net()
    expected = dc.convert(module, (x,), ranks=2, quantise=LAYERS).simulate(x)
    assert torch.equal(exact(bundle, x), expected)
    report = Bundle.open(bundle).plan.report.quantised
    assert {layer.weight for layer in report if layer.reason is None} == {
        f"{n}.weight" for n in ("conv", "point", "up", "down")
    }


def test_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    module, x = net()
    program = dc.convert(module, (x,), ranks=2, phases="exact", quantise=LAYERS)
    program.save(tmp_path / "bundle", "onnxruntime")
    expected = program.simulate(x)
    assert (exact(tmp_path / "bundle", x) - expected).norm() < 2e-3 * expected.norm()  # some roundings fall otherwise


def test_other_weights_are_quantised_again(bundle: Path, tmp_path: Path) -> None:
    other, x = net(seed=1)
    assert refit(bundle, tmp_path / "new", module=other) > 0
    expected = dc.convert(other, (x,), ranks=2, quantise=LAYERS).simulate(x)
    assert torch.equal(exact(tmp_path / "new", x), expected)


def test_a_lora_is_added_to_the_stored_weight_and_quantised(bundle: Path, tmp_path: Path) -> None:
    _, x = net()
    old = WeightFile.open(bundle / "weights.safetensors")
    loras = [
        Lora("up", torch.randn(2, 64), torch.randn(256, 2), 0.1),
        Lora("conv", torch.randn(2, 64, 3, 3), torch.randn(64, 2, 1, 1), 0.1),
    ]
    assert refit(bundle, tmp_path / "new", loras=loras) == 2
    new = WeightFile.open(tmp_path / "new" / "weights.safetensors")
    for lora in loras:
        name = f"{lora.name}.weight"
        plain = dequantise_weight(old.tensor(f"{name}:fp8"), old.tensor(f"{name}:scale"))
        delta = (lora.up.flatten(1) @ lora.down.flatten(1)).reshape(plain.shape) * lora.scale
        values, scale = quantise_weight(plain + delta)
        assert torch.allclose(new.tensor(f"{name}:scale"), scale, rtol=1e-5)
        assert (new.tensor(f"{name}:fp8").float() != values.float()).float().mean() < 1e-3
    assert torch.equal(new.tensor("down.weight:fp8").float(), old.tensor("down.weight:fp8").float())
    assert not torch.equal(exact(tmp_path / "new", x), exact(bundle, x))


def test_further_shapes_read_the_same_weights(bundle: Path, tmp_path: Path) -> None:
    module, _ = net()
    shutil.copytree(bundle, tmp_path / "copy")
    program = convert_like(Bundle.open(tmp_path / "copy"), module, (torch.randn(1, 4, 16, 8),))
    before = (tmp_path / "copy" / "weights.safetensors").read_bytes()
    assert program.add_to(tmp_path / "copy")
    assert (tmp_path / "copy" / "weights.safetensors").read_bytes() == before
    x = torch.randn(1, 4, 16, 8)
    expected = dc.convert(module, (x,), ranks=2, quantise=LAYERS).simulate(x)
    assert torch.equal(exact(tmp_path / "copy", x), expected)
    plain = dc.convert(module, (torch.randn(1, 4, 20, 8),), ranks=2)
    shutil.copytree(bundle, tmp_path / "other")
    with pytest.raises(BundleError, match="differ in the bits of their layers"):
        plain.add_to(tmp_path / "other")


def test_a_bundle_with_an_invalid_layer_is_refused(bundle: Path, tmp_path: Path) -> None:
    refit(bundle, tmp_path / "copy")
    text = copy.deepcopy(json.loads((tmp_path / "copy" / "plan.json").read_text()))
    text["report"]["quantised"][0]["input_scale"] = -1.0
    (tmp_path / "copy" / "plan.json").unlink()  # it is a hard link to that of the fixture
    (tmp_path / "copy" / "plan.json").write_text(json.dumps(text))
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "copy", verify=False)
