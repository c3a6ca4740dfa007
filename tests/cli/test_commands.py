"""Commands that start processes or write pictures, and the program itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import failing

from districompile.bundle.manifest import manifest_text
from districompile.cli import main, smoke_test
from districompile.errors import Error

ROOT = Path(__file__).resolve().parents[2]


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
    options = ["--calls", "2", "--original", "--model", "cli_nets:tiny"]
    assert main.main(["bench", str(made), *options, "--steps", "3", "--trace", "trace.json", "--json"]) == 0
    found = {figure["figure"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert found["original on one device"]["ms"] > 0 and found["original on one device"]["processes"] == 1
    for name in ("exact step", "displaced step"):
        assert found[name]["ms"] > 0 and found[f"{name}, transfers free"]["ms"] > 0
        assert found[f"{name}, transfers"]["sent_bytes"] > 0
        assert found[f"{name}, transfers"]["imbalance_ms"] >= 0
    assert found["run"]["steps"] == 3
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    arrows = {(e["pid"], e["cat"]) for e in events if e["ph"] == "f"}
    assert arrows >= {(r, c) for r in (0, 1) for c in ("start to wait", "rank to rank")}
    assert main.main(["bench", str(made), *options]) == 0
    text = capsys.readouterr().out
    for word in ("exposed:", "hidden:", "imbalance:", "original on one device", "times as fast", "loading the bundle"):
        assert word in text, word
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
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and found["backends"]["eager"]["usable"]
    assert found["backends"]["onnxruntime"]["tested_on"] == "CPU"
    assert main.main(["doctor"]) == 0
    assert "backend" in capsys.readouterr().out


@pytest.mark.slow
def test_trials_tell_how_far_a_backend_came(tmp_path: Path) -> None:
    assert re.match(r"ran on .*, exact to .*, displaced to .*", smoke_test.try_backend("eager"))
    assert smoke_test.try_backend("nonsense").startswith("failed while building engines: no backend named 'nonsense'")
    say = "import json, os, signal, time; print(json.dumps({'stage': 'loading engines'}), flush=True); "
    python = [sys.executable, "-X", "faulthandler", "-c"]
    crashed = smoke_test.follow([*python, say + "os.kill(os.getpid(), signal.SIGSEGV)"], tmp_path / "log", 60)
    assert crashed.startswith("crashed (SIGSEGV) while loading engines, in "), crashed
    stuck = smoke_test.follow([*python, say + "time.sleep(60)"], tmp_path / "log", 2)
    assert stuck == "stopped after 2 s while loading engines"
    failed = smoke_test.follow([*python, say + "raise ValueError('no such thing')"], tmp_path / "log", 60)
    assert failed == "failed while loading engines: ValueError: no such thing"


def test_images_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    from districompile.cli import generate

    images = generate.as_bytes(torch.rand(2, 3, 8, 6))
    written = [tmp_path / "a.png", tmp_path / "a-1.png"]
    records = [{"seed": 0}, {"seed": 1}]
    generate.save_images(images, written, records)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.png", "a.png"]
    assert image.open(written[0]).size == (6, 8)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = written[0].read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Error, match="a.png cannot be written: No space left on device"):
        generate.save_images(images, written, records)
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


@pytest.mark.always
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
        assert main.main([*words, "--out", name, "--json"]) == 0
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
    gone = str(folder / "gone")
    assert f"there is no model {gone} any more" in failing(capsys, "run", bundle, "--model", gone, "--out", "x.png")
    assert not (folder / "x.png").exists()


@pytest.mark.slow
def test_the_displaced_phase_draws_about_what_one_device_does(
    pixel_pipeline: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(pixel_pipeline), "--gpus", "2", "--backend", "eager", "--warmup-steps", "2", "--out", "b"]
    assert main.main(words) == 0
    capsys.readouterr()
    assert main.main(["verify", "b", "--steps", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift"]["psnr_db"] > 20 and found["drift"]["exact_steps"] >= 2


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


def test_bars_of_other_libraries_leave_no_semaphore() -> None:
    """Python warns of a semaphore that an ended process leaves behind; tqdm makes one unless it has another lock."""
    pytest.importorskip("tqdm")
    script = """
import multiprocessing, multiprocessing.resource_tracker as tracker, sys
multiprocessing.set_start_method("spawn")  # as in the process of a rank
if sys.argv[1] == "quiet":
    from districompile.cli.common import quiet_libraries
    quiet_libraries()
from tqdm.auto import tqdm
list(tqdm(range(2), disable=False))
print(tracker._resource_tracker._fd is not None)
"""
    found = [
        subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout.strip()
        for how in ("quiet", "plain")
    ]
    assert found == ["False", "True"]
