"""The inductor backend on the CPU: every case of the other backends, in one package."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.compiler import links_shared, select_compiler
from districompile.backends.inductor.lowerings import linear
from districompile.backends.inductor.package import CompileJob, Operand, compile_package, image_values
from districompile.backends.inductor.padding import pad
from districompile.backends.inductor.pytorch_private import compile_program
from districompile.ir.serialize import graph_to_json
from districompile.ir.spec import TensorSpec
from districompile.passes.in_place_gather import InPlaceGather
from districompile.testing import make_segment
from tests.backends.test_backends import CASES, COMPOSITES
from tests.helpers_net import images, make_program
from tests.helpers_segments import error, run_segment

_REASON = InductorBackend("cpu").build_unavailable_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def test_agrees_with_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    functions: list[tuple[Any, list[str], list[str]]] = []
    inputs: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for i, (function, x, w) in enumerate([*CASES.values(), *((f, x, []) for n, (f, x) in COMPOSITES.items())]):
        names = [f"x{i}.{j}" for j in range(len(x))], [f"w{i}.{j}" for j in range(len(w))]
        inputs |= zip(names[0], x, strict=True)
        weights |= zip(names[1], w, strict=True)
        functions.append((function, *names))

    def everything(*args: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip([*inputs, *weights], args, strict=True))
        out: list[Tensor] = []
        for function, x, w in functions:
            result = function(*(named[n] for n in (*x, *w)))
            out += list(result) if isinstance(result, tuple | list) else [result]
        return tuple(out)

    segment = make_segment(everything, inputs, weights)
    got = run_segment(InductorBackend("cpu"), segment, inputs, weights, tmp_path)
    want = run_segment(EagerBackend(), segment, inputs, weights, tmp_path)
    assert max(error(got[n], want[n]) for n in want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 64])
def test_linears_whose_bias_joins_what_follows(dtype: torch.dtype, rows: int) -> None:
    x, w, b = torch.randn(2, rows, 32).to(dtype), torch.randn(48, 32).to(dtype), torch.randn(48).to(dtype)
    want = torch.nn.functional.linear(x.double(), w.double(), b.double())
    for got, exact in ((linear(x, w, b), want), (linear(x, w), want - b.double())):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got - exact).norm() / exact.norm() <= 2 * torch.finfo(dtype).eps


def test_inductor_does_not_remember_what_exporting_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting switches cuDNN off, whose results have other strides."""
    remembered: list[int] = []

    def compiled(*args: Any, package_path: str, **kwargs: Any) -> None:
        remembered.append(len(FakeTensorMode.cache))
        with zipfile.ZipFile(package_path, "w") as package:
            package.writestr("x/code.so", b"code" * 1000)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    operand = Operand(TensorSpec((1, 8, 5, 5), torch.float32), "channels_last")
    segment = make_segment(torch.nn.functional.silu, {"x": torch.randn(1, 8, 5, 5)})
    compile_package(
        CompileJob(graph_to_json(segment.graph), (operand,), (operand,), "cpu", ()), str(tmp_path / "x.pt2")
    )
    assert remembered == [0]
    with zipfile.ZipFile(tmp_path / "x.pt2") as package:  # and its members are compressed
        assert package.read("x/code.so") == b"code" * 1000 and package.getinfo("x/code.so").compress_size < 100


@pytest.mark.parametrize("text, again", [("The argument '-1 + 2*((0))' is not comparable.", True), ("another", False)])
def test_a_program_whose_tilings_cannot_be_analysed(text: str, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch._inductor.config.triton.coalesce_tiling_analysis is not None  # the switch is there
    asked: list[Any] = []

    def compiled(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        asked.append(inductor_configs)
        if len(asked) == 1:
            raise ValueError(text)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    program: Any = None
    if again:
        compile_program(program, "x.pt2", {"a": 1})
    else:
        with pytest.raises(ValueError, match=text):
            compile_program(program, "x.pt2", {"a": 1})
    assert asked == [{"a": 1}, {"a": 1, "triton.coalesce_tiling_analysis": False}][: 1 + again]


@pytest.mark.slow
def test_own_rows_are_written_where_others_arrive(tmp_path: Path) -> None:
    program = make_program(2, optimise="fuse-parallel-linears,hoist-fetches", passes=[InPlaceGather(math.inf, 1)])
    program.save(tmp_path / "compiled", backend=InductorBackend("cpu"))
    program.save(tmp_path / "eager", backend="eager")
    engines = [json.loads(p.read_text()) for p in (tmp_path / "compiled/engines").glob("*.json")]
    assert any(e["aliased"] for e in engines)
    got, want = (images(dc.load(tmp_path / name, lockstep=True)) for name in ("compiled", "eager"))
    for a, b in zip(got, want, strict=True):
        x, y = (torch.frombuffer(bytearray(t), dtype=torch.float32) for t in (a, b))
        assert (x - y).abs().max() / y.abs().max() <= 1e-5


def test_queries_are_no_images() -> None:
    """Heads of attention have four dims as images do, and kernels that want their last one innermost."""
    inputs = {"x": torch.randn(1, 16, 8, 8), "q": torch.randn(1, 8, 64, 16), "k": torch.randn(1, 8, 64, 16)}

    def attend(x: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        image = torch.nn.functional.conv2d(x + seen.sum(), w, padding=1)
        return image + 1, image.flatten(2).transpose(1, 2).reshape(1, 64, 8, 2).transpose(1, 2), seen * 2

    segment = make_segment(attend, inputs, {"w": torch.randn(16, 16, 3, 3)})
    assert image_values(segment) == {"x", "y0"}


def test_values_of_which_rows_and_columns_are_one_dim_are_no_images() -> None:
    """Attention blocks normalise flattened maps by groups. There is no channels-last format of three dims."""
    inputs = {"x": torch.randn(1, 16, 8, 8), "t": torch.randn(1, 16, 64)}

    def block(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        flat = torch.nn.functional.group_norm(x.flatten(2), 4) + torch.nn.functional.group_norm(t, 4)
        return torch.nn.functional.group_norm(x, 4), flat

    segment = make_segment(block, inputs)
    assert image_values(segment) == {"x", "y0"}


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular", "constant"])
@pytest.mark.parametrize("sides", [(2, 1), (0, 3, 1, 2), (1, 0, 0, 0, 2, 1)])
def test_padding_by_slices(mode: str, sides: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *(5,) * (len(sides) // 2))
    assert torch.equal(pad(x, sides, mode), torch.nn.functional.pad(x, sides, mode))


def static_compiler(folder: Path) -> Path:
    gcc, path = shutil.which("g++"), folder / "static-g++"
    if gcc is None or sys.platform != "linux":
        pytest.skip("made of g++ on Linux")
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) exec {gcc} "$@" -static-libstdc++;; *) exec {gcc} "$@";; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[str]:
    """torch's choice is a compiler that puts its own C++ library into what it links."""
    import torch._inductor.config as config

    path = static_compiler(tmp_path)
    select_compiler.cache_clear()
    with config.patch({"cpp.cxx": (None, str(path))}):
        yield str(path)
    select_compiler.cache_clear()


def test_a_compiler_with_its_own_library_is_not_used(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not links_shared(compiler)
    other, reason = select_compiler()
    assert reason is None and other is not None and links_shared(other)
    monkeypatch.setattr("districompile.backends.inductor.compiler._others", lambda: iter([compiler]))
    select_compiler.cache_clear()
    assert str(select_compiler()[1]).startswith(f"cannot use the C++ compiler {compiler}: ")


@pytest.mark.slow
def test_a_package_beside_an_unfit_compiler_runs(compiler: str, tmp_path: Path) -> None:
    """What that compiler makes crashes when it is loaded."""
    inputs = {"x": torch.randn(3, 5)}
    segment = make_segment(lambda x: x.cos() * 3, inputs)
    got = run_segment(InductorBackend("cpu"), segment, inputs, {}, tmp_path)
    assert error(got["y0"], inputs["x"].cos() * 3) < 1e-5


def test_a_backend_for_several_models_knows_the_images_of_each() -> None:
    """Values of two models may have one name, and be an image in one of them."""
    backend = InductorBackend("cpu", channels_last=True, workers=1, cache="none")
    for x, w, kind in ((torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1), "channels_last"),
                       (torch.randn(1, 8, 8), torch.randn(8, 8), "contiguous")):  # fmt: skip
        compute = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.linear
        first = make_segment(lambda v, w, f=compute: f(v, w), {"sample": x}, {"w": w})
        first = dataclasses.replace(first, outputs=(("value", first.outputs[0][1]),))
        second = make_segment(lambda v, w, f=compute: f(v, w), {"value": x}, {"w": w})
        backend.prepare([first, second])
        [(_, package)] = [p for p in backend._plans.values() if p[0] is second]
        assert package.operands["inputs"] == [["value", *Operand(TensorSpec(tuple(x.shape), x.dtype), kind).to_json()]]
