"""Backends, model sources, rules and passes of another package: found by name, taken as objects, tested."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import districompile as dc
from districompile import extend, testing
from districompile.backends.registry import backend_names, get_backend
from districompile.bundle.manifest import names_factory
from districompile.ir import operators
from districompile.models.sources import load_pipeline, load_source
from districompile.sharding import registry

pytestmark = pytest.mark.usefixtures("example")


def network() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    module, _, kwargs = importlib.import_module("districompile_example.sharpen").network()
    return module.eval(), kwargs


def test_extend_offers_what_it_says() -> None:
    assert sorted(extend.__all__) == extend.__all__
    text = extend.__doc__ or ""
    for name in extend.__all__:
        assert hasattr(extend, name)
        described = any(f"`{name}`" in text for name in (name, f"~{name}")) or name in ("PerRank",)
        assert described, f"{name} is in no group of the docstring"


def test_backend_of_a_package_is_found_by_name_and_conforms(tmp_path: Path) -> None:
    assert backend_names()[-1] == "interpreter"
    testing.check_backend("interpreter")
    module, kwargs = network()
    dc.convert(module, kwargs=kwargs, ranks=2).save(tmp_path / "bundle", "interpreter")
    for backend in (None, "interpreter", get_backend("interpreter")):
        loaded = dc.load(tmp_path / "bundle", lockstep=True, backend=backend, native_code=False)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**kwargs), module(**kwargs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_backends_conform(name: str) -> None:
    testing.check_backend(name)


class Wrong(extend.Backend):
    """A backend whose engines keep bindings of outputs and take anything."""

    name, suffix, version = "wrong", ".wrong", "1"
    native_code = False

    def __init__(self) -> None:
        self._eager = get_backend("eager")

    def unsupported_ops(self, segment: extend.SegmentGraph) -> list[str]:
        return []

    def build(self, segment: extend.SegmentGraph, weights: extend.WeightFile, path: Path) -> None:
        self._eager.build(segment, weights, path)

    def load(self, path: Path, segment: Any, weights: Any, device: torch.device) -> extend.Engine:
        engine = self._eager.load(path, segment, weights, device)
        engine.bind = lambda name, tensor: engine._bound.__setitem__(name, tensor)  # type: ignore[attr-defined, method-assign]
        return engine


def test_conformance_names_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="bind takes an unknown input"):
        testing.check_backend(Wrong())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Backend", r"package .* cannot be loaded .*no_such_module"),
        ("json:dumps", "cannot be made"),
        ("builtins:dict", "is a dict, not of a subclass"),
        ("districompile:__version__", "is no class"),
    ],
)
def test_bad_backends_are_named(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("bad", value, "districompile.backends")
    monkeypatch.setattr("districompile.backends.registry.entry_points", lambda group: {"bad": entry})
    with pytest.raises(dc.Error, match=message):
        get_backend("bad")


def test_built_in_backends_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("eager", "builtins:dict", "districompile.backends")
    monkeypatch.setattr("districompile.backends.registry.entry_points", lambda group: {"eager": entry})
    assert get_backend("eager").name == "eager"
    with pytest.raises(dc.BackendError, match="is no backend"):
        get_backend(3)  # type: ignore[arg-type]


def test_model_source_of_a_package() -> None:
    loaded = load_source("sharpened:demo")
    assert loaded.source == "sharpened:demo" and loaded.pipeline_loader is not None
    assert any(type(m).__name__ == "Sharpen" for m in loaded.module.modules())
    with pytest.raises(dc.Error, match="unknown model"):
        load_source("sharpened:nothing at all")
    assert names_factory("sharpened:demo") and names_factory("sharpened:a/b c") and not names_factory("owner/name")


def test_pipeline_of_a_model_source() -> None:
    assert type(load_pipeline("sharpened:demo")).__name__.endswith("Pipeline")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:load", "cannot be loaded"),
        ("builtins:divmod", "failed: TypeError"),
        ("os.path:join", "failed: TypeError"),
        ("builtins:print", "returned a NoneType"),
        ("districompile:__version__", "is not a function"),
    ],
)
def test_bad_model_sources_are_named(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("bad", value, "districompile.models")
    monkeypatch.setattr("districompile.models.sources.entry_points", lambda group: {"bad": entry})
    with pytest.raises(dc.Error, match=message):
        load_source("bad:argument")


def test_rules_are_checked_by_their_samples() -> None:
    (found,) = testing.check_rules("districompile_example.sharpen")
    op = found.op

    def no_halo(b: extend.ShardingBuilder, x: extend.ShardedValue, amount: float) -> extend.ShardedValue:
        return b.call(op, x, amount, layout=x.layout)

    with registry.rules.scope():
        registry.rules.add(registry.Rule(op, no_halo, found.samples), override=True)
        with pytest.raises(AssertionError, match=r"sharpen\.default, sample 0, cut at .*relative error"):
            testing.check_rule(op)
    with pytest.raises(AssertionError, match="registers no rule"):
        testing.check_rules("districompile_example.source")


@pytest.mark.parametrize("name", ["ExactAttention", "FuseSilu", "ApproximateGelu", "FetchEarly"])
def test_passes_of_the_example(name: str) -> None:
    module, kwargs = network()
    testing.check_pass(f"districompile_example.passes:{name}", module, kwargs, ranks=3)


class Activations(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.conv(sample)
        return self.conv(torch.nn.functional.gelu(x * torch.sigmoid(x)))


def test_passes_do_what_they_say() -> None:
    captured = dc.capture(Activations(), kwargs={"sample": torch.randn(1, 3, 9, 8)})

    def text(name: str) -> str:
        return dc.convert(captured, ranks=2, passes=[f"districompile_example.passes:{name}"]).graph_text()

    assert "silu" in text("FuseSilu") and "sigmoid" not in text("FuseSilu")
    assert "approximate='tanh'" in text("ApproximateGelu")


def test_a_pass_that_breaks_numbers_is_found() -> None:
    passes = importlib.import_module("districompile_example.passes")

    class Claimed(passes.ApproximateGelu):  # type: ignore[name-defined, misc]
        exact = True

    with pytest.raises(AssertionError, match="relative error"):
        testing.check_pass(Claimed(), Activations(), {"sample": torch.randn(1, 3, 9, 8)})


def test_wrong_rule_is_found_by_comparing_nodes() -> None:
    module, kwargs = network()
    errors = dc.convert(module, kwargs=kwargs, ranks=3).compare_nodes(**kwargs)
    assert len(errors) >= 12 and max(e.error for e in errors) < 1e-5
    op = torch.ops.example.sharpen.default

    def no_halo(b: extend.ShardingBuilder, x: extend.ShardedValue, amount: float) -> extend.ShardedValue:
        return b.call(op, x, amount, layout=x.layout)

    with registry.rules.scope():
        registry.rules.add(registry.Rule(op, no_halo), override=True)
        first = next(e for e in dc.convert(module, kwargs=kwargs, ranks=3).compare_nodes(**kwargs) if e.error > 1e-5)
    assert first.op == "example.sharpen.default" and "sharpen.py" in first.source


def test_operator_without_its_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, kwargs = network()
    monkeypatch.setattr(operators._DECLARED["example.sharpen.default"], "decomposition", None)
    with registry.rules.scope():
        registry.rules.remove(torch.ops.example.sharpen.default)
        program = dc.convert(module, kwargs=kwargs, ranks=3)
        (fallback,) = program.report().fallbacks()
        assert fallback["op"] == "example.sharpen.default" and "no rule" in fallback["reason"]
        assert "sharpen.py" in fallback["source"] and fallback["bytes"] == 8 * 13 * 8 * 4
        with pytest.raises(dc.ConvertError, match=r"strict: example.sharpen.default .*no rule.*extending/rule"):
            dc.convert(module, kwargs=kwargs, ranks=3, strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("districompile_example.passes", "write module:Class"),
        ("nowhere.at_all:Pass", "nowhere.at_all cannot be imported"),
        ("districompile_example.passes:Nothing", "has no Nothing"),
        ("districompile_example.passes:CompilationUnit", "cannot be made without more options"),
    ],
)
def test_bad_passes_are_named(text: str, message: str) -> None:
    module, kwargs = network()
    with pytest.raises(dc.ConvertError, match=message):
        dc.convert(module, kwargs=kwargs, ranks=2, passes=[text])


def test_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(dc.ConvertError, match="has a rule already"):
        dc.rule(torch.ops.aten.conv2d.default)(lambda b, x: x)


def test_missing_rule_module_is_named() -> None:
    module, kwargs = network()
    with pytest.raises(dc.ConvertError, match=r"rules my_pkg\.rules: it cannot be imported"):
        dc.convert(module, kwargs=kwargs, ranks=2, rules=["my_pkg.rules"])
