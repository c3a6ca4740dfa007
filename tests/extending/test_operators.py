"""Operators of other packages get into bundles: with several results, in place, without a rule, and by each backend."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile import extend
from districompile.backends.inductor.backend import InductorBackend
from districompile.ir import operators
from districompile.ir.serialize import graph_from_json

pytestmark = pytest.mark.usefixtures("example")


def network(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    module, _, kwargs = importlib.import_module(f"districompile_example.{name}").network()
    return module.eval(), kwargs


@torch.library.custom_op("tests_extending::add_into", mutates_args=("total", "count"))
def add_into(total: Tensor, x: Tensor, count: Tensor) -> Tensor:
    """Write to two of three tensors, and give a result besides."""
    total.add_(x)
    count.sub_(x)
    return x * 2


@add_into.register_fake
def _(total: Tensor, x: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tests_extending::undeclared", mutates_args=())
def undeclared(x: Tensor) -> Tensor:
    return x + 1


@undeclared.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class InPlace(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        total, count = sample * 2, sample * 3
        result = add_into(total[:, :2], sample[:, 1:], count[:, :2])
        return torch.cat([total, count, result], 1)


class Undeclared(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return undeclared(sample * 2)


def saved(module: nn.Module, kwargs: dict[str, Tensor], backend: Any, folder: Path) -> float:
    """Convert, save and load again; the largest difference from the module."""
    program = dc.convert(module, kwargs=kwargs, ranks=3)
    program.save(folder / "bundle", backend)
    loaded = dc.load(folder / "bundle", lockstep=True)
    with torch.no_grad():
        return float((loaded(**kwargs) - module(**kwargs)).abs().max())


@pytest.mark.parametrize("name", ["sharpen", "operators"])
def test_eager_bundle_names_the_operators(name: str, tmp_path: Path) -> None:
    module, kwargs = network(name)
    assert saved(module, kwargs, "eager", tmp_path) < 1e-5
    recorded = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["operators"]
    package = {"module": f"districompile_example.{name}", "package": "districompile-example", "version": "0.1.0"}
    names = {"sharpen": {"example.sharpen.default"},
             "operators": {"example.extremes.default", "functional:example.scale_.default"}}  # fmt: skip
    assert recorded.keys() == names[name]
    assert all(entry == package for entry in recorded.values())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_operator_that_writes_to_its_arguments(backend: str, tmp_path: Path) -> None:
    extend.operator(torch.ops.tests_extending.add_into.default)
    kwargs = {"sample": torch.randn(1, 3, 9, 4)}
    chosen = InductorBackend("cpu") if backend == "inductor" else backend
    assert saved(InPlace(), kwargs, chosen, tmp_path) < 1e-5


def test_translation_comes_before_the_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kwargs = network("sharpen")
    declared = operators._DECLARED["example.sharpen.default"]
    whole, declared_onnx = declared.decomposition, declared.onnx
    assert whole is not None and declared_onnx is not None

    def never(*args: object) -> object:
        raise AssertionError("not this one")

    monkeypatch.setattr(declared, "decomposition", never)
    assert saved(module, kwargs, "onnxruntime", tmp_path) < 1e-5
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["operators"] == {}, "ONNX files hold no operator of another package"
    monkeypatch.setattr(declared, "decomposition", whole)
    monkeypatch.setattr(declared, "onnx", None)
    assert saved(module, kwargs, "onnxruntime", tmp_path / "second") < 1e-5


def test_onnxruntime_says_what_it_lacks(tmp_path: Path) -> None:
    module, kwargs = network("operators")
    with pytest.raises(
        dc.BackendError, match=r"example\.extremes\.default .*extend\.decomposition or onnx_translation"
    ):
        saved(module, kwargs, "onnxruntime", tmp_path)


def test_undeclared_operator_is_refused_by_name(tmp_path: Path) -> None:
    kwargs = {"sample": torch.randn(1, 3, 9, 4)}
    with pytest.raises(
        dc.BackendError, match=r"tests_extending\.undeclared\.default cannot be stored.*extend\.operator"
    ):
        saved(Undeclared(), kwargs, "eager", tmp_path)


NAMES = ["tests_extending.undeclared.default", "functional:tests_extending.undeclared.default", "prims.x", "a.b.c.d",
         "functional:example.sharpen.default", "no.such.thing"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bundle_cannot_name_an_operator_that_is_not_declared(name: str) -> None:
    text = json.dumps({"inputs": [["float32", [2]]], "nodes": [[name, ["%0"], {}]], "outputs": ["%1"]})
    with pytest.raises(dc.BackendError, match="does not know or does not allow"):
        graph_from_json(text)


def test_missing_operator_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kwargs = network("sharpen")
    program = dc.convert(module, kwargs=kwargs, ranks=2)
    program.save(tmp_path / "bundle", "eager")
    monkeypatch.setattr(operators, "_DECLARED", {})
    monkeypatch.setattr("districompile.common.extensions.entry_points", lambda group: {})
    pattern = r"example\.sharpen\.default of the package districompile-example 0\.1\.0, module districompile_example"
    with pytest.raises(dc.BackendError, match=pattern) as caught:
        dc.load(tmp_path / "bundle", lockstep=True)
    assert "\n" not in str(caught.value) and "--extension" in str(caught.value)

    def declare() -> None:
        extend.operator(torch.ops.example.sharpen.default)

    loaded = dc.load(tmp_path / "bundle", lockstep=True, extensions=[declare])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**kwargs), module(**kwargs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        ("no_such_module_anywhere", "cannot be imported"),
        ("districompile_example:nothing", "has no nothing"),
        (lambda: 1 / 0, "failed .*ZeroDivisionError"),
    ],
)
def test_bad_extensions_are_named(extension: Any, message: str) -> None:
    module, kwargs = network("sharpen")
    with pytest.raises(dc.Error, match=message):
        dc.convert(module, kwargs=kwargs, ranks=2, extensions=[extension])


def test_operator_without_a_rule_is_decomposed_when_it_can_be() -> None:
    op = torch.ops.tests_extending.undeclared.default
    found = dc.convert(Undeclared(), kwargs={"sample": torch.randn(1, 3, 9, 4)}, ranks=2)
    assert found.report().fallbacks()
    extend.decomposition(op)(lambda x: x + 1)
    try:
        found = dc.convert(Undeclared(), kwargs={"sample": torch.randn(1, 3, 9, 4)}, ranks=2)
        assert not found.report().fallbacks() and "undeclared" not in found.graph_text()
    finally:
        operators._DECLARED.pop("tests_extending.undeclared.default")


@pytest.mark.parametrize("wrong", [torch.ops.tests_extending.add_into, "example.sharpen", len])
def test_only_overloads_are_declared(wrong: Any) -> None:
    with pytest.raises(dc.ConvertError, match="not an operator overload"):
        extend.operator(wrong)
    with pytest.raises(dc.ConvertError, match="operator of PyTorch"):
        extend.decomposition(torch.ops.aten.relu.default)(lambda x: x)
