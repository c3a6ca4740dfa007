"""Layers in 8 bits by the kernel in CUDA. Compiled anywhere; executed on Hopper GPUs."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.backends.inductor import autotune, fp8
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.kernel_deps import called_kernels, has_kernels
from districompile.backends.inductor.kernels import fp8 as kernels
from districompile.backends.inductor.kernels import hopper
from districompile.backends.inductor.kernels.hopper import Kernel
from districompile.backends.inductor.package import image_values, weight_formats
from districompile.ir.ops import ops
from districompile.ir.quantised import F8, quantise_weight, to_f8
from districompile.testing import make_segment
from tests.helpers_segments import error, run_on_gpu

_TYPES = (torch.float16, torch.bfloat16)
_UNAVAILABLE = hopper.unavailable_reason()


def needs_kernel(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))(test))


@pytest.mark.parametrize("columns", [*kernels.TILES, *(2 * columns for columns in kernels.GATED_TILES)])
def test_sums_of_a_step_fit_beside_all_sums(columns: int) -> None:
    """A thread has 224 registers, and needs some 50 for other things. It holds half of the columns of its pixels."""
    assert 2 * (columns // 2) <= 160
    assert 4 <= hopper.stages(kernels.fp8_kernel(columns, False, True, torch.float16)) <= 8


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_it_compiles_without_a_gpu(dtype: torch.dtype, gated: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    for columns in kernels.GATED_TILES if gated else kernels.TILES:
        kernel = kernels.fp8_kernel(columns, gated, gated, dtype)
        assert hopper.compile_kernel(kernel)[:4] == b"\x7fELF"
        assert Kernel.of_file(kernel.file) == (kernel, hopper._VERSION)


def test_its_machine_code(tmp_path: Path) -> None:
    """The 8-bit units multiply, the first product of a step replaces the sums before it, and each sum is added up."""
    pytest.importorskip("cuda.bindings.nvrtc")
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton is not None else None
    if tool is None or not tool.is_file():
        pytest.skip("triton, which brings nvdisasm, is not installed")
    (tmp_path / "k.cubin").write_bytes(hopper.compile_kernel(kernels.fp8_kernel(160, False, True, torch.float16)))
    ran = subprocess.run([tool, "-c", tmp_path / "k.cubin"], capture_output=True, text=True, check=True, timeout=60)
    products = re.findall(r"(\w?GMMA)\.(\S+) (R\d+), (\S+), (\w+)", ran.stdout)
    assert len(products) == 4 and {p[:2] for p in products} == {("QGMMA", "64x160x32.F32.E4M3.E4M3")}
    assert [p[4] == "RZ" for p in products] == [True, False, False, False]
    assert len(re.findall(r"\bFADD\b", ran.stdout)) >= 80 and not re.search(r"\b(LDL|STL)\b", ran.stdout)


def test_names_of_files_are_apart() -> None:
    eight, sixteen = Kernel(80, 1, False, False, torch.float16, 8), Kernel(80, 1, False, False, torch.float16)
    assert eight.file != sixteen.file and Kernel.of_file(sixteen.file)[0] == sixteen
    with pytest.raises(ValueError, match="products3-80-1-plain-bare-f8"):
        Kernel.of_file("products3-80-1-plain-bare-f8.cubin")


def weights(columns: int, *inner: int) -> dict[str, Tensor]:
    values, scale = quantise_weight(torch.randn(columns, *inner) / math.sqrt(math.prod(inner)))
    return {"w": values, "s": scale, "b": torch.randn(columns).half()}


def linear(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
    return ops.fp8_linear(x, w, s, b)


def gated(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
    product, half = ops.fp8_linear(x, w, s, b), w.shape[0] // 2
    value, gate = product[..., :half], product[..., half : 2 * half]  # as plans have it
    return value * torch.nn.functional.gelu(gate)


def conv(x: Tensor, w: Tensor, s: Tensor, b: Tensor, own: Tensor) -> Tensor:
    return ops.fp8_conv(x, w, s, own, b, [1, 1], [0, 1], [1, 1], 1)


def pointwise(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
    return ops.fp8_conv(x, w, s, None, b, [1, 1], [0, 0], [1, 1], 1)


Case = tuple[Callable[..., Tensor], Tensor, dict[str, Tensor], Any, Kernel]


def cases(dtype: torch.dtype = torch.float16) -> dict[str, Case]:
    torch.manual_seed(0)
    layers = {
        "linear": (linear, torch.randn(2, 9, 32), weights(160, 32), fp8.KERNEL_LINEAR, (80, 1, False)),
        "gated": (gated, torch.randn(2, 9, 32), weights(320, 32), fp8.KERNEL_GATED_LINEAR, (80, 2, True)),
        "conv": (conv, torch.randn(1, 32, 9, 7), weights(160, 32, 3, 3) | {"own": torch.tensor([4 / 448])},
                 fp8.KERNEL_CONV, (80, 1, False)),
        "pointwise": (pointwise, torch.randn(1, 32, 9, 7), weights(160, 32, 1, 1), fp8.KERNEL_CONV, (80, 1, False)),
    }  # fmt: skip
    return {
        name: (
            f,
            x.to(dtype),
            {n: t.to(dtype) if n == "b" else t for n, t in w.items()},
            op,
            Kernel(*k, True, dtype, 8),
        )
        for name, (f, x, w, op, k) in layers.items()
    }


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Tiles of 80 columns are always the fastest. The sizes that were asked for."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fp8, "best_linear", lambda *size: asked.append(size) or 80)
    monkeypatch.setattr(fp8, "best_convolution", lambda *size: asked.append(size) or 80)
    yield asked


@pytest.mark.parametrize("name", cases())
def test_layers_are_replaced(name: str, selected: list[tuple[Any, ...]]) -> None:
    function, x, given, op, kernel = cases()[name]
    segment = make_segment(function, {"x": x}, given)
    graph = segment.graph.graph
    fp8.select_fp8_kernels(graph)
    graph.lint()
    assert [n.target for n in graph.nodes if n.target in fp8.KERNELS] == [op]
    assert not any(n.target in (ops.fp8_linear.default, ops.fp8_conv.default) for n in graph.nodes)
    assert called_kernels(graph) == (kernel,) and has_kernels(graph)
    segment.graph.recompile()
    [got] = segment.graph(x, *given.values())
    assert torch.equal(got, function(x, *given.values()))  # on a CPU the operators are the plain ones
    sizes: dict[str, tuple[Any, ...]] = {
        "linear": (18, 32, 160, True, False),
        "gated": (18, 32, 320, True, True),
        "conv": ((1, 32, 9, 7), (160, 32, 3, 3), (0, 1), True),
        "pointwise": (63, 32, 160, True, False),
    }
    assert selected == [(*sizes[name], torch.float16)]


@pytest.mark.parametrize("source", ["input", "product", "norm", "gate", "moved"])
def test_what_rounds_the_input(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a product or attention has a kernel of its own for it, also where a library multiplies."""
    functional = torch.nn.functional
    before: dict[str, Callable[[Tensor], Tensor]] = {
        "input": lambda x: x, "product": lambda x: x @ x.transpose(-1, -2) @ x,
        "norm": lambda x: functional.layer_norm(x, (32,)), "gate": lambda x: x * functional.gelu(x),
        "moved": lambda x: functional.layer_norm(x.transpose(1, 2).reshape(x.shape), (32,)).reshape(2, 9, 32),
    }  # fmt: skip
    apart = source in ("input", "product", "gate")
    monkeypatch.setattr(fp8, "unavailable_reason", lambda: None)
    for best, wanted in ((80, 80), (None, fp8.LIBRARY if apart else None)):
        monkeypatch.setattr(fp8, "best_linear", lambda *_, best=best: best)

        def layer(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Tensor:
            return linear(before[source](x), w, s, b)

        segment = make_segment(layer, {"x": torch.randn(2, 9, 32).half()}, weights(160, 32))
        graph = segment.graph.graph
        fp8.select_fp8_kernels(graph)
        found = [n.args[-2:] for n in graph.nodes if n.target in fp8.KERNELS]
        assert found == ([] if wanted is None else [(apart, wanted)])
        assert has_kernels(graph) == (wanted is not None) and len(called_kernels(graph)) == (wanted == 80)


def test_what_the_kernel_cannot_do_stays(selected: list[tuple[Any, ...]]) -> None:
    def strided(x: Tensor, w: Tensor, s: Tensor, b: Tensor, own: Tensor) -> Tensor:
        return ops.fp8_conv(x, w, s, own, b, [2, 2], [1, 1], [1, 1], 1)

    def grouped(x: Tensor, w: Tensor, s: Tensor, b: Tensor, own: Tensor) -> Tensor:
        return ops.fp8_conv(x, w, s, own, b, [1, 1], [1, 1], [1, 1], 2)

    own = {"own": torch.tensor([4 / 448])}
    for function, inner in ((strided, 32), (grouped, 16)):
        segment = make_segment(function, {"x": torch.randn(1, 32, 9, 7).half()}, weights(160, inner, 3, 3) | own)
        fp8.select_fp8_kernels(segment.graph.graph)
        assert not has_kernels(segment.graph.graph)
    assert selected == []


def test_tiles_fit_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "unavailable_reason", lambda: None)
    assert fp8.tiles_of(320, 640, False, torch.float16) == [160, 128, 80]
    assert fp8.tiles_of(320, 640, True, torch.bfloat16) == [80, 64]
    assert fp8.tiles_of(320, 160, True, torch.float16) == [80]
    for refused in (
        (328, 640, False, torch.float16),
        (320, 648, False, torch.float16),
        (320, 640, False, torch.float32),
    ):
        assert fp8.tiles_of(*refused) == []
    monkeypatch.setattr(fp8, "unavailable_reason", lambda: "there is no GPU")
    assert fp8.tiles_of(320, 640, False, torch.float16) == []


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("name", cases())
def test_lowered_for_a_gpu(name: str, dtype: torch.dtype) -> None:
    """On fake tensors of a GPU: one call of the kernel, and a result of the same shape and type."""
    function, x, given, op, _ = cases(dtype)[name]
    lower = {fp8.KERNEL_LINEAR: fp8.lower_linear, fp8.KERNEL_GATED_LINEAR: fp8.lower_gated_linear,
             fp8.KERNEL_CONV: fp8.lower_conv}[op]  # fmt: skip
    want = function(x, *given.values())
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Record(), torch.no_grad():
        fake = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in {"x": x, **given}.items()}
        # Images and weights of convolutions are channels-last in packages
        last = {n: fake[n].to(memory_format=torch.channels_last) if fake[n].ndim == 4 else fake[n] for n in "xw"}
        operands = [last["x"], last["w"], fake["s"]]
        if op is fp8.KERNEL_CONV:
            operands += [fake.get("own"), fake["b"], [0, 1] if name == "conv" else [0, 0], False, 80]
        else:
            operands += [fake["b"], False, 80]
        got = lower(*operands)
        assert (got.shape, got.dtype) == (want.shape, dtype)
    assert sum("tiled_fp8" in name for name in called) == 1 and not any("_scaled_mm" in name for name in called)


def test_images_and_weights_of_convolutions_in_8_bits_are_channels_last() -> None:
    """As those of other convolutions: otherwise each call would order them anew."""
    function, x, given, _, _ = cases()["conv"]
    segment = make_segment(function, {"x": x}, given)
    assert image_values(segment) == {"x", "y0"} and weight_formats(segment) == {"w": "channels_last"}


def test_scales_must_be_those_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(kernels, "launch_tiles", lambda *given: launched.append(given))
    x, w, s = torch.zeros(1, 2, 3, 16).to(F8), torch.zeros(80, 16).to(F8), torch.ones(80)
    for own in (torch.ones(1), torch.ones(6, 1)):
        y = kernels.tiled_convolution(x, w, own, s, None, [1, 1], [0, 0], 80, True)
        assert (y.shape, y.dtype) == ((1, 2, 3, 80), torch.bfloat16) and launched.pop()[-2].shape == (own.numel(),)
    with pytest.raises(ValueError, match="4 scales for 6 pixels"):
        kernels.tiled_convolution(x, w, torch.ones(4), s, None, [1, 1], [0, 0], 80, False)


def _exact(x: Tensor, w: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
    """Convolve (B, H, W, C) by (O, h, w, C) in float64."""
    double = x.double().permute(0, 3, 1, 2), w.double().permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(*double, padding=padding).permute(0, 2, 3, 1)
    y = y * (own.double().reshape(*y.shape[:3], 1) if own.numel() > 1 else own.double()) * scale.double()
    return y if bias is None else y + bias.double()


def _operands(columns: int, pixels: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    own, scale = torch.rand(pixels, device="cuda") / 99 + 1e-3, torch.rand(columns, device="cuda") / 99 + 1e-3
    return own, scale, torch.randn(columns, device="cuda", dtype=dtype) if bias else None


def _emulated(x: Tensor, w: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """What :func:`kernels.tiled_convolution` computes."""
    kernel, padding, _, bfloat16 = rest
    weight = w.reshape(w.shape[0], *kernel, x.shape[-1])
    return _exact(x, weight, own, scale, bias, padding).to(_TYPES[bfloat16]).contiguous()


def _emulated_gate(x: Tensor, w: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """What :func:`kernels.tiled_gated_linear` computes."""
    value, gate = _exact(x[None, None], w[:, None, None], own, scale, bias, 0)[0, 0].chunk(2, -1)
    return (value * torch.nn.functional.gelu(gate)).to(_TYPES[rest[-1]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize(
    ("choose", "size", "ways"),
    [
        (fp8.best_linear, (70, 48, 640, True, False), 3),
        (fp8.best_linear, (70, 48, 160, False, True), 1),
        (fp8.best_convolution, ((2, 32, 9, 7), (160, 32, 3, 3), (0, 1), True), 2),
    ],
)
def test_what_is_compared_when_choosing_agrees(
    choose: Any, size: tuple[Any, ...], ways: int, dtype: torch.dtype, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU and without a clock. A kernel that computes something else is left out with a warning."""
    for name in ("randn", "rand", "empty", "ones"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *s, make=make, dtype=torch.float32, **_: make(*s).to(dtype))
    monkeypatch.setattr(fp8, "unavailable_reason", lambda: None)
    monkeypatch.setattr(fp8, "launch", lambda name, grid, tensors, *rest, **_: tensors["out"].zero_())  # only timed

    def product(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return rows.float() @ weight.float()

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(fp8, "multiply", lambda x, own, w, scale, dtype: (x.float() @ w.float().t()) * own * scale)
    factor = 1.1 if wrong else 1.0
    monkeypatch.setattr(kernels, "tiled_convolution", lambda *given: _emulated(*given) * factor)
    monkeypatch.setattr(kernels, "tiled_gated_linear", lambda *given: _emulated_gate(*given) * factor)
    monkeypatch.setattr(autotune, "_replay", lambda call: call() is None or (lambda: 1.0))
    with autotune.recorded_timings() as times, contextlib.ExitStack() as stack:
        if wrong:
            stack.enter_context(pytest.warns(UserWarning, match="in 8 bits .* its result is wrong"))
        assert choose.__wrapped__(*size, dtype) is None
    assert len(times) == 1 + (0 if wrong else ways)


@needs_kernel
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("tile", kernels.TILES)
@pytest.mark.parametrize(
    ("batch", "height", "width", "kernel", "padding", "channels", "each", "bias"),
    [
        (2, 5, 70, (3, 3), (0, 1), 64, False, True),
        (1, 1, 140, (1, 1), (0, 0), 1280, True, True),
        (3, 17, 33, (2, 5), (1, 0), 80, False, False),
        (1, 9, 16, (1, 1), (0, 0), 16, True, False),
        (1, 76, 104, (3, 3), (1, 1), 320, False, True),
    ],
)
def test_convolutions_and_products(
    dtype: torch.dtype, tile: int, batch: int, height: int, width: int, kernel: tuple[int, int],
    padding: tuple[int, int], channels: int, each: bool, bias: bool,
) -> None:  # fmt: skip
    x = to_f8(torch.randn(batch, height, width, channels, device="cuda") * 20)
    w = to_f8(torch.randn(2 * tile, *kernel, channels, device="cuda") * 20)
    own, scale, added = _operands(2 * tile, batch * height * width if each else 1, bias, dtype)
    want = _exact(x, w, own, scale, added, padding).to(dtype).contiguous()
    got = kernels.tiled_convolution(x, w.flatten(1), own, scale, added, kernel, padding, tile, dtype == _TYPES[1])
    assert error(got, want) <= 2 * torch.finfo(dtype).eps


@needs_kernel
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("tile", kernels.GATED_TILES)
@pytest.mark.parametrize(
    ("rows", "inner", "tiles", "bias"), [(200, 80, 2, True), (1, 48, 3, False), (513, 1280, 8, True)]
)
def test_gated_products(dtype: torch.dtype, tile: int, rows: int, inner: int, tiles: int, bias: bool) -> None:
    columns = 2 * tile * tiles
    x, w = (to_f8(torch.randn(n, inner, device="cuda") * 20) for n in (rows, columns))
    own, scale, added = _operands(columns, rows, bias, dtype)
    value, gate = _exact(x[None, None], w[:, None, None], own, scale, added, 0)[0, 0].chunk(2, -1)
    got = kernels.tiled_gated_linear(x, w, own, scale, added, tile, dtype == _TYPES[1])
    assert error(got, (value * torch.nn.functional.gelu(gate)).to(dtype)) <= 2 * torch.finfo(dtype).eps


@needs_kernel
def test_choices_are_timed() -> None:
    for size in ((512, 1280, 10240, True, True, torch.float16), (2048, 640, 640, False, False, torch.bfloat16)):
        assert fp8.best_linear.__wrapped__(*size) in (None, *kernels.TILES, *kernels.GATED_TILES)
    found = fp8.best_convolution.__wrapped__((1, 320, 64, 128), (320, 320, 3, 3), (1, 1), True, torch.float16)
    assert found in (None, *kernels.TILES)


@needs_kernel
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("name", cases())
def test_an_engine_has_layers(name: str, dtype: torch.dtype, tmp_path: Any, selected: Any) -> None:
    function, x, given, _, kernel = cases(dtype)[name]
    segment = make_segment(function, {"x": x}, given)
    want = function(x.cuda(), *(t.cuda() for t in given.values()))
    backend = InductorBackend("cuda")
    got = run_on_gpu(backend, segment, {"x": x.cuda()}, given, tmp_path)["y0"]
    assert error(got, want) < 1e-2 and backend._package(segment).kernels == (kernel,)
