"""``--vae BUNDLE``: all ranks decode the picture, which is that of rank 0 alone."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from helpers_cli import failing
from helpers_serve import tiny_pipeline
from PIL import Image

from districompile.cli import main

pytest.importorskip("diffusers")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_decode_what_one_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, bundle, vae = tiny_pipeline(tmp_path / "tiny"), tmp_path / "bundle", tmp_path / "vae"
    options = ["--gpus", "2", "--backend", "eager", "--json"]
    assert main.main(["convert", str(model), *options, "--out", str(bundle)]) == 0
    assert main.main(["convert", str(model / "vae"), *options, "--size", "64x64", "--out", str(vae)]) == 0
    files = [tmp_path / "one.png", tmp_path / "all.png"]
    words = ["run", str(bundle), "--prompt", "a star", "--steps", "4"]
    assert main.main([*words, "--out", str(files[0])]) == 0
    assert main.main([*words, "--out", str(files[1]), "--vae", str(vae)]) == 0
    one, every = (numpy.asarray(Image.open(f)).astype(int) for f in files)
    assert one.shape == (64, 64, 3) and one.std() > 0 and abs(one - every).max() <= 1
    capsys.readouterr()
    assert "is no bundle of an autoencoder" in failing(capsys, *words, "--out", str(files[0]), "--vae", str(bundle))
