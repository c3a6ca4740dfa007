"""TensorRT without a GPU: which flavour, which targets, what its errors tell; and the API that is used, in both
flavours' bindings."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.backends.tensorrt import TensorRTBackend, library
from districompile.backends.tensorrt.library import OPTIONAL, Library, find_library, format_errors, parse_targets
from districompile.cli.main import main
from districompile.errors import BackendError

ROOT = Path(__file__).resolve().parents[3]
V8_SOURCE = ROOT / "districompile/backends/tensorrt/v8.py"
SOURCES = sorted(p for p in (ROOT / "districompile/backends/tensorrt").glob("*.py") if p != V8_SOURCE)


class _Capabilities:
    __members__ = dict.fromkeys(["NONE", "CURRENT", "SM75", "SM80", "SM89", "SM120"])


def fake(flavour: str, **parts: Any) -> Library:
    module = types.SimpleNamespace(__version__="1.0", INetworkDefinition=object(), **parts)
    return Library(flavour, module)  # type: ignore[arg-type]


RTX = fake("tensorrt_rtx", ComputeCapability=_Capabilities)
DATACENTRE = fake("tensorrt")


def test_targets_ahead_of_time() -> None:
    assert RTX.ahead_of_time == ("sm75", "sm80", "sm89", "sm120")
    assert parse_targets("sm89", RTX, None) == ("sm89",)
    assert parse_targets(" SM80, sm120,sm80", RTX, None) == ("sm80", "sm120")
    assert parse_targets(None, RTX, None) == ("sm89", "sm120")  # not Turing, nor what no support matrix lists
    assert parse_targets(None, RTX, "sm89") == ("sm89",)
    assert parse_targets(None, RTX, "sm90") == ("sm89", "sm120")
    assert parse_targets(None, RTX, "sm80") == parse_targets("sm80", RTX, None) == ("sm80",)  # where it is asked for
    accepted = "for sm75, sm89, sm120 without a GPU (sm80: accepted by the builder, but in no support matrix)"
    assert RTX.describe_targets() == accepted and DATACENTRE.describe_targets() == "for the GPU of this machine"
    assert parse_targets("current", RTX, "sm120") == ("sm120",)
    assert parse_targets(None, DATACENTRE, "sm90") == ("sm90",)
    assert parse_targets("sm90", DATACENTRE, "sm90") == ("sm90",)


@pytest.mark.parametrize(
    "text, flavour, gpu, message",
    [
        ("current", RTX, None, "there is no GPU here: give target=sm75"),
        (
            "current",
            RTX,
            "sm90",
            "does not run on this GPU .sm90.*--backend inductor, or install the package `tensorrt`",
        ),
        (
            "sm90",
            RTX,
            None,
            "cannot build for it .*it builds for sm75, sm89, sm120 without a GPU .sm80: accepted.*flavour=tensorrt,",
        ),
        ("sm100", RTX, "sm89", "the GPU here is sm89"),
        ("ampere", RTX, None, "target=ampere: give current, or a kind of GPU"),
        (",", RTX, None, "target is empty"),
        (None, DATACENTRE, None, "no GPU here: convert on a machine with the GPU, or install tensorrt_rtx"),
        ("sm120", DATACENTRE, "sm90", "builds for the GPU of this machine.*flavour=tensorrt_rtx"),
    ],
)
def test_targets_that_cannot_be_had(text: str | None, flavour: Library, gpu: str | None, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        parse_targets(text, flavour, gpu)


def test_error_on_hopper_names_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tensorrt_rtx has no SM90: one line, naming both ways out."""
    monkeypatch.setattr(library, "_load", {"tensorrt": "not installed", "tensorrt_rtx": RTX}.__getitem__)
    monkeypatch.setattr("districompile.backends.tensorrt.backend.present_gpu", lambda device=None: "sm90")
    backend = TensorRTBackend()
    with pytest.raises(BackendError) as failure:
        backend.load(tmp_path / "x.engine", (), None, torch.device("cuda", 0))  # type: ignore[arg-type]
    assert str(failure.value).count("\n") == 0
    for part in ("tensorrt_rtx 1.0 does not run on this GPU (sm90", "--backend inductor", "`tensorrt`"):
        assert part in str(failure.value)
    monkeypatch.setattr("districompile.cli.commands.doctor.present_gpu", lambda: "sm90")
    monkeypatch.setattr("districompile.cli.commands.doctor.installed", lambda: {"tensorrt_rtx": RTX})
    from districompile.cli.commands.doctor import gather

    (line,) = gather()["tensorrt"]
    assert "builds for sm75, sm89, sm120 without a GPU (sm80: accepted by the builder" in line
    assert "--backend inductor" in line


def test_which_flavour_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", {"tensorrt": DATACENTRE, "tensorrt_rtx": RTX}.__getitem__)
    assert find_library(None, None) is RTX  # it alone builds without a GPU
    assert find_library(None, "sm89") is DATACENTRE
    assert find_library(None, "sm90") is DATACENTRE
    assert find_library("tensorrt_rtx", "sm90") is RTX
    monkeypatch.setattr(library, "_load", {"tensorrt": "no libraries", "tensorrt_rtx": RTX}.__getitem__)
    assert find_library(None, "sm89") is RTX
    with pytest.raises(BackendError, match="no libraries"):
        find_library("tensorrt", None)
    with pytest.raises(BackendError, match="flavour=trt: give one of tensorrt, tensorrt_rtx"):
        find_library("trt", None)


def test_a_package_without_its_libraries_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Type stubs alone make an importable, empty package of that name."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    library._load.cache_clear()
    try:
        found = library._load("tensorrt")
        assert isinstance(found, str) and "its libraries are missing" in found
    finally:
        library._load.cache_clear()
        sys.modules.pop("tensorrt", None)


def test_errors_name_the_operator_and_its_line() -> None:
    sources = {"conv2d_3": " at net.py:12"}
    text = format_errors(["In node 4 with name: conv2d_3/Conv_17 and operator: Conv\n (importConv): bad"], sources)
    assert (
        text
        == "In node 4 with name: conv2d_3/Conv_17 and operator: Conv (importConv): bad (operator conv2d_3 at net.py:12)"
    )
    assert format_errors([]) == "it gave no reason"
    assert format_errors(["x" * 1000]).endswith("...")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "trt"}, "flavour=trt: give one of tensorrt, tensorrt_rtx"),
        ({"weights": "shared"}, "weights=shared: give one of bound, refit, inside"),
        ({"target": "sm89, ampere"}, "target=ampere: give current, or a kind of GPU such as sm89"),
        ({"target": " "}, "target is empty"),
    ],
)
def test_malformed_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=f"^{message}"):
        TensorRTBackend(**options)


def test_every_option_has_a_line_of_help() -> None:
    parameters = [*inspect.signature(TensorRTBackend.__init__).parameters.values()][1:]
    assert [p.name for p in parameters] == list(TensorRTBackend.OPTION_HELP)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in parameters)
    assert all("(default: " in line and "\n" not in line for line in TensorRTBackend.OPTION_HELP.values())


def test_options_of_tensorrt_go_with_tensorrt(capsys: Any, tmp_path: Path) -> None:
    assert main(["convert", "demo", "-o", "target=sm89", "--out", str(tmp_path / "b")]) == 2
    assert "the backend onnxruntime has no option target" in capsys.readouterr().err


def test_no_engine_runs_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="runs on an NVIDIA GPU, not on cpu.*verify BUNDLE --backend onnxruntime"):
        TensorRTBackend().load(tmp_path / "x.engine", (), None, torch.device("cpu"))  # type: ignore[arg-type]


# The API

ROOTS = {  # a name in the sources -> the class of what it holds
    "trt": None, "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "config": "IBuilderConfig", "engine": "ICudaEngine", "context": "IExecutionContext", "runtime": "Runtime",
    "refitter": "Refitter", "layer": "ILayer", "tensor": "ITensor", "error": "ParserError",
}  # fmt: skip
OURS = {("engine", "use_scratch"), ("engine", "capturable"), ("engine", "binds_outputs")}


def used(sources: Sequence[Path] = SOURCES) -> Iterator[tuple[str, str]]:
    """(root, attribute) of everything that is asked of TensorRT's objects, and the members of its enumerations."""
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            holder = node.value
            if isinstance(holder, ast.Attribute) and holder.attr == "context":
                yield "context", node.attr
            elif isinstance(holder, ast.Name) and holder.id in ROOTS and (holder.id, node.attr) not in OURS:
                if holder.id != "tensor" or path.name == "collectives.py":  # elsewhere a tensor is torch's, or a name
                    yield holder.id, node.attr
            elif isinstance(holder, ast.Attribute) and isinstance(holder.value, ast.Name) and holder.value.id == "trt":
                yield f"trt.{holder.attr}", node.attr


def test_the_sources_are_looked_through() -> None:
    found = set(used())
    for pair in (
        ("network", "unmark_output"), ("parser", "parse_from_file"), ("context", "execute_async_v3"),
        ("context", "set_tensor_address"), ("trt", "OnnxParserRefitter"), ("trt.BuilderFlag", "STRIP_PLAN"),
    ):  # fmt: skip
        assert pair in found


def test_every_attribute_exists_in_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    others = {"parser": ("OnnxParserRefitter",), "layer": ("IDistCollectiveLayer",)}
    for root, name in sorted(set(used())):
        if root.startswith("trt."):
            assert hasattr(getattr(trt, root.removeprefix("trt.")), name), f"{root}.{name}"
        elif root == "trt":
            assert hasattr(trt, name), name
        else:
            classes = [str(ROOTS[root]), *others.get(root, ())]
            assert any(hasattr(getattr(trt, c), name) for c in classes), f"{root}.{name}"


@pytest.mark.parametrize("folder", ["bindings-10", "bindings-11"])
def test_every_attribute_exists_in_tensorrt(folder: str) -> None:
    """Its bindings cannot be imported without its libraries; the names they define are in the file."""
    files = list((ROOT / "build" / folder).rglob("tensorrt.so"))
    if not files:
        pytest.skip(f"build/{folder} is not there: `python tools/check.py types` brings the bindings")
    data = files[0].read_bytes()
    assert b"no_such_attribute\0" not in data
    names = {name for _, name in used()} - set(OPTIONAL) - {"__version__"}
    assert len(names) > 40
    missing = [n for n in sorted(names) if f"{n}\0".encode() not in data]
    assert not missing, missing
    if folder == "bindings-11":
        assert b"add_dist_collective\0" in data and b"set_communicator\0" in data


NEWER = {  # asked for where the library is not version 8.6
    "STRONGLY_TYPED", "OnnxParserRefitter", "refit_from_file", "STRIP_PLAN", "ExecutionContextAllocationStrategy",
    "USER_MANAGED", "device_memory_size_v2", "set_device_memory", "node_name", "node_operator",
}  # fmt: skip


def test_every_attribute_exists_in_tensorrt_8() -> None:
    files = list((ROOT / "build/bindings-8").rglob("tensorrt.so"))
    if not files:
        pytest.skip("build/bindings-8 is not there: `python tools/check.py types` brings the bindings")
    data = files[0].read_bytes()
    names = (
        {n for _, n in used([V8_SOURCE, *(p for p in SOURCES if p.name != "collectives.py")])}
        - set(OPTIONAL)
        - NEWER
        - {"__version__"}
    )
    assert {"EXPLICIT_BATCH", "set_tactic_sources", "create_execution_context_without_device_memory"} <= names
    missing = [n for n in sorted(names) if f"{n}\0".encode() not in data]
    assert not missing, missing


def test_optional_attributes_are_asked_for_by_name() -> None:
    with pytest.raises(KeyError):
        library.optional(object(), "execute_async_v3")
    direct = {name for root, name in used() if root != "trt"} & set(OPTIONAL)
    assert not direct, f"not every flavour has {direct}"
