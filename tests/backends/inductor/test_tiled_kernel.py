"""The kernel in CUDA: gated products and convolutions in tiles. Compiled anywhere; executed on Hopper GPUs."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.inductor import convolution, gated
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.kernels import hopper
from districompile.backends.inductor.kernels.hopper import Kernel
from districompile.cuda.driver import DriverError
from districompile.errors import BackendError
from districompile.testing import make_segment
from tests.helpers_segments import error, run_on_gpu, run_segment

_TYPES = (torch.float16, torch.bfloat16)
_UNAVAILABLE = hopper.unavailable_reason()


def needs_kernel(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))(test))


@pytest.mark.parametrize("tile", [*hopper.TILES, *((columns, 2) for columns in hopper.GATED_TILES)])
def test_a_block_holds_some_steps(tile: tuple[int, int]) -> None:
    assert 4 <= hopper.stages(Kernel(*tile, False, False, torch.float16)) <= 8


def test_both_sides_know_the_same_sizes() -> None:
    text = Path(hopper.__file__).with_name("products.cu").read_text()
    found = {name: int(n) for name, n in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    assert (found["PIXELS"], found["STEP"], found["CLUSTER"]) == (hopper._PIXELS, hopper._STEP, hopper._CLUSTER)
    assert 128 * (1 + found["CONSUMERS"]) == hopper._THREADS
    [fields] = re.findall(r"struct Sizes \{(.*?)\};", text, re.DOTALL)
    declared = re.sub(r"//.*", "", fields).replace("int", "").replace(";", ",")
    assert [n.strip() for n in declared.split(",") if n.strip()] == [f[0] for f in hopper._Sizes._fields_]


def test_strides_are_those_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over all pixels has others where a dim has one element, which the driver would refuse."""
    given: list[Any] = []
    monkeypatch.setattr(hopper, "call", lambda name, *args: given.append((list(args[4]), list(args[5]))))
    x = torch.randn(2, 320, 4, 4).half().mean((2, 3), keepdim=True).permute(0, 2, 3, 1).contiguous()
    assert x.stride(1) == 1
    hopper._tensor_map(x, (1, 16, 8))
    hopper._tensor_map(torch.empty(48, 64).half(), (16,))
    assert given == [([320, 1, 1, 2], [640, 640, 640]), ([64, 48], [128])]


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize(("tile", "gated_"), [((160, 2), True), ((80, 2), True), ((160, 1), False), ((128, 2), False)])
def test_it_compiles_without_a_gpu(dtype: torch.dtype, tile: tuple[int, int], gated_: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    code = hopper.compile_kernel(Kernel(*tile, gated_, gated_, dtype))
    assert code[:4] == b"\x7fELF" and b"product" in code


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(hopper, "_header", lambda *size: "#error no header\n")
    with pytest.raises(DriverError, match="does not compile products.cu: .*no header"):
        hopper.compile_kernel.__wrapped__(Kernel(160, 1, False, False, torch.float16))


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> dict[Kernel, bytes]:
    kernels: dict[Kernel, bytes] = {}
    monkeypatch.setattr(hopper, "_CUBINS", kernels)
    return kernels


def test_a_bundle_brings_its_kernels(provided: dict[Kernel, bytes], tmp_path: Path) -> None:
    kernels = [Kernel(160, 2, True, False, torch.float16), Kernel(80, 1, False, False, torch.bfloat16)]
    for number, kernel in enumerate(kernels):
        (tmp_path / kernel.file).write_bytes(b"kernel %d" % number)
    hopper.load_kernels(tmp_path, [kernel.file for kernel in kernels], torch.device("cpu"))
    assert provided == {kernels[0]: b"kernel 0", kernels[1]: b"kernel 1"}
    missing = Kernel(128, 1, False, False, torch.float16)
    with pytest.raises(BackendError, match=f"cannot read .*{missing.file}: No such file"):
        hopper.load_kernels(tmp_path, [missing.file], torch.device("cpu"))
    with pytest.raises(BackendError, match="names '../x.cubin', which is no kernel file"):
        hopper.load_kernels(tmp_path, ["../x.cubin"], torch.device("cpu"))


def test_a_kernel_of_another_version_is_compiled_here(
    provided: dict[Kernel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, asked = Kernel(160, 1, False, False, torch.float16), list[Kernel]()
    monkeypatch.setattr(hopper, "_function_of", lambda kernel, device: asked.append(kernel))
    hopper.load_kernels(
        tmp_path, [kernel.file.replace(f"products{hopper._VERSION}", "products0")], torch.device("cuda")
    )
    assert asked == [kernel] and provided == {}


def test_a_kernel_that_the_driver_does_not_take_is_compiled_here(
    provided: dict[Kernel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, asked = Kernel(160, 1, False, False, torch.float16), list[bool]()

    def function_of(kernel: Kernel, device: torch.device) -> None:
        asked.append(kernel in provided)
        if asked[-1]:
            raise DriverError("cuModuleLoadData failed with CUDA error 200")

    monkeypatch.setattr(hopper, "_function_of", function_of)
    (tmp_path / kernel.file).write_bytes(b"old")
    hopper.load_kernels(tmp_path, [kernel.file], torch.device("cuda"))
    assert asked == [True, False]


def test_without_a_compiler(provided: dict[Kernel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_no_compiler", lambda: "there is no compiler")
    name = Kernel(160, 1, False, False, torch.float16).file.replace(f"products{hopper._VERSION}", "products0")
    hopper.compile_kernel.cache_clear()
    with pytest.raises(BackendError, match=f"{name} cannot be used here: there is no compiler: convert again"):
        hopper.load_kernels(tmp_path, [name], torch.device("cuda"))


@pytest.mark.parametrize("name", ["cuda.bindings.nvrtc", "cuda.bindings"])
def test_what_is_missing_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in {name, "cuda.bindings.nvrtc"}:
        monkeypatch.setitem(sys.modules, part, None)
    assert "cuda.bindings cannot load NVRTC" in str(hopper._no_compiler.__wrapped__())


@pytest.mark.slow
def test_an_engine_names_what_it_calls(
    provided: dict[Kernel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where it is not called."""
    monkeypatch.setattr(hopper, "compile_kernel", lambda kernel: str(kernel).encode())
    monkeypatch.setattr(gated, "best_tile", lambda *size: 160)
    weights = {"w": torch.randn(640, 24).half() / 5, "b": torch.randn(640).half()}
    segment = make_segment(_gated, {"x": torch.randn(5, 24).half()}, weights)
    args = [torch.randn(5, 24).half(), *weights.values()]
    backend = InductorBackend("cpu", autotune=("custom-kernels",))
    got = run_segment(backend, segment, {"x": args[0]}, weights, tmp_path)
    assert error(got["y0"], _gated(*args)) < 4e-3
    kernel = Kernel(160, 2, True, True, torch.float16)
    [engine] = tmp_path.rglob("*.aoti.json")
    assert json.loads(engine.read_text())["kernels"] == [kernel.file]
    assert provided == {kernel: str(kernel).encode()}


@pytest.mark.parametrize(
    ("height", "width", "wide"),
    [(64, 128, 128), (32, 64, 64), (16, 32, 32), (76, 104, 8), (1, 512, 128), (240, 480, 32), (3, 1, 32)],
)
def test_tiles_of_an_image_are_few(height: int, width: int, wide: int) -> None:
    assert hopper._tile_width(height, width) == wide

    def tiles(wide: int) -> int:
        return math.ceil(width / wide) * math.ceil(height / (128 // wide))

    assert tiles(wide) == min(tiles(2**i) for i in range(8))


def test_shapes_without_a_gpu() -> None:
    """The declared results of the kernels."""
    with torch.device("meta"):
        x, w = torch.empty(6, 24, dtype=torch.float16), torch.empty(320, 24, dtype=torch.float16)
        image, matrix = torch.empty(2, 9, 7, 16), torch.empty(160, 6 * 16)
    assert hopper.TILED_GATED_LINEAR(x, w, None, 160).shape == (6, 160)
    assert hopper.TILED_CONVOLUTION(image, matrix, [2, 3], [1, 0], [160, 1]).shape == (2, 10, 5, 160)


def _gated(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    product, half = torch.nn.functional.linear(x, w, b), w.shape[0] // 2
    value, gate = product[..., :half], product[..., half : 2 * half]  # as plans have it
    return value * torch.nn.functional.gelu(gate)


@needs_kernel
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("tile", hopper.GATED_TILES)
@pytest.mark.parametrize(
    ("rows", "inner", "tiles", "bias"), [(200, 72, 2, True), (1, 40, 3, False), (513, 1280, 8, True)]
)
def test_gated_products(dtype: torch.dtype, tile: int, rows: int, inner: int, tiles: int, bias: bool) -> None:
    columns = tile * tiles
    x, w = (torch.randn(n, inner, device="cuda").to(dtype) for n in (rows, 2 * columns))
    w, b = w / 20, torch.randn(2 * columns, device="cuda").to(dtype) if bias else None
    want = _gated(x.double(), w.double(), None if b is None else b.double())
    got = hopper.tiled_gated_linear(x, w, b, tile)
    assert error(got, want.to(dtype)) <= 2 * torch.finfo(dtype).eps


@needs_kernel
def test_operands_anywhere_in_memory() -> None:
    """Copies need multiples of 16 bytes."""
    x = torch.randn(40 * 64 + 1, device="cuda").half()[1:].view(40, 64)
    w, b = torch.randn(160 * 64 + 3, device="cuda").half()[3:].view(160, 64), torch.randn(161, device="cuda").half()[1:]
    got = hopper.tiled_gated_linear(x, w, b, 80)
    assert error(got, _gated(x.double(), w.double(), b.double()).half()) <= 2e-3


@needs_kernel
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("tile", hopper.TILES)
@pytest.mark.parametrize(
    ("batch", "height", "width", "kernel", "padding", "channels"),
    [
        (2, 5, 70, (3, 3), (0, 1), 64),
        (1, 1, 140, (3, 3), (1, 1), 64),
        (3, 17, 33, (2, 5), (1, 0), 72),
        (1, 9, 16, (1, 1), (0, 0), 8),
        (1, 76, 104, (3, 3), (1, 1), 320),
    ],
)
def test_convolutions(
    dtype: torch.dtype,
    tile: tuple[int, int],
    batch: int,
    height: int,
    width: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    channels: int,
) -> None:
    columns = 2 * math.prod(tile)
    x = torch.randn(batch, height, width, channels, device="cuda").to(dtype)
    w = torch.randn(columns, *kernel, channels, device="cuda").to(dtype)
    double = x.double().permute(0, 3, 1, 2), w.double().permute(0, 3, 1, 2)
    want = torch.nn.functional.conv2d(*double, padding=padding).permute(0, 2, 3, 1).to(dtype).contiguous()
    got = hopper.tiled_convolution(x, w.flatten(1), kernel, padding, tile)
    assert error(got, want) <= 2 * torch.finfo(dtype).eps


@needs_kernel
def test_the_same_bits_twice() -> None:
    x, w = torch.randn(700, 640, device="cuda").half(), torch.randn(1280, 640, device="cuda").half() / 25
    first = hopper.tiled_gated_linear(x, w, None, 160)
    assert all(torch.equal(first, hopper.tiled_gated_linear(x, w, None, 160)) for _ in range(20))


@needs_kernel
def test_choices_are_timed() -> None:
    for size in ((512, 1280, 10240, True, torch.float16), (100, 40, 320, False, torch.bfloat16)):
        assert gated.best_tile.__wrapped__(*size) in (None, *hopper.GATED_TILES)
    assert gated.best_tile(512, 1280, 10240, True, torch.float16) == 160  # 22 us, and apart 29, on an H100


@needs_kernel
@pytest.mark.parametrize("tile", [(160, 1), (160, 2), (80, 1)])
def test_an_engine_has_convolutions(tile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image with what a neighbour sent, and of the result."""

    def net(above: Tensor, x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = torch.nn.functional.silu(torch.cat([above, x], 2))
        y = torch.nn.functional.conv2d(y, w, b, padding=(0, 1))
        return torch.nn.functional.conv2d(torch.nn.functional.silu(y), v) + x[:, :, :1, :1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).half()

    inputs = {"above": normal(1, 64, 2, 150), "x": normal(1, 64, 17, 150)}
    weights = {"w": normal(640, 64, 3, 3) / 24, "b": normal(640), "v": normal(64, 640, 1, 1) / 25}
    segment = make_segment(net, inputs, weights)
    monkeypatch.setattr(
        convolution, "best_convolution", lambda image, weight, *rest: tile if weight[0] == 640 else None
    )
    cuda = {n: x.cuda() for n, x in inputs.items()}
    [want] = segment.graph.cuda()(*cuda.values(), *(w.cuda() for w in weights.values()))
    backend = InductorBackend("cuda")

    def only_the_bundles() -> None:
        hopper._function_of.cache_clear()
        monkeypatch.setattr(hopper, "_CUBINS", {})
        monkeypatch.setattr(hopper, "compile_kernel", lambda kernel: pytest.fail(f"{kernel} is compiled"))

    got = run_on_gpu(backend, segment, cuda, weights, tmp_path, only_the_bundles)["y0"]
    assert error(got, want) < 4e-3
    assert "kernel_convolution" in backend._package(segment).job.graph
    [kernel] = backend._package(segment).kernels
    assert kernel == Kernel(*tile, False, False, torch.float16) and (tmp_path / kernel.file).is_file()
