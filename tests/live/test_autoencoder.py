"""Test autoencoders whose decoder and encoder are bundles, as ``convert FOLDER/vae`` makes them."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_pipelines import SIZE, write_pipeline

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.bundle.manifest import manifest_text
from districompile.cli.main import main
from districompile.cli.pipeline import check_vae
from districompile.errors import BundleError, InputError
from districompile.models.autoencoder import wanted_parts
from districompile.models.inputs import ModelError
from districompile.models.sources import load_source

diffusers = pytest.importorskip("diffusers")
LATENTS = torch.randn(2, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1


def convert(folder: Path, out: Path, *words: str) -> None:
    ranks = [] if "--gpus" in words else ["--gpus", "2"]
    given = ["convert", str(folder), *ranks, "--backend", "eager", "--out", str(out), *words]
    assert main(given) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that starts from pictures, and the bundles of its VAE."""
    folder = tmp_path_factory.mktemp("autoencoder")
    write_pipeline(folder / "pipe", "StableDiffusionImg2ImgPipeline")
    convert(folder / "pipe" / "vae", folder / "bundles")
    return folder


@torch.no_grad()
def moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = vae.encode(pixels).latent_dist.parameters
    return found


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


def check_equal(vae: Any, original: Any) -> None:
    with torch.no_grad():
        assert same(vae.decode(LATENTS).sample, original.decode(LATENTS).sample)
        assert same(vae.decode(LATENTS[:1], return_dict=False)[0], original.decode(LATENTS[:1]).sample)
    assert same(moments(vae, PIXELS), moments(original, PIXELS))


def test_both_parts_take_the_place_of_the_autoencoder(home: Path) -> None:
    original = diffusers.AutoencoderKL.from_pretrained(home / "pipe" / "vae")
    vae = dc.load_vae(home / "bundles", lockstep=True)
    assert isinstance(vae, diffusers.AutoencoderKL) and vae.config.scaling_factor == original.config.scaling_factor
    assert vae.dtype == torch.float32 and vae.device.type == "cpu"
    check_equal(vae, original)  # also of two images: the bundles are of one
    with dc.enable(vae_only(original), 2, components=["vae"], lockstep=True, backend="eager", cache=home / "cache"):
        check_equal(original, dc.load_vae(home / "bundles", lockstep=True))


def test_the_dtype_of_the_caller(home: Path) -> None:
    """Pipelines of half precision pass their latents as they are, and raise some VAEs to float32 before."""
    vae, original = (dc.load_vae(home / "bundles", lockstep=True) for _ in "ab")
    assert vae.config.force_upcast is False  # a pipeline of half precision leaves the dtype alone
    vae.to(torch.float64)
    with torch.no_grad():
        got = vae.decode(LATENTS.half()).sample
    assert got.dtype == torch.float16 and vae.dtype == torch.float32
    with torch.no_grad():
        assert (got - original.decode(LATENTS.half().float()).sample).abs().max() <= 1e-2


def vae_only(vae: Any) -> Any:
    return types.SimpleNamespace(components={"vae": vae})


def test_a_pipeline_starts_from_a_picture(home: Path, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(home / "pipe", dtype=torch.float32)

    def draw() -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        picture = (PIXELS + 1) / 2
        found = pipe(["a", "b"], picture, num_inference_steps=3, strength=0.8, generator=seed, output_type="pt")
        return found.images  # type: ignore[no-any-return]

    want, pipe.vae = draw(), dc.load_vae(home / "bundles", lockstep=True)
    assert same(draw(), want)


def test_what_is_converted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The encoder belongs to pipelines that encode; either part can be asked for."""
    vae = str(home / "pipe" / "vae")
    index = home / "pipe" / "model_index.json"
    assert wanted_parts(vae, "auto") == ("decoder", "encoder") == wanted_parts(vae, "both")
    assert wanted_parts(vae, "encoder") == ("encoder",) and wanted_parts(str(home / "pipe"), "auto") == ()
    text = index.read_text()
    for name, parts in {
        "StableDiffusionPipeline": 1, "StableDiffusionInpaintPipeline": 2, "StableDiffusionXLInpaintPipeline": 2,
        "StableDiffusionInstructPix2PixPipeline": 2, "StableDiffusionXLPipeline": 1, "Nothing": 1,
    }.items():  # fmt: skip
        index.write_text(json.dumps({**json.loads(text), "_class_name": name}))
        assert len(wanted_parts(vae, "auto")) == parts, name
    index.write_text(text)
    with pytest.raises(ModelError, match="--part encoder: .*unet is not the folder of an AutoencoderKL"):
        wanted_parts(str(home / "pipe" / "unet"), "encoder")
    with pytest.raises(ModelError, match="UNet2DConditionModel has no part encoder"):
        load_source(f"{home / 'pipe' / 'unet'}#part=encoder")
    source = json.loads((home / "bundles" / "encoder" / "manifest.json").read_text())["source"]
    assert source.endswith("vae#part=encoder")
    capsys.readouterr()
    assert main(["verify", str(home / "bundles" / "encoder"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]["ok"]


def test_the_decoder_alone(home: Path, tmp_path: Path) -> None:
    convert(home / "pipe" / "vae", tmp_path / "decoder", "--part", "decoder")
    vae = dc.load_vae(tmp_path / "decoder", lockstep=True)
    with pytest.raises(InputError, match="has no encoder of the autoencoder: .* with --part both"):
        vae.encode(PIXELS)


def test_refusals(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        return capsys.readouterr().err

    message = refused("inspect", str(home / "bundles"))
    assert "it holds the bundles decoder, encoder: name one, such as" in message
    with pytest.raises(BundleError, match="has no bundle of an autoencoder"):
        dc.load_vae(home, lockstep=True)
    bundle = str(home / "bundles" / "decoder")
    vae = str(home / "pipe" / "vae")
    assert "is a bundle, and both parts need a folder of their own" in refused("convert", vae, "--out", bundle)


def test_parts_of_two_autoencoders_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from districompile.live import autoencoder

    read: Callable[[Path], dict[str, Any]] = autoencoder.read_manifest
    monkeypatch.setattr(autoencoder, "read_manifest", lambda p: {**read(p), "config": {"scaling_factor": p.name}})
    with pytest.raises(BundleError, match="has the parts of two autoencoders"):
        dc.load_vae(home / "bundles", lockstep=True)


@pytest.mark.slow
def test_run_decodes_and_encodes_on_all_processes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures are those of the original VAE, previews too; what does not fit is refused before the ranks meet."""
    from PIL import Image, ImageChops

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (SIZE, SIZE), (200, 40, 90)).save("start.png")
    convert(home / "pipe", tmp_path / "unet", "--batch", "2")
    words = ["run", "unet", "-p", "a", "--image", "start.png", "--strength", "0.7", "--steps", "4"]
    bundles = str(home / "bundles")
    more = ["--num-images", "3", "--preview-every", "2"]
    assert main([*words, *more, "--out", "ours.png", "--vae", bundles]) == 0
    assert main([*words, *more, "--out", "plain.png"]) == 0
    for suffix in ("", "-1", "-2", "-preview"):
        found = [Image.open(f"{name}{suffix}.png") for name in ("ours", "plain")]
        difference = ImageChops.difference(*found).getextrema()
        assert max(high for _, high in difference) <= 1, suffix  # type: ignore[misc]

    # Without a bundle of the encoder, each process encodes by itself
    assert main([*words, "--vae", str(home / "bundles" / "decoder"), "--out", "x.png"]) == 0
    difference = ImageChops.difference(Image.open("x.png"), Image.open("plain.png")).getextrema()
    assert max(high for _, high in difference) <= 1  # type: ignore[misc]
    assert main([*words, "--vae", str(home / "bundles" / "encoder"), "--out", "y.png"]) == 2
    assert "has no decoder: convert the VAE with --part both" in capsys.readouterr().err


def test_a_bundle_that_does_not_fit_the_pipeline_is_refused(home: Path, tmp_path: Path) -> None:
    """Before the ranks meet: another kind of network, another number of processes, another VAE."""

    def refused(vae: Path, ranks: int = 2, **config: Any) -> str:
        held = types.SimpleNamespace(vae=types.SimpleNamespace(config={**original.config, **config}))
        try:
            check_vae(vae, ranks, held)
        except dc.Error as e:
            return str(e)
        return ""

    original = diffusers.AutoencoderKL.from_pretrained(home / "pipe" / "vae")
    bundles = home / "bundles"
    assert refused(bundles) == "" == refused(bundles / "decoder")
    assert "has no decoder" in refused(bundles / "encoder")
    assert "its decoder is for 2 processes, and the network for 4: convert it with --gpus 4" in refused(
        bundles, ranks=4
    )
    assert "its scaling_factor is 0.18215, not 0.5" in refused(bundles, scaling_factor=0.5)
    other = tmp_path / "other"
    shutil.copytree(bundles / "decoder", other)
    text = (other / "manifest.json").read_text().replace('"class": "VaeDecoder"', '"class": "UNet2DConditionModel"')
    (other / "manifest.json").write_text(manifest_text({**json.loads(text), "sha256": ""}))
    assert "is no bundle of an autoencoder" in refused(other)
    assert Bundle.open(bundles / "encoder").manifest["class"] == "VaeEncoder"
