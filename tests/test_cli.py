"""The command line: every error a user can cause is one line with exit code 2; results are what the core gave."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile import cli
from districompile.commands import trial
from districompile.errors import BackendError, Error
from districompile.manifest import manifest_text

ROOT = Path(__file__).resolve().parent.parent

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.outer = torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample, timestep):
        return self.outer(torch.nn.functional.silu(self.norm(self.inner(sample)) + timestep * 1e-3))

def tiny():
    return Net(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"sample": 2}

def wrong_rows():
    return Net(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"picture": 2}

class Branching(Net):
    def forward(self, sample, timestep):
        return super().forward(sample, timestep) if sample.sum() > 0 else sample

def branching():
    return Branching(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"sample": 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of factories in it."""
    (tmp_path / "cli_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cli_nets", None)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle of the tiny net for two ranks; tests that damage it copy it first."""
    home = tmp_path_factory.mktemp("made")
    (home / "cli_nets.py").write_text(NETS)
    sys.modules.pop("cli_nets", None)
    sys.path.insert(0, str(home))
    try:
        assert cli.main(["convert", "cli_nets:tiny", "--backend", "eager", "--out", str(home / "b"), "--json"]) == 0
        yield home / "b"
    finally:
        sys.path.remove(str(home))


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail; returns its one line, without ``error:``."""
    capsys.readouterr()
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in ("convert", "inspect", "verify", "run", "refit", "bench", "doctor"):
        assert name in out
    assert cli.main(["convert", "--help"]) == 0
    assert "--warmup-steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compile"], "No such command 'compile'."),
        (["convert"], "Missing argument 'MODEL'."),
        (["convert", "demo", "--gpus", "0"], "Invalid value for '--gpus' / '-n': "),
        (["convert", "demo", "--gpus", "two"], "Invalid value for '--gpus' / '-n': "),
        (["convert", "demo", "--cfg", "half"], "Invalid value for '--cfg': "),
        (["convert", "demo", "--groupnorm", "batch"], "Invalid value for '--groupnorm': "),
        (["convert", "demo", "--warmup-steps", "0"], "Invalid value for '--warmup-steps': "),
        (["convert", "demo", "--batch", "0"], "Invalid value for '--batch': "),
        (["convert", "demo", "--colour", "red"], "No such option: --colour"),
        (["run", "demo", "--steps", "0"], "Invalid value for '--steps': "),
        (["inspect", "x", "--graph", "hot"], "Invalid value for '--graph': "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, *words).startswith(message)


def test_unknown_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = "give 'demo', a diffusers folder, a hub id (owner/name), or package.module:factory"
    assert failing(capsys, "convert", "nonsense") == f"unknown model 'nonsense': {accepted}"
    assert failing(capsys, "run", "nonsense") == f"unknown model 'nonsense': {accepted}"
    assert "has no 'nothing'" in failing(capsys, "convert", "cli_nets:nothing")
    assert "fixes its own inputs" in failing(capsys, "convert", "cli_nets:tiny", "--height", "64")
    assert not list(folder.glob("*gpu"))


def test_conversions_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager = ["--backend", "eager", "--out", "b"]
    assert "rows" in failing(capsys, "convert", "cli_nets:wrong_rows", *eager)
    assert "25" in failing(capsys, "convert", "cli_nets:tiny", "--gpus", "25", *eager)
    assert "must be even, not 3" in failing(capsys, "convert", "cli_nets:tiny", "--gpus", "3", "--cfg", "split", *eager)
    assert "cannot displace 'colour'" in failing(capsys, "convert", "cli_nets:tiny", "--displace", "colour", *eager)
    assert "no_module" in failing(capsys, "convert", "cli_nets:tiny", "--passes", "no_module:P", *eager)
    assert "no_rules" in failing(capsys, "convert", "cli_nets:tiny", "--rules", "no_rules", *eager)
    assert "no pass named 'nap'" in failing(capsys, "convert", "cli_nets:tiny", "--skip", "nap", *eager)
    assert "no pass named 'nap'" in failing(capsys, "convert", "cli_nets:tiny", "--stop-after", "nap", *eager)
    assert cli.main(["convert", "cli_nets:branching", *eager]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: Branching cannot be exported: ")
    assert not (folder / "b").exists()


def test_backends(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no backend named 'fast'; there are: " in failing(capsys, "convert", "cli_nets:tiny", "--backend", "fast")

    def missing(name: str) -> None:
        raise BackendError(f"the backend {name} needs onnxruntime: pip install 'districompile[onnxruntime]'")

    from districompile.commands import convert

    monkeypatch.setattr(convert, "get_backend", missing)
    line = failing(capsys, "convert", "cli_nets:tiny")
    assert line == "the backend onnxruntime needs onnxruntime: pip install 'districompile[onnxruntime]'"


def test_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("text")
    assert "mine exists and is not a bundle" in failing(capsys, "convert", "cli_nets:tiny", "--out", "mine")
    assert "cannot be written" in failing(capsys, "convert", "cli_nets:tiny", "--out", "cli_nets.py/b")
    assert "no image format" in failing(capsys, "run", "cli_nets:tiny", "--out", "image.xyz")
    assert (folder / "mine" / "thesis.txt").read_text() == "text"


def test_missing_and_damaged_bundles(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert "there is no such bundle" in failing(capsys, command, "nowhere")
        assert "is not a bundle" in failing(capsys, command, str(folder))
    damaged = folder / "damaged"
    shutil.copytree(made, damaged)
    weights = damaged / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "weights.safetensors was changed" in failing(capsys, "verify", str(damaged))
    weights.write_bytes(data[:-10])
    assert "weights.safetensors has" in failing(capsys, "inspect", str(damaged))
    weights.unlink()
    assert "weights.safetensors is missing" in failing(capsys, "inspect", str(damaged))
    (damaged / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in failing(capsys, "inspect", str(damaged))


def test_convert_and_inspect(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["ranks"] == 2
    assert found["report"]["rows"] == {"24": [12, 12]}
    assert found["report"]["fallbacks"] == []
    assert found["report"]["sites"]["conv"]["count"] == 1
    assert found["manifest"]["backend"] == "eager" and found["manifest"]["source"] == "cli_nets:tiny"
    assert cli.main(["inspect", str(made)]) == 0
    text = capsys.readouterr().out
    assert "rows per rank" in text and "fallbacks: none" in text and "passes: " in text
    for phase in ("warmup", "steady"):
        assert cli.main(["inspect", str(made), "--graph", phase]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{phase}: ") and "\nrun  " in text and "\npost " in text and "\nwait " in text


def test_convert_prints_what_it_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "cli_nets:tiny", "--gpus", "3", "--backend", "eager", "--dump", "graphs"]) == 0
    out = capsys.readouterr().out
    assert "rows per rank" in out and "tiny-3gpu" in out
    assert (folder / "tiny-3gpu" / "manifest.json").is_file()
    assert len(list((folder / "graphs").glob("*.txt"))) > 3
    # A bundle is replaced by a new one of the same name.
    assert cli.main(["convert", "cli_nets:tiny", "--gpus", "3", "--backend", "eager"]) == 0


def test_stop_after_prints_the_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "cli_nets:tiny", "--stop-after", "drop-noops"]) == 0
    assert "conv2d" in capsys.readouterr().out
    assert not (folder / "tiny-2gpu").exists()


def test_verify(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ("--model", "cli_nets:tiny")
    capsys.readouterr()
    assert cli.main(["verify", str(made), *known, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]["ok"] and found["exact"]["max_relative_error"] <= 1e-5
    assert found["drift"] is None
    assert cli.main(["verify", str(made), *known, "--tolerance", "0"]) in (0, 1)
    assert cli.main(["verify", str(made), *known]) == 0
    assert "exact phase: largest relative error" in capsys.readouterr().out


def test_verify_finds_another_model(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cli_other.py").write_text(NETS.replace("manual_seed(0)", "manual_seed(1)"))
    capsys.readouterr()
    assert cli.main(["verify", str(made), "--model", "cli_other:tiny"]) == 1
    assert "ABOVE the tolerance" in capsys.readouterr().out


def test_run_needs_what_it_needs(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, "run", str(made), "--gpus", "4", "--height", "64")
    assert line.startswith("--height, --gpus: only for a MODEL;")
    assert "--guidance above 1 needs --cfg batch or split" in failing(capsys, "run", str(made), "--guidance", "5")
    assert "is not a diffusers pipeline" in failing(capsys, "run", str(made))
    assert not list(folder.glob("image*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bench(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["bench", str(made), "--calls", "2", "--steps", "3", "--trace", "trace.json"]) == 0
    found = {line["figure"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for name in ("exact step", "displaced step"):
        assert found[name]["ms"] > 0 and found[f"{name}, transfers free"]["ms"] > 0
        assert found[f"{name}, transfers"]["sent_bytes"] > 0
    assert found["run"]["steps"] == 3
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert failing(capsys, "bench", str(made), "--kernels", "k.txt").startswith("--kernels lists the kernels of a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bundle_for_a_gpu_starts_nothing_without_one(
    made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, folder / "gpu")
    manifest = folder / "gpu" / "manifest.json"
    manifest.write_text(manifest_text({**json.loads(manifest.read_text()), "device": "cuda: sm89"}))
    for command in ("run", "bench"):
        line = failing(capsys, command, "gpu")
        assert line.startswith("gpu was made for a GPU, and there is none here"), line
    for command in ("run", "bench", "verify"):
        line = failing(capsys, command, str(made), "--device", "cuda")
        assert re.search(
            "(cannot run on a GPU: there is none here|only bundles of the eager backend run on cuda)", line
        )


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and found["backends"]["eager"]["usable"]
    assert found["backends"]["onnxruntime"]["tested_on"] == "CPU"
    assert cli.main(["doctor"]) == 0
    assert "backend" in capsys.readouterr().out


@pytest.mark.slow
def test_trials_tell_how_far_a_backend_came(tmp_path: Path) -> None:
    assert re.match(r"ran on .*, exact to .*, displaced to .*", trial.try_backend("eager"))
    assert trial.try_backend("nonsense").startswith("failed while building engines: no backend named 'nonsense'")
    say = "import json, os, signal, time; print(json.dumps({'stage': 'loading engines'}), flush=True); "
    python = [sys.executable, "-X", "faulthandler", "-c"]
    crashed = trial.follow([*python, say + "os.kill(os.getpid(), signal.SIGSEGV)"], tmp_path / "log", 60)
    assert crashed.startswith("crashed (SIGSEGV) while loading engines, in "), crashed
    stuck = trial.follow([*python, say + "time.sleep(60)"], tmp_path / "log", 2)
    assert stuck == "stopped after 2 s while loading engines"
    failed = trial.follow([*python, say + "raise ValueError('no such thing')"], tmp_path / "log", 60)
    assert failed == "failed while loading engines: ValueError: no such thing"


def test_images_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    from districompile.commands import drawing

    pixels = torch.rand(2, 3, 8, 6)
    written = drawing.save_images(pixels, tmp_path / "a.png")
    assert [p.name for p in written] == ["a.png", "a-1.png"] == sorted(p.name for p in tmp_path.iterdir())[::-1]
    assert image.open(written[0]).size == (6, 8)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = written[0].read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Error, match="a.png cannot be written: No space left on device"):
        drawing.save_images(pixels, tmp_path / "a.png")
    assert written[0].read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def pixel_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline without text or VAE, whose random UNet has 16 rows."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pixels") / "pipe"
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.multiprocess
def test_run_draws_on_two_processes(
    pixel_pipeline: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    words = ["run", str(pixel_pipeline), "--gpus", "2", "--backend", "eager", "--warmup-steps", "2", "--steps", "5"]
    pictures = []
    for name in ("first.png", "second.png"):
        capsys.readouterr()
        assert cli.main([*words, "--out", name, "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["images"] == [str(folder / name)] and found["processes"] == 2
        # Converted once, then taken from the cache.
        assert ("the bundle is kept in" in err) == (name == "first.png")
        picture = image.open(folder / name)
        assert picture.size == (16, 16)
        pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]
    bundle = json.loads(out)["bundle"]
    # The displaced phase of two ranks draws about what one device draws.
    assert cli.main(["verify", bundle, "--steps", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift"]["psnr_db"] > 20 and found["drift"]["exact_steps"] >= 2
    gone = str(folder / "gone")
    assert f"there is no model {gone} any more" in failing(capsys, "run", bundle, "--model", gone, "--out", "x.png")
    assert not (folder / "x.png").exists()


def program(*words: str, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "districompile", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more,
    )  # fmt: skip


def test_as_a_program(folder: Path) -> None:
    process = program("convert", "nonsense", cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: unknown model 'nonsense'") and len(err.splitlines()) == 1


def test_interrupt_leaves_no_traceback(folder: Path) -> None:
    (folder / "slow_nets.py").write_text(
        "import pathlib, time\ndef slow():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    # What a shell starts in the background ignores the signal, and so would what that starts
    process = program(
        "convert",
        "slow_nets:slow",
        cwd=folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and out == ""
