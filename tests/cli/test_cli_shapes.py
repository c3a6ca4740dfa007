"""Shapes on the command line: several at once, added later, named in other commands, and drawn where they are new."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_errors import failing

from districompile.bundle.bundle import Bundle
from districompile.cli import main
from districompile.cli.commands.run_rank import chosen_shapes
from districompile.cli.convert import Settings
from districompile.cli.shapes import Shape, of_size, shapes_of

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
        self.kinds = torch.nn.Embedding(5, 8)

    def forward(self, sample, timestep, kinds):
        shift = self.kinds(kinds).mean(1)[:, :, None, None]
        return self.outer(torch.nn.functional.silu(self.inner(sample) + timestep * 1e-3 + shift))

def tiny():
    kinds = torch.tensor([[4, 1, 0]])
    return Net(), (torch.randn(1, 4, 8, 6), torch.tensor(5.0), kinds), {}, {"sample": 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shape_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def settings(**given: Any) -> Settings:
    return Settings(model="m", **given)


def test_what_options_ask_for() -> None:
    assert shapes_of(settings()) == [Shape()]
    assert shapes_of(settings(height=8, width=4, batch="3")) == [Shape(8, 4, 3)]
    found = shapes_of(settings(size=("8x4", "6X4", "8x4"), batch="1,2", tokens="77, 154"))
    assert found[0] == Shape(4, 8, 1, 77) and len(found) == 8 and Shape(4, 6, 2, 154) in found
    assert shapes_of(settings(input=("a=1x2,b=3", "a=1x3"))) == [
        Shape(inputs=(("a", (1, 2)), ("b", (3,)))),
        Shape(inputs=(("a", (1, 3)),)),
    ]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--size", "8"], "--size 8: give width and height in pixels, as 832x1216"),
        (["--size", "0x8"], "--size 0x8: give width and height"),
        (["--size", "8x8", "--height", "8"], "leave --height and --width out"),
        (["--batch", "0"], "'--batch': 0: give a number of 1 or more"),
        (["--batch", "one"], "'--batch': one: give a number"),
        (["--tokens", ","], "'--tokens': ,: give a number"),
        (["--input", "sample"], "--input sample: give names and shapes"),
        (["--input", "a=1,a=2"], "--input a=1,a=2: give names and shapes"),
        (["--input", "a=0"], "--input a=0: give names and shapes"),
        (["--input", "a=1", "--size", "8x8"], "leave --size, --batch and --tokens out"),
        ([f"--batch={','.join(map(str, range(1, 70)))}"], "69 shapes in one conversion: ask for at most 64"),
        (["--model", "m"], "--model: only with --add"),
        (["--add"], "--add: say which shape"),
        (["--add", "--size", "8x8", "--gpus", "2", "--dtype", "float16"], "--dtype, --gpus: not with --add"),
        (["--add", "--size", "8x8"], "there is no such bundle"),
    ],
    ids=" ".join,
)
def test_mistakes(argv: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problem in failing(capsys, "convert", "shape_nets:tiny", *argv)
    assert [p.name for p in folder.iterdir()] == ["shape_nets.py"]


def test_a_module_of_a_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--input", "sample=1x4x8x6", "--input", "sample=2x4x10x6,kinds=2x5"]
    assert main.main(["convert", "shape_nets:tiny", *shapes, "--backend", "eager", "--out", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes"] == ["1x4x8x6-1x3", "2x4x10x6-2x5"]
    new = ["--input", "sample=1x4x12x4"]
    assert "functions are called only where you name them" in failing(capsys, "convert", "--add", "b", *new)
    said = failing(capsys, "convert", "--add", "b", "--model", "shape_nets:tiny", "--input", "picture=1x2")
    assert "there is no tensor input picture: the inputs are sample 1x4x8x6" in said
    said = failing(capsys, "convert", "--add", "b", "--model", "shape_nets:tiny", *new, "--rules", "r")
    assert "was converted with no --rules: give the same" in said
    for added in (["1x4x12x4-1x3"], []):
        assert main.main(["convert", "--add", "b", "--model", "shape_nets:tiny", *new, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["added"] == added
    assert main.main(["verify", "b", "--model", "shape_nets:tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["shape"] for s in found["shapes"]] == ["1x4x8x6-1x3", "1x4x12x4-1x3", "2x4x10x6-2x5"]
    assert all(s["exact"]["ok"] for s in found["shapes"])
    assert main.main(["verify", "b", "--model", "shape_nets:tiny", "--shape", "1x4x12x4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == "1x4x12x4-1x3"
    assert main.main(["inspect", "b", "--json", "--shape", "2x4x10x6"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shapes"]["1x4x12x4-1x3"] == {"sample": [1, 4, 12, 4], "timestep": [], "kinds": [1, 3]}
    assert main.main(["inspect", "b"]) == 0
    assert "shape 2x4x10x6-2x5: sample 2x4x10x6, kinds 2x5" in capsys.readouterr().out
    assert "there is no shape '7'" in failing(capsys, "inspect", "b", "--shape", "7")


def test_the_shapes_to_draw_in() -> None:
    """Those of the size, for texts of any length, and of as few images as there are."""
    plans = {
        name: SimpleNamespace(options=SimpleNamespace(width=w, height=h, images=b))
        for name, (w, h, b) in {"a": (8, 4, 1), "b": (8, 4, 2), "c": (8, 4, 1), "d": (4, 8, 2)}.items()
    }
    assert of_size(plans, 8, 4) == ["a", "c"] and of_size(plans, 4, 8) == ["d"]  # type: ignore[arg-type]
    assert of_size(plans, 8, 8) == []  # type: ignore[arg-type]
    bundle: Any = SimpleNamespace(path="b", plans=plans, plan=plans["a"])

    def chosen(**given: Any) -> tuple[str, ...]:
        return chosen_shapes(bundle, given.get("size"), given.get("shape"))[0]

    assert chosen() == ("a", "c") and chosen(shape="b") == ("b",) and chosen(size="4x8") == ("d",)
    bundle.plan = plans["b"]
    bundle.plans = {"b": plans["b"], **plans}
    assert chosen() == ("b",) and chosen(size="8x4") == ("a", "c")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_pictures_of_a_new_size(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo: a size of the bundle, one that it does not have, and one that is added at its first use."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    argv = ["convert", "demo", "--backend", "eager", "--segments", "1", "--out", "b", "--size", "16x16", "--json"]
    assert main.main(argv) == 0
    draw = ["run", "b", "-p", "a red circle", "--steps", "5", "--size"]
    said = failing(capsys, *draw, "24x16")
    assert "b has no shape of 24x16" in said and "convert --add b --size 24x16`, or draw with --shapes auto" in said
    for number in range(2):
        assert main.main([*draw, "24x16", "--shapes", "auto", "--out", f"{number}.png"]) == 0
        assert image.open(f"{number}.png").size == (24, 16)
        assert len(Bundle.open("b").plans) == 2
    # their files differ in the hash of the bundle, to which the first run added a shape
    assert image.open("0.png").tobytes() == image.open("1.png").tobytes()
    assert main.main([*draw, "16x16", "--out", "first.png"]) == 0
    assert image.open("first.png").size == (16, 16)
    assert main.main(["bench", "b", "--shape", "24x16", "--calls", "2", "--json"]) == 0
