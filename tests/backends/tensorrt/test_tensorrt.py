"""Engines of real networks by the real builder, without a GPU; and the ONNX files they are built from, by ONNX Runtime.

Every kind of network is built in every precision, for SM80, SM89 and SM120, for two and for three (uneven) ranks, with
its exact phase cut at every collective and as one engine that holds them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import districompile as dc
from districompile.backends.onnx.proto import WEIGHT
from districompile.backends.onnxruntime import OnnxRuntimeBackend
from districompile.backends.registry import get_backend
from districompile.backends.tensorrt import TensorRTBackend
from districompile.bundle.bundle import Bundle
from districompile.bundle.weights import WeightFile
from districompile.cli.main import main
from districompile.errors import BackendError
from districompile.ir.segment import SegmentGraph
from districompile.plan.plan import Run, SliceInput
from districompile.runtime.calls.inputs import InputChecker
from districompile.testing import make_segment, write_weights
from tests.helpers_net import make_program
from tests.reference.executor import slice_rows
from tests.small_models import MODELS, first, relative_error

pytest.importorskip("onnxscript")
pytest.importorskip("tensorrt_rtx", reason="the package tensorrt_rtx is not installed: no engine can be built here")

CPU = torch.device("cpu")
TARGETS = ("sm80", "sm89", "sm120")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
# Networks alike in their operators; each kind meets every precision, 2 and 3 ranks, both places and every GPU
KINDS = {
    "stable diffusion": ("sd15", "sdxl", "refiner"),
    "unet2d": ("unet2d",),
    "vae_decoder": ("vae_decoder",),
}
# network, precision, ranks, where collectives are, GPUs built for (building takes the time: one case is for all)
CASES = [
    ("sd15", "fp32", 3, "inside", ("sm80",)),
    ("sdxl", "fp16", 2, "between", ("sm89",)),
    ("refiner", "bf16", 2, "inside", ("sm120",)),
    ("unet2d", "fp32", 2, "between", TARGETS),
    ("unet2d", "fp16", 3, "inside", ("sm89",)),
    ("unet2d", "bf16", 2, "inside", ("sm120",)),
    ("vae_decoder", "fp32", 3, "inside", ("sm80",)),
    ("vae_decoder", "fp16", 2, "between", ("sm89",)),
    ("vae_decoder", "bf16", 3, "between", ("sm120",)),
]


def backend(target: str = ",".join(TARGETS), **options: Any) -> TensorRTBackend:
    return TensorRTBackend(flavour="tensorrt_rtx", target=target, **options)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if value.is_floating_point() and value.ndim else value


def converted(name: str, dtype: torch.dtype, ranks: int) -> tuple[dc.Program, dict[str, Any]]:
    rows = 4 if name == "vae_decoder" else 12
    module, kwargs = MODELS[name](1, rows, 8)
    kwargs = cast(kwargs, dtype)
    return dc.convert(module.to(dtype), kwargs=kwargs, ranks=ranks), kwargs


def check_engines(path: Path) -> Bundle:
    """Every segment of every rank has an engine of TensorRT's and the ONNX file it was built from."""
    bundle = Bundle.open(path)  # checks all hashes
    assert bundle.manifest["backend"] == "tensorrt" and bundle.manifest["device"] == "cuda"
    for phase in bundle.plan.phases.values():
        runs = {s.segment for s in phase.steps if isinstance(s, Run)}
        assert runs == set(phase.segments)
        for segment in phase.segments.values():
            assert len(segment.engines) == bundle.plan.ranks
            for file in segment.engines:
                assert re.fullmatch(r"[0-9a-f]+\.engine", file)
                assert bundle.engine_path(file).stat().st_size > 2000
                assert f"engines/{Path(file).stem}.onnx" in bundle.manifest["files"]
    return bundle


def test_cases_cover_what_they_should() -> None:
    assert {name for name, *_ in CASES} == {name for names in KINDS.values() for name in names}
    for names in KINDS.values():
        cases = [case for case in CASES if case[0] in names]
        assert {dtype for _, dtype, _, _, _ in cases} == set(DTYPES)
        assert {ranks for _, _, ranks, _, _ in cases} == {2, 3}
        assert {where for _, _, _, where, _ in cases} == {"between", "inside"}
        assert {target for *_, targets in cases for target in targets} == {*TARGETS}
    assert TARGETS in [targets for *_, targets in CASES]


ALWAYS = ("vae_decoder", "fp16")  # takes the least; the others are slow


@pytest.mark.parametrize(
    "name, dtype, ranks, where, targets",
    [pytest.param(*case, marks=[] if case[:2] == ALWAYS else pytest.mark.slow) for case in CASES],
    ids=lambda v: str(v),
)
def test_engines_of_a_network(
    name: str, dtype: str, ranks: int, where: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    program, kwargs = converted(name, DTYPES[dtype], ranks)
    program.save(tmp_path / "b", backend=backend(",".join(targets)), collectives=where)
    bundle = check_engines(tmp_path / "b")
    assert bundle.manifest["engines"]["targets"] == list(targets)
    assert bundle.manifest["engines"]["weights"] == "bound"
    assert (len(bundle.plan.phases["exact"].segments) == 1) == (where == "inside")
    if dtype == "bf16":
        return  # ONNX Runtime has no kernels for it on a CPU
    want = program.simulate(**kwargs)
    if where == "between":
        unet = dc.load(tmp_path / "b", lockstep=True, device="cpu", backend=OnnxRuntimeBackend())
        with unet.exact():
            got = first(unet(**kwargs))
        assert relative_error(got, first(want)) <= TOLERANCES[dtype]
        if "timestep" not in kwargs:  # no sampler steps to follow: every call is exact
            return
        moved = {**kwargs, "sample": kwargs["sample"] * 1.1, "timestep": kwargs["timestep"] - 1}
        unet.phase = "displaced"
        displaced = first(unet(**moved))
        assert relative_error(displaced, first(program.simulate(phase="displaced", **moved))) <= TOLERANCES[dtype]
    else:
        for got in run_joined_files(bundle, kwargs):
            assert relative_error(got, first(want)) <= TOLERANCES[dtype]


def run_joined_files(bundle: Bundle, kwargs: dict[str, Any]) -> Sequence[Tensor]:
    """The exact phase from ONNX files whose collectives are cut ends, by ONNX Runtime: what each rank sends is handed
    round until nothing changes any more, which is the case after as many rounds as there are gathers in a row."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    plan, weights = bundle.plan, WeightFile.open(bundle.weights_path)
    (segment,) = plan.phases["exact"].segments.values()
    call = InputChecker(plan, CPU)((), kwargs)
    sessions: list[Any] = []
    feeds: list[dict[str, Any]] = []
    for rank in range(plan.ranks):
        values = {i.value: call.tensors[i.path] for i in plan.inputs}
        for step in plan.phases["exact"].steps:
            if isinstance(step, SliceInput):
                values[step.value] = slice_rows(step, values[step.source], rank)
        session = onnxruntime.InferenceSession(
            bundle.engine_path(segment.engines[rank], ".onnx").read_bytes(), providers=["CPUExecutionProvider"]
        )
        feed = {}
        for given in session.get_inputs():
            if given.name.startswith(WEIGHT):
                feed[given.name] = weights.tensor(given.name.removeprefix(WEIGHT)).numpy()
            elif given.name.endswith(".received"):
                kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[given.type]
                feed[given.name] = np.zeros(given.shape, kind)
            else:
                feed[given.name] = values[given.name].numpy()
        sessions.append(session)
        feeds.append(feed)
    pairs = [(n, n.removesuffix(".received") + ".sent") for n in feeds[0] if n.endswith(".received")]
    assert pairs
    names = [plan.phases["exact"].outputs[0], *(sent for _, sent in pairs)]
    for _ in range(len(pairs) + 1):
        results = [dict(zip(names, s.run(names, f), strict=True)) for s, f in zip(sessions, feeds, strict=True)]
        changed = False
        for received, sent in pairs:
            for rank, feed in enumerate(feeds):
                parts = [r[sent] for r in results]
                if parts[0].size == feed[received].size:  # an all-to-all: each rank takes its block of each
                    parts = [part.reshape(plan.ranks, -1)[rank] for part in parts]
                together = np.concatenate(parts)
                changed |= not np.array_equal(together, feed[received])
                feed[received] = together
        if not changed:
            break
    assert not changed
    return [torch.from_numpy(r[names[0]]) for r in results]


@pytest.mark.slow
def test_demo_through_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """Convert, then verify what the engines were built from, as a user without a GPU does."""
    out = str(tmp_path / "b")
    options = ["--backend", "tensorrt", "-o", "flavour=tensorrt_rtx", "-o", "target=sm89"]
    assert main(["convert", "demo", "--gpus", "2", "--height", "64", "--width", "64", *options, "--out", out]) == 0
    check_engines(tmp_path / "b")
    assert main(["verify", out, "--backend", "onnxruntime", "--no-drift", "--json"]) == 0
    capsys.readouterr()
    if not torch.cuda.is_available():
        assert main(["run", out, "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 2
        assert "there is none here" in capsys.readouterr().err


def test_the_same_onnx_file_for_both(tmp_path: Path) -> None:
    """With weights in place, TensorRT reads the very file that the onnxruntime backend writes and checks."""
    program = make_program(2)
    program.save(tmp_path / "ort", backend="onnxruntime")
    program.save(tmp_path / "trt", backend=backend("sm89", weights="inside"))

    def hashes(folder: Path) -> set[str]:
        return {hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "engines").glob("*.onnx")}

    assert hashes(tmp_path / "ort") == hashes(tmp_path / "trt")
    engines = list((tmp_path / "trt" / "engines").glob("*.engine"))
    assert len(engines) == len(hashes(tmp_path / "trt"))


@pytest.mark.parametrize("target", ["sm75", *TARGETS])
def test_one_target_each(target: str, tmp_path: Path) -> None:
    def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.conv2d(x, w, b, padding=1))

    half = [torch.randn(s).half() for s in ((1, 8, 8, 8), (8, 8, 3, 3), (8,))]
    segment = make_segment(block, {"x": half[0]}, {"w": half[1], "b": half[2]})
    weights = write_weights(tmp_path / "weights.safetensors", {"w": half[1], "b": half[2]})
    for mode in ("bound", "inside"):
        backend(target, weights=mode).build(segment, weights, tmp_path / f"{mode}.engine")
        assert (tmp_path / f"{mode}.engine").stat().st_size > 2000
    assert not list(tmp_path.glob(".*"))


def test_equal_segments_and_other_targets(tmp_path: Path) -> None:
    """An engine's name changes with the target, so that bundles cannot be mixed up; equal ranks share engines."""
    program = make_program(2)
    program.save(tmp_path / "a", backend=backend("sm89"))
    plan = Bundle.open(tmp_path / "a").plan
    assert all(len(set(s.engines)) == 1 for p in plan.phases.values() for s in p.segments.values())
    from districompile.backends.build import segment_hash

    (_, segment), *_ = program.segments("displaced")
    assert segment_hash(backend("sm89"), segment) != segment_hash(backend("sm120"), segment)


def test_what_tensorrt_refuses_names_the_operator_and_its_line(tmp_path: Path) -> None:
    """Before anything is built where that is possible."""

    def net(x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real  # no ONNX operator that TensorRT has

    def wide(x: Tensor) -> Tensor:
        return x.double() * 2

    chosen = backend("sm89")
    segment = make_segment(net, {"x": torch.randn(1, 2, 8, 8)})
    reasons = chosen.unsupported_ops(segment)
    if not reasons:  # translated: then the parser is asked
        with pytest.raises(BackendError, match="cannot read .*tensorrt_rtx|tensorrt_rtx cannot"):
            chosen.build(segment, write_weights(tmp_path / "weights.safetensors", {}), tmp_path / "x.engine")
    assert "float64" in chosen.unsupported_ops(make_segment(wide, {"x": torch.randn(4)}))[0]


def test_parser_errors_reach_the_user(tmp_path: Path) -> None:
    import onnx

    chosen = backend("sm89")

    def net(x: Tensor) -> Tensor:
        return torch.relu(x)

    segment: SegmentGraph = make_segment(net, {"x": torch.randn(4)})

    class Broken:
        def model(self, segment: SegmentGraph, weights: Any) -> onnx.ModelProto:
            model = TensorRTBackend(flavour="tensorrt_rtx").translator.model(segment, None)
            model.graph.node[0].op_type = "NoSuchOperator"
            return model

    chosen.translator = Broken()  # type: ignore[assignment]
    weights = write_weights(tmp_path / "weights.safetensors", {})
    with pytest.raises(BackendError) as failure:
        chosen.build(segment, weights, tmp_path / "x.engine")
    text = str(failure.value)
    assert "NoSuchOperator" in text and "operator relu at " in text and "testing.py:" in text
    assert not (tmp_path / "x.engine").exists()


def test_backend_is_known() -> None:
    assert get_backend("tensorrt", flavour="tensorrt_rtx").name == "tensorrt"
