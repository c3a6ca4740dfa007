from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from districompile.backends.build import build_segments
from districompile.backends.eager import EagerBackend
from districompile.backends.onnxruntime import OnnxRuntimeBackend
from districompile.backends.registry import get_backend
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, BundleError, InputError
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.testing import make_segment, write_weights
from tests.helpers_segments import error, run_segment, spec

CPU = torch.device("cpu")
Function = Callable[..., Any]


@pytest.fixture(scope="module")
def onnx() -> OnnxRuntimeBackend:
    """One backend for all tests, and all that they need translated together, as in a conversion."""
    backend = OnnxRuntimeBackend()
    cases = [*CASES.values(), *((f, inputs, []) for f, inputs in COMPOSITES.values())]
    cases += [(norm_of_pieces, [rand(1, 8, 8, 6)], [rand(8)])]
    halves = [CASES[name] for name in HALF]
    cases += [(f, [t.half() for t in inputs], [t.half() for t in weights]) for f, inputs, weights in halves]
    backend.prepare([named_segment(*case)[0] for case in cases])
    assert backend.translator.exports == 1
    return backend


_SEGMENTS: dict[Any, SegmentGraph] = {}


def named_segment(
    function: Function, args: list[Tensor], weights: list[Tensor]
) -> tuple[SegmentGraph, dict[str, Tensor], dict[str, Tensor]]:
    inputs = {f"x.{i}": t for i, t in enumerate(args)}
    named = {f"w.{i}": t for i, t in enumerate(weights)}
    key = (function, *(spec(t) for t in (*args, *weights)))
    if key not in _SEGMENTS:
        _SEGMENTS[key] = make_segment(function, inputs, named)
    return _SEGMENTS[key], inputs, named


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def block(x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:], norm, norm)
    q, k, v = (F.linear(h, w).view(x.shape[0], -1, 2, 4).transpose(1, 2) for w in (wq, wk, wv))
    y = F.scaled_dot_product_attention(q, k, v)
    return F.linear(y.transpose(1, 2).reshape(x.shape), wq, bias) + x


def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.conv2d(x, w, b, padding=(0, 1))) + 1


CASES: dict[str, tuple[Function, list[Tensor], list[Tensor]]] = {
    "block": (block, [rand(2, 6, 8)], [rand(8), rand(8, 8), rand(8, 8), rand(8, 8), rand(8)]),
    "conv": (conv, [rand(1, 4, 6, 5)], [rand(8, 4, 3, 3), rand(8)]),
    "group norm": (lambda x, w: F.group_norm(x, 2, w, w, 1e-6), [rand(2, 4, 3, 5)], [rand(4)]),
    "masked attention": (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, m, scale=0.3), [rand(1, 2, 5, 4), rand(1, 2, 5, 5)], []
    ),
    "attention to one tensor": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k), [rand(2, 5, 4), rand(2, 3, 4)], []
    ),
    "causal attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), [rand(1, 2, 5, 4)], []),
    "split": (lambda x: [c * i for i, c in enumerate(x.chunk(2, -1))][::-1], [rand(2, 6)], []),
    "uneven split": (lambda x: torch.split(x, [1, 4, 2], 1)[1:], [rand(2, 7)], []),
    "geglu": (lambda x, w: F.linear(x, w).chunk(2, -1)[0] * F.gelu(F.linear(x, w).chunk(2, -1)[1]), [rand(1, 3, 4)],
              [rand(8, 4)]),
    "flat linear": (lambda x, w, b: F.linear(x, w, b), [rand(3, 4)], [rand(2, 4), rand(2)]),
    "one-dimensional linear": (lambda x, w, b: F.linear(x, w, b), [rand(4)], [rand(2, 4), rand(2)]),
    "timesteps": (
        lambda t: torch.cat([(t.float()[:, None] * torch.exp(-torch.arange(4) / 4.0)).sin(), t[:, None].float()], 1),
        [torch.tensor([7, 500])], [],
    ),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), [rand(1, 2, 3, 4)], []),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), [rand(1, 2, 3, 4)], []),
    "input as output, twice": (lambda x, w: (x, w, x, x + 1), [rand(3)], [rand(2)]),
    "same output twice": (lambda x: (x * 2,) * 2, [rand(3)], []),
    "unused input": (lambda x, y: x * 2, [rand(3), rand(1)], []),
    "constant output": (lambda x: (torch.zeros(2, 3), torch.arange(3) * 2, x + 1), [rand(3)], []),
    "conditions": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), [rand(3, 3)], []),
    "sums and maxima": (
        lambda x: (x.sum((1, 2)), x.amax(1, keepdim=True), x.amin(-1), x.mean(1), x.sum()), [rand(2, 4, 3)], []
    ),
    "scalar weight": (lambda x, w: x * w, [rand(3, 3)], [torch.tensor(2.5)]),
    "integers": (lambda x, w: F.embedding(x, w), [torch.tensor([[1, 0, 2]])], [rand(3, 4)]),
}  # fmt: skip


def check(backend: OnnxRuntimeBackend, function: Function, args: list[Tensor], weights: list[Tensor], folder: Path,
          tolerance: float = 1e-5) -> dict[str, Tensor]:  # fmt: skip
    segment, inputs, named = named_segment(function, args, weights)
    expected = run_segment(EagerBackend(), segment, inputs, named, folder)
    result = run_segment(backend, segment, inputs, named, folder)
    direct = function(*args, *weights)
    for i, want in enumerate(direct if isinstance(direct, tuple | list) else [direct]):
        assert torch.equal(expected[f"y{i}"], want)
        assert error(result[f"y{i}"], want) <= tolerance
    return result


@pytest.mark.parametrize("case", CASES)
def test_backends_agree(case: str, onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(onnx, *CASES[case], tmp_path)


HALF = ["block", "conv", "group norm", "geglu", "sums and maxima"]

COMPOSITES: dict[str, tuple[Function, list[Tensor]]] = {
    "assemble between": (lambda f, x: ops.assemble(f, x, 2, 1, 1, 1, 4), [rand(3, 1, 2, 4), rand(1, 2, 5, 4)]),
    "assemble first": (lambda f, x: ops.assemble(f, x, 1, 0, 2, 0, 2), [rand(3, 1, 4), rand(1, 2, 4)]),
    "assemble alone": (lambda f, x: ops.assemble(f, x, 1, 0, 0, 1, 2), [rand(0, 1, 4), rand(1, 2, 4)]),
    "assemble nothing": (lambda f, x: ops.assemble(f, x, 1, 1, 1, 0, 0), [rand(2, 1, 4), rand(1, 2, 4)]),
    "assemble in place between": (
        lambda f, x: ops.assemble_in_place(f, x, 2, 1, 1, 4),
        [rand(5, 1, 2, 4), rand(1, 2, 5, 4)],
    ),
    "assemble in place first": (lambda f, x: ops.assemble_in_place(f, x, 1, 0, 0, 2), [rand(4, 1, 4), rand(1, 2, 4)]),
    "pick": (lambda x: ops.pick(x, 1, [0, 1, 4, 2]), [rand(1, 5, 4)]),
    "pack_boundary": (lambda x: ops.pack_boundary(x, 2, 1, 2), [rand(1, 2, 6, 3)]),
    "strips that meet": (lambda x: ops.pack_boundary(x, 2, 2, 2), [rand(1, 2, 3, 3)]),
    "moments": (lambda x: ops.moments(x, 2), [rand(2, 4, 5, 3)]),
    "merge even": (lambda p: ops.merge_moments(p, [8.0, 8.0]), [rand(2, 2, 1, 3)]),
    "merge announced": (lambda p: ops.merge_moments(p, [8.0, 24.0]), [rand(2, 4, 1, 3)]),
    "merge uneven": (lambda p: ops.merge_moments(p, [8.0, 24.0]), [rand(2, 2, 1, 3)]),
    "correct": (ops.correct_moments, [rand(2, 1, 3), rand(1, 2, 1, 3), rand(1, 2, 1, 3)]),
    "announce": (ops.announce, [rand(1, 2, 1, 3)]),
    "forecast": (ops.forecast_moments, [rand(1, 2, 1, 3).abs(), rand(1, 4, 1, 3).abs()]),
    "merge forecasts": (
        lambda p, f: ops.merge_forecasts(p, f, [8.0, 24.0]),
        [rand(2, 4, 1, 3).abs(), rand(1, 2, 1, 3).abs()],
    ),
    "normalize": (
        lambda x, s, w, b: ops.normalize(x, s, 2, w, b, 1e-5),
        [rand(1, 4, 3, 2), rand(2, 1, 2).abs(), rand(4), rand(4)],
    ),
    "normalize plain": (lambda x, s: ops.normalize(x, s, 2, None, None, 1e-5), [rand(1, 4, 6), rand(2, 1, 2).abs()]),
}


@pytest.mark.parametrize("case", COMPOSITES)
def test_composites(case: str, onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    check(onnx, COMPOSITES[case][0], COMPOSITES[case][1], [], tmp_path)


def norm_of_pieces(x: Tensor, w: Tensor) -> Tensor:
    parts = torch.cat([ops.moments(x[:, :, :5], 2), ops.moments(x[:, :, 5:], 2)])
    return ops.normalize(x, ops.merge_moments(parts, [5.0, 3.0]), 2, w, w, 1e-5)


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1000.0, 0.1), (3e4, 1.0)])
def test_group_norm_of_pieces_is_exact(mean: float, std: float, onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    """Large means over tiny variances: what squares would cancel."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 8, 6, dtype=torch.float64) * std + mean).float()
    weight = torch.rand(8) + 0.5
    result = check(onnx, norm_of_pieces, [x], [weight], tmp_path, 1e-3 if mean else 1e-5)
    truth = F.group_norm(x.double(), 2, weight.double(), weight.double(), 1e-5).float()
    assert error(result["y0"], truth) < 1e-5 + 1e-7 * mean / std


@pytest.mark.parametrize("case", HALF)
def test_float16(case: str, onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, inputs, weights = CASES[case]
    check(onnx, function, [t.half() for t in inputs], [t.half() for t in weights], tmp_path, 1e-2)


def test_bfloat16_is_refused_with_a_way_out(onnx: OnnxRuntimeBackend) -> None:
    function, inputs, weights = CASES["conv"]
    segment = make_segment(
        function, {"x": inputs[0].bfloat16()}, {f"w{i}": w.bfloat16() for i, w in enumerate(weights)}
    )
    reasons = onnx.unsupported_ops(segment)
    assert any("aten.conv2d.default" in r and "float32" in r and re.search(r"\.py:\d+", r) for r in reasons), reasons
    assert EagerBackend().unsupported_ops(segment) == []


def test_unknown_operator_is_named(onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    segment = make_segment(lambda x: torch.linalg.eigvalsh(x).exp(), {"x": torch.eye(3)})
    (reason,) = onnx.unsupported_ops(segment)
    assert "linalg" in reason and "no ONNX translation" in reason
    weights = write_weights(tmp_path / "weights.safetensors", {})
    with pytest.raises(BackendError, match=r"cannot build this model:\n  aten.*linalg"):
        build_segments(onnx, [("a", segment)], weights, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def blocks(count: int) -> tuple[list[SegmentGraph], dict[str, Tensor]]:
    """The same block over and over, each with weights of its own."""
    tensors: dict[str, Tensor] = {}
    segments = []
    for i in range(count):
        own = {f"blocks.{i}.{n}": t for n, t in zip(("norm", "q", "k", "v", "bias"), CASES["block"][2], strict=True)}
        own = {n: torch.randn_like(t) for n, t in own.items()}
        tensors |= own
        segments.append(make_segment(block, {f"h{i}": rand(2, 6, 8)}, own, f"block{i}"))
    return segments, tensors


def test_equal_nodes_are_translated_once(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    segments, tensors = blocks(4)
    weights = write_weights(tmp_path / "weights.safetensors", tensors)
    backend.prepare(segments[:1])
    once = backend.translator.translated
    seen: list[tuple[int, int]] = []
    keyed = [((rank, s.name), s) for rank in (0, 1) for s in segments]
    files = build_segments(backend, keyed, weights, tmp_path / "engines", lambda *p: seen.append(p))
    assert backend.translator.translated == once and backend.translator.exports == 1
    assert len(set(files.values())) == 4 and files[(0, "block2")] == files[(1, "block2")]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(p.name for p in (tmp_path / "engines").iterdir()) == sorted(set(files.values()))
    eager = EagerBackend()
    oracles = build_segments(eager, keyed, weights, tmp_path / "engines")
    x = rand(2, 6, 8)
    for i, segment in enumerate(segments):
        got, want = (
            b.load(tmp_path / "engines" / f[(0, segment.name)], ("y0",), weights, CPU).run({f"h{i}": x}, ("y0",))["y0"]
            for b, f in ((backend, files), (eager, oracles))
        )
        assert error(got, want) < 1e-5


def test_weights_stay_outside(onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    w = torch.randn(512, 512)
    segment = make_segment(lambda x, a, b: F.linear(F.linear(x, a), b), {"x": rand(1, 3, 512)}, {"a": w, "tied": w})
    run_segment(onnx, segment, {"x": rand(1, 3, 512)}, {"a": w, "tied": w}, tmp_path)
    assert (tmp_path / "engines" / "segment.onnx").stat().st_size < 3000
    assert (tmp_path / "weights.safetensors").stat().st_size < 2**20 + 8192
    import onnx as package

    model = package.load(str(tmp_path / "engines" / "segment.onnx"), load_external_data=False)
    assert {t.external_data[0].value for t in model.graph.initializer if t.external_data} == {"weights.safetensors"}
    package.checker.check_model(_without_weights(model), full_check=True)


def _without_weights(model: Any) -> Any:
    """External weights as inputs: the checker wants to find the file beside the model."""
    import onnx as package

    for tensor in [t for t in model.graph.initializer if t.external_data]:
        model.graph.input.append(package.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    return model


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_engine_contract(name: str, tmp_path: Path) -> None:
    backend = get_backend(name)
    x, w = rand(2, 3), rand(3, 3)
    segment = make_segment(lambda x, w: (F.linear(x, w), x + 1), {"x": x}, {"w": w})
    weights = write_weights(tmp_path / "weights.safetensors", {"w": w, "other": rand(2)})
    path = tmp_path / f"s{backend.suffix}"
    backend.build(segment, weights, path)
    engine = backend.load(path, ("y0", "y1"), weights, CPU)
    with pytest.raises(InputError, match="no input named 'z'"):
        engine.bind("z", x)
    with pytest.raises(InputError, match=r"x was converted as float32 \[2, 3\], but is given as float64 \[2, 3\]"):
        engine.bind("x", x.double())
    engine.bind("x", x.t().contiguous().t())  # any strides
    engine.enqueue()
    first = engine.output("y0")
    kept = first.clone()
    engine.run({"x": x + 1}, ("y0",))
    assert torch.equal(first, kept), "outputs are fresh memory"
    first += 1  # and ordinary tensors
    assert engine.binds_outputs
    memory = torch.full((2, 3), float("nan"))
    engine.bind("y0", memory)
    both = engine.run({"x": x}, ("y0", "y1"))
    assert both["y0"].data_ptr() == memory.data_ptr() and torch.equal(memory, kept) and torch.equal(both["y1"], x + 1)
    assert engine.run({"x": x + 1}, ("y0",))["y0"].data_ptr() != memory.data_ptr(), "a binding outlives its call"
    assert torch.equal(memory, kept)
    with pytest.raises(InputError, match=r"y0 was converted as float32 \[2, 3\], but is given as float32 \[3, 2\]"):
        engine.bind("x", x)
        engine.bind("y0", torch.empty(3, 2))
        engine.enqueue()
    with pytest.raises(BackendError, match="is another segment"):
        backend.load(path, ("y1", "y0"), weights, CPU)
    (tmp_path / f"bad{backend.suffix}").write_text("{}")
    with pytest.raises(BackendError, match="bad"):
        backend.load(tmp_path / f"bad{backend.suffix}", ("y0",), weights, CPU)


def test_weight_of_another_shape_is_refused(onnx: OnnxRuntimeBackend, tmp_path: Path) -> None:
    segment = make_segment(lambda x, w: F.linear(x, w), {"x": rand(2, 3)}, {"w": rand(3, 3)})
    weights = write_weights(tmp_path / "weights.safetensors", {"w": rand(4, 3)})
    with pytest.raises(BackendError, match="the weight 'w'"):
        onnx.build(segment, weights, tmp_path / "a.onnx")
    EagerBackend().build(segment, weights, tmp_path / "a.graph.json")
    with pytest.raises(BackendError, match="the weight 'w'"):
        EagerBackend().load(tmp_path / "a.graph.json", ("y0",), weights, CPU)
    empty = WeightFile.open(write_weights(tmp_path / "empty.safetensors", {}).path)
    with pytest.raises(BundleError, match="no tensor 'w'"):
        onnx.build(segment, empty, tmp_path / "a.onnx")


def test_unknown_backend() -> None:
    with pytest.raises(
        BackendError, match=r"no backend named 'nope'; there are: eager, inductor, onnxruntime, tensorrt"
    ):
        get_backend("nope")


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'pip install "districompile\[onnxruntime\]"'):
        get_backend("onnxruntime")
