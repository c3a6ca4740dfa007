"""What a bundle cannot do: import or call what it names, read outside of its folder, or load native code unasked."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundles import TRIPWIRE, make, set_tripwire, store
from torch import Tensor, nn

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.onnxruntime import OnnxRuntimeBackend
from districompile.backends.tensorrt import TensorRTBackend
from districompile.bundle.bundle import Bundle
from districompile.bundle.manifest import manifest_text
from districompile.cli import main
from districompile.errors import BackendError, BundleError
from districompile.frontend.call_tree import OUTPUT_CLASSES, OutputNamespace, check_classes, rebuild_output
from districompile.ir.check_graph import output_specs
from districompile.ir.serialize import graph_from_json


@pytest.fixture
def tripwire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that importing :data:`TRIPWIRE` would write."""
    fired = set_tripwire(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield fired
    sys.modules.pop(TRIPWIRE, None)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Tensor, ...]]:
    folder = tmp_path_factory.mktemp("trust") / "b"
    return folder, make(folder)[1]


@pytest.fixture
def copy(original: tuple[Path, tuple[Tensor, ...]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def edit(folder: Path, plan: dict[str, Any] | None = None, manifest: dict[str, Any] | None = None) -> None:
    """Change fields of the plan and of the manifest, and make the hashes right."""
    old = [json.loads((folder / name).read_text()) for name in ("plan.json", "manifest.json")]
    store(folder, {**old[0], **(plan or {})}, {**old[1], **(manifest or {})})


def record(name: str, field: str = "sample") -> dict[str, Any]:
    return {"kind": "object", "class": name, "items": [[field, {"kind": "leaf", "index": 0}]]}


@pytest.mark.parametrize("name", ["os:abort", f"{TRIPWIRE}:Record", f"{TRIPWIRE}.more:Record", "subprocess:Popen", ""])
def test_an_output_class_is_not_imported(
    original: tuple[Path, tuple[Tensor, ...]], copy: Path, tripwire: Path, name: str
) -> None:
    edit(copy, {"output": record(name)})
    module = dc.load(copy, lockstep=True)
    found = module(*original[1])
    assert isinstance(found, OutputNamespace) and found.sample.shape == (1, 4, 7, 5)
    assert not tripwire.exists() and TRIPWIRE not in sys.modules


def test_a_trusted_package(original: tuple[Path, tuple[Tensor, ...]], copy: Path, tripwire: Path) -> None:
    edit(copy, {"output": record(f"{TRIPWIRE}:Record", "a")})
    for others in (("tripwire",), ("trip", "os"), (f"{TRIPWIRE}.more",)):  # names that are near
        assert isinstance(dc.load(copy, lockstep=True, trusted_packages=others)(*original[1]), OutputNamespace)
    assert not tripwire.exists()
    found = dc.load(copy, lockstep=True, trusted_packages=[TRIPWIRE])(*original[1])
    assert type(found).__name__ == "Record" and tripwire.exists()
    edit(copy, {"output": record(f"{TRIPWIRE}:Record", "other")})
    with pytest.raises(BundleError, match="Record does not fit the plan"):
        dc.load(copy, lockstep=True, trusted_packages=[TRIPWIRE])


def test_the_known_output_classes_are_there() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    known = "diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput"
    assert known in OUTPUT_CLASSES
    assert type(rebuild_output(record(known), [torch.zeros(1)])).__name__ == "UNet2DConditionOutput"
    with pytest.raises(BundleError, match="does not fit the plan"):
        check_classes(record(known, "no_such_field"))


@dataclasses.dataclass
class Result:
    sample: Tensor


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Result:
        return Result(self.conv(sample))


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    """Simulated it is itself, as its package is there; out of a bundle its fields are."""
    x = torch.randn(1, 4, 8, 4)
    program = dc.convert(Own().eval(), (x,), ranks=2)
    assert type(program.simulate(x)) is Result
    program.save(tmp_path / "b", backend="eager")
    found = dc.load(tmp_path / "b", lockstep=True)(x)
    assert isinstance(found, OutputNamespace) and torch.equal(found.sample, found[0])
    assert type(dc.load(tmp_path / "b", lockstep=True, trusted_packages=[__name__])(x)) is Result


@pytest.mark.parametrize(
    "command", [["verify"], pytest.param(["verify", "--quality"], marks=pytest.mark.slow), ["run", "--prompt", "x"]]
)
@pytest.mark.parametrize("source", ["os:abort", f"{TRIPWIRE}:Record"])
def test_a_factory_is_called_on_the_users_word_alone(
    copy: Path, tripwire: Path, command: list[str], source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, manifest={"source": source})
    assert main.main([command[0], str(copy), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert ("is not a diffusers pipeline" if command[0] == "run" else f"give --model {source}") in error
    assert not tripwire.exists()


def test_verify_with_a_factory_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import test_bundle_trust, torch\ndef make():\n    torch.manual_seed(0)\n"
    code += "    return test_bundle_trust.Own().eval(), (torch.randn(1, 4, 8, 4),), {}\n"
    (tmp_path / "own_factory.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = str(tmp_path / "b")
    assert main.main(["convert", "own_factory:make", "--backend", "eager", "--out", folder]) == 0
    assert main.main(["verify", folder]) == 2
    capsys.readouterr()
    assert main.main(["verify", folder, "--model", "own_factory:make"]) == 0
    assert "within the tolerance" in capsys.readouterr().out


def graph(*nodes: Any, inputs: Any = (("float32", [2, 3]),), outputs: Any = ("%1",)) -> str:
    return json.dumps({"inputs": inputs, "nodes": nodes, "outputs": outputs})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (["aten.from_file.default", [{"str": "/etc/passwd"}], {}], "does not know or does not allow"),
        (["os.system", [{"str": "true"}], {}], "does not know or does not allow"),
        (["aten.__class__.default", ["%0"], {}], "does not know or does not allow"),
        (["aten.add.Tensor", ["%0", "%0"], {"alpha=print(1)": 1}], "no argument 'alpha=print"),
        (["operator.add", ["%0", "%0"], {"x": 1}], "no argument 'x'"),
        (["aten.add_.Tensor", ["%0", "%0"], {}], "writes to its arguments"),
        (["aten.add.Tensor", ["%0", {"layout": "os"}], {}], "not a graph of this version"),
        (["aten.sum.default", ["%0"], {"dtype": {"dtype": "nn"}}], "unknown dtype"),
        (["aten.full.default", [[1 << 31, 1 << 20], 0.0], {}], "more than this machine's memory"),
        (["aten.repeat.default", ["%0", [1 << 40, 1]], {}], "more than this machine's memory"),
        (["aten.view.default", ["%0", [5]], {}], "cannot be computed"),
        (["aten.mm.default", ["%0", "%0"], {}], "cannot be computed"),
        (["aten.unbind.int", ["%0"], {}], "gives a list, not a tensor"),
        (["operator.pow", [3, 10**9], {}], "to the power of"),
        (["operator.mul", [{"str": "x"}, 10**9], {}], "gives mul a str"),
        (["operator.add", [10**30, 1], {}], "more than 64 bits"),
    ],
)  # fmt: skip
def test_what_a_graph_may_not_hold(node: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        output_specs(graph_from_json(graph(node)))
    assert "\n" not in str(caught.value) and capfd.readouterr().out == ""


def test_many_parts() -> None:
    wide = graph(["aten.unbind.int", ["%0"], {}], inputs=[["uint8", [1 << 30]]])
    with pytest.raises(BackendError, match="more than 65536 parts"):
        output_specs(graph_from_json(wide))


def test_names_of_arguments_are_no_source(tmp_path: Path) -> None:
    """A graph becomes Python source when it is read."""
    trap = f"alpha=__import__('pathlib').Path({str(tmp_path / 'fired')!r}).touch() or 1, out"
    with pytest.raises(BackendError):
        graph_from_json(graph(["aten.add.Tensor", ["%0", "%0"], {trap: None}]))(torch.zeros(2, 3))
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("name", ["plan.json", "weights.safetensors", "engines"])
def test_links_to_outside_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link to outside of the bundle"):
        Bundle.open(copy, verify=False)


def test_a_link_to_the_whole_bundle_is_none_of_its_own(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    Bundle.open(tmp_path / "link")


@pytest.mark.parametrize("name", ["a\0b", "C:\\x", "engines//x", "./x", "a b", "engines/.hidden", "\n", "-x", "é"])
def test_odd_file_names_are_refused(copy: Path, name: str) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    edit(copy, manifest={"files": {**files, name: {"size": 0, "sha256": "0" * 64}}})
    with pytest.raises(BundleError, match="lists the file .* do not use this bundle"):
        Bundle.open(copy)


def test_an_engine_that_no_hash_covers_is_refused(copy: Path) -> None:
    (copy / "engines" / "0123.pt2").touch()
    with pytest.raises(BundleError, match=r"0123\.pt2 is not listed in manifest\.json"):
        Bundle.open(copy)


def test_the_manifest_has_a_hash_of_its_own(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"backend": "eager"', '"backend": "onnxruntime"'))
    with pytest.raises(BundleError, match="its hash is not the one it holds"):
        Bundle.open(copy, verify="quick")
    (copy / "manifest.json").write_text(json.dumps(json.loads(text), sort_keys=True))  # white space and order are free
    Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": 3}, "backend: "),
        ({"device": "meta"}, "device: "),
        ({"mesh": {"cfg": 2, "patch": 2}}, "its plan is for"),
        ({"config": {"__class__": "x"}}, "config"),
        ({"source": 5}, "source: "),
        ({"files": []}, "does not list the bundle's files"),
        ({"refits": [3]}, "refits"),
    ],
)
def test_the_manifest_has_a_schema(
    copy: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, manifest=change)
    assert main.main(["inspect", str(copy)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_native_code() -> None:
    assert [b for b in (EagerBackend, OnnxRuntimeBackend) if b.native_code] == []
    assert InductorBackend("cpu").native_code and TensorRTBackend.native_code


@pytest.mark.parametrize(
    "command", [["verify", "--model", "demo"], pytest.param(["bench"], marks=pytest.mark.slow), ["run"]]
)
def test_native_code_is_refused_on_request(copy: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, manifest={"backend": "inductor"})
    assert main.main([command[0], str(copy), *command[1:], "--no-native-code"]) == 2
    assert "machine code, made by the inductor backend" in capsys.readouterr().err
    with pytest.raises(BundleError, match="machine code, made by the inductor backend"):
        dc.load(copy, lockstep=True, native_code=False)
    edit(copy, manifest={"backend": "eager"})
    assert dc.load(copy, lockstep=True, native_code=False) is not None


@pytest.mark.parametrize("location", ["../secret", "plan.json", "/etc/passwd"])
def test_an_onnx_file_reads_no_file_but_the_weights(tmp_path: Path, location: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x = torch.randn(1, 4, 8, 4)
    folder = tmp_path / "b"
    dc.convert(Own().eval(), (x,), ranks=2).save(folder, backend="onnxruntime")
    (tmp_path / "secret").write_bytes(os.urandom(1 << 16))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in (folder / "engines").iterdir():
        model = onnx.ModelProto.FromString(path.read_bytes())
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())
        manifest["files"][f"engines/{path.name}"]["size"] = path.stat().st_size
    (folder / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(dc.Error, match=f"in {re.escape(location)}, not weights"):
        dc.load(folder, lockstep=True, verify="quick")
