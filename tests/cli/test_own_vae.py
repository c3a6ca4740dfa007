"""The VAE in the folder of a bundle: ``convert`` puts it there, other commands find it and take it along."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers_cli import failing
from helpers_serve import tiny_pipeline
from PIL import Image

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.bundle.contents import check_contents, check_replaceable
from districompile.bundle.manifest import manifest_text, read_manifest
from districompile.bundle.own_vae import own_vae
from districompile.cli import main
from districompile.cli.commands import convert, convert_vae
from districompile.cli.commands.run import _bundle_folder
from districompile.cli.common import UsageError
from districompile.cli.convert import Settings
from districompile.cli.pipeline import chosen_vae
from districompile.cli.run import Settings as RunSettings
from districompile.errors import BundleError, ConvertError, Error
from districompile.models.autoencoder import autoencoder_of, overflows_in_float16
from districompile.models.inputs import ModelError

pytest.importorskip("diffusers")
GPU, CPU = types.SimpleNamespace(device="cuda"), types.SimpleNamespace(device="cpu")
OPTIONS = ["--gpus", "2", "--backend", "eager"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and its bundle with a VAE."""
    folder = tmp_path_factory.mktemp("own")
    model = tiny_pipeline(folder / "tiny")
    assert main.main(["convert", str(model), *OPTIONS, "--vae", "--json", "--out", str(folder / "b")]) == 0
    return folder


def test_one_backend_builds_network_and_vae(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its workers are at work already when the VAE begins."""
    made, make = [], convert.make_backend
    monkeypatch.setattr(convert, "make_backend", lambda settings: made.append(settings.backend) or make(settings))
    command = ["convert", str(home / "tiny"), *OPTIONS, "--vae", "--json", "--out", str(tmp_path / "b")]
    assert main.main(command) == 0
    assert made == ["eager"] and own_vae(Bundle.open(tmp_path / "b")) == (tmp_path / "b" / "vae", None)


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "b", tmp_path / "b"))


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder, by its inode."""
    return {p.relative_to(folder).as_posix(): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest of a bundle, with its own hash."""
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(manifest_text({**manifest, **changes}))


def test_the_manifest_covers_the_vae(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(home / "b")
    assert bundle.manifest["vae"] == {"vae": read_manifest(home / "b" / "vae")["sha256"]}
    assert own_vae(bundle) == (home / "b" / "vae", None)
    assert not any(name.startswith("vae/") for name in bundle.manifest["files"])
    assert Bundle.open(home / "b" / "vae").manifest["class"] == "VaeDecoder"
    assert {p.name for p in home.iterdir()} == {"tiny", "b"}  # nothing is left beside it
    capsys.readouterr()
    assert main.main(["inspect", str(home / "b")]) == 0
    assert f"\nVAE: {home / 'b' / 'vae'}: decoder float32 64x64-b1\n" in capsys.readouterr().out
    assert main.main(["inspect", str(home / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vae"]
    assert found["parts"] == {"decoder": {"dtype": "float32", "shapes": ["64x64-b1"]}} and found["problem"] is None


def test_the_folder_of_a_bundle_names_its_vae(home: Path) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    import diffusers

    original = diffusers.AutoencoderKL.from_pretrained(home / "tiny" / "vae")
    with torch.no_grad():
        got, want = dc.load_vae(home / "b", lockstep=True).decode(latents).sample, original.decode(latents).sample
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def reason(folder: Path) -> str:
    """The note of a VAE that is not used."""
    bundle = Bundle.open(folder)
    vae, note = chosen_vae(None, bundle, bundle.plans.values())
    assert vae is None and note is not None and "\n" not in note
    return note


def test_a_vae_that_is_not_the_bundles_own_is_not_used(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signature of the bundle's manifest signs the VAE: another one is loaded only where it is named."""
    bundle = Bundle.open(copy)
    assert chosen_vae(None, bundle, bundle.plans.values()) == (copy / "vae", None)
    assert chosen_vae("none", bundle, bundle.plans.values()) == (None, None)
    rewrite(copy / "vae", created="2000-01-01T00:00:00+00:00")
    note = reason(copy)
    assert note.startswith("the first process decodes alone: ") and "was changed since (--vae" in note
    assert chosen_vae(str(copy / "vae"), bundle, bundle.plans.values()) == (copy / "vae", None)
    assert main.main(["inspect", str(copy)]) == 0
    assert "\nVAE: not used, because " in capsys.readouterr().out
    (copy / "vae" / "manifest.json").write_text("{")
    assert "cannot be read" in reason(copy)
    shutil.rmtree(copy / "vae")
    assert "vae is missing: copy the bundle again" in reason(copy)
    rewrite(copy, vae={})
    assert own_vae(Bundle.open(copy)) == (None, None)
    rewrite(copy, vae={"other": "0" * 64})
    with pytest.raises(BundleError, match="cannot be used: vae"):
        Bundle.open(copy)


def test_a_vae_that_cannot_decode_the_picture(home: Path, copy: Path) -> None:
    bundle = Bundle.open(copy)

    def plan(**options: Any) -> Any:
        return dataclasses.replace(bundle.plan, options=dataclasses.replace(bundle.plan.options, **options))

    vae, note = chosen_vae(None, bundle, [plan(width=96)])
    assert vae is None and note is not None
    assert "its decoder does not have the size 96x64 (it has: 64x64); `districompile convert --add" in note
    assert chosen_vae(None, bundle, [plan(images=3)])[0] is not None  # one after the other
    assert chosen_vae(None, bundle, [plan(width=None)])[0] is not None
    with pytest.raises(UsageError, match="--vae .*vae: its decoder does not have the size 96x64"):
        chosen_vae(str(copy / "vae"), bundle, [plan(width=96)])
    next((copy / "vae" / "engines").iterdir()).unlink()
    assert "is missing" in reason(copy)


def test_replacing_a_bundle_replaces_its_vae(home: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Bundle.open(copy).manifest["made_with"]
    assert any(name.startswith("vae/engines/") for name in check_contents(copy))
    check_replaceable(copy, made, False)
    (copy / "vae" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"holds vae/notes\.txt, which is not a file of the bundle"):
        check_replaceable(copy, made, True)
    (copy / "vae" / "notes.txt").unlink()
    rewrite(copy / "vae", created="2000-01-01T00:00:00+00:00")
    with pytest.raises(BundleError, match="vae was not made with the bundle around it: give --force"):
        check_replaceable(copy, made, False)
    check_replaceable(copy, made, True)
    manifest = json.loads((copy / "vae" / "manifest.json").read_text())
    manifest["files"]["../../victim"] = {"size": 0, "sha256": "0" * 64}
    (copy / "vae" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="holds vae"):  # whose names are not followed
        check_contents(copy)


def test_other_weights_take_the_vae_along(home: Path, copy: Path, tmp_path: Path) -> None:
    before = tree(copy / "vae")
    words = ["refit", str(copy), "--weights", str(home / "tiny"), "--json"]
    assert main.main([*words, "--out", str(tmp_path / "new")]) == 0
    assert tree(tmp_path / "new" / "vae") == before  # hard links
    assert own_vae(Bundle.open(tmp_path / "new")) == (tmp_path / "new" / "vae", None)
    assert main.main(words) == 0
    assert tree(copy / "vae") == before and own_vae(Bundle.open(copy)) == (copy / "vae", None)
    rewrite(copy / "vae", created="2000-01-01T00:00:00+00:00")
    assert main.main(words) == 0  # also one that is not its own
    assert tree(copy / "vae").keys() == before.keys() and "was changed" in str(own_vae(Bundle.open(copy))[1])


@pytest.mark.slow
def test_sizes_are_added_to_the_vae(home: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(*words: str) -> Any:
        capsys.readouterr()
        assert main.main(["convert", "--add", str(copy), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    def sizes() -> list[str]:
        return list(Bundle.open(copy / "vae").plans)

    found = add("--size", "96x64", "--no-vae")
    assert found["added"] == ["96x64-b1-t24"] and found["vae"] == {} and sizes() == ["64x64-b1"]
    found = add("--size", "96x64")  # the VAE catches up
    assert found["added"] == [] and found["vae"] == {"vae": ["96x64-b1"]} and sizes() == ["64x64-b1", "96x64-b1"]
    bundle = Bundle.open(copy)
    assert chosen_vae(None, bundle, bundle.plans.values()) == (copy / "vae", None)
    assert add("--size", "96x64")["vae"] == {}
    assert {p.name for p in copy.parent.iterdir()} == {"b"}
    shutil.rmtree(copy / "vae")
    assert "vae is missing" in failing(capsys, "convert", "--add", str(copy), "--size", "64x64", "--vae")
    rewrite(copy, vae={})
    assert "has no VAE to add sizes to" in failing(capsys, "convert", "--add", str(copy), "--size", "64x64", "--vae")


def test_it_is_the_default_for_gpus(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(home / "tiny")

    def wanted(backend: Any, **given: Any) -> str | None:
        return convert_vae.wanted_vae(Settings(**{"model": model, "gpus": 2, **given}), backend)

    vae = f"{model}/vae"
    assert wanted(GPU) == vae and wanted(CPU) is None and wanted(CPU, vae=True) == vae
    assert wanted(GPU, vae=False) is None and wanted(GPU, gpus=1) is None and wanted(GPU, gpus=1, vae=True) == vae
    for other in ("nets:tiny", "owner/name", f"{model}/unet", vae, str(tmp_path)):
        assert wanted(GPU, model=other) is None
        with pytest.raises(UsageError, match="is not the folder of a pipeline with a VAE"):
            wanted(CPU, model=other, vae=True)
    assert wanted(GPU, stop_after="cse") is None and wanted(GPU, input=("sample=1x4x8x8",)) is None
    with pytest.raises(UsageError, match="--vae: not with --stop-after"):
        wanted(GPU, stop_after="cse", vae=True)
    assert capsys.readouterr().err == ""
    other = shutil.copytree(home / "tiny", tmp_path / "tiny")
    (other / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    assert wanted(GPU, model=str(other)) is None
    assert "note: the VAE is not converted, so that the first process decodes alone" in capsys.readouterr().err
    with pytest.raises(UsageError, match="of the class 'VQModel', and only an AutoencoderKL can be converted"):
        wanted(CPU, model=str(other), vae=True)


def test_a_vae_that_was_asked_for_and_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, "convert", str(home / "tiny" / "unet"), *OPTIONS, "--vae")
    assert message.startswith("--vae: ") and message.endswith("unet is not the folder of a pipeline with a VAE")


@pytest.mark.parametrize("failure", [ConvertError("too few rows"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_bundle_stays_whole_where_its_vae_fails(
    failure: BaseException, home: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "vae")
    rewrite(copy, vae={})
    before = tree(copy)

    def fail(settings: Settings, backend: Any) -> Any:
        assert settings.size == ("64x64",) and settings.backend == "eager" and settings.gpus == 2
        assert settings.out is not None
        settings.out.mkdir()
        raise failure

    monkeypatch.setattr(convert, "convert_one", fail)
    settings = Settings(model=str(home / "tiny"), backend="eager")
    vae = f"{settings.model}/vae"
    if isinstance(failure, Error):
        assert convert_vae.convert_into(copy, vae, settings, convert.convert_parts) is None
        assert "note: the VAE is not converted, so that the first process decodes alone: too few" in (
            capsys.readouterr().err
        )
        settings = dataclasses.replace(settings, vae=True)
    with pytest.raises(type(failure)):
        convert_vae.convert_into(copy, vae, settings, convert.convert_parts)
    assert tree(copy) == before and {p.name for p in copy.parent.iterdir()} == {"b"}


def test_float16_overflows_in_some(home: Path, tmp_path: Path) -> None:
    """The configuration says so. Where it is silent, the pipeline says whether diffusers' default counts."""
    folder = shutil.copytree(home / "tiny", tmp_path / "tiny")
    config, index = folder / "vae" / "config.json", folder / "model_index.json"
    vae = autoencoder_of(str(folder))
    assert vae == str(folder / "vae") and overflows_in_float16(vae)
    settings = Settings(model=str(folder), dtype="float16", backend="eager")
    bundle = Bundle.open(home / "b", verify=False)
    assert convert_vae._settings(bundle, vae, settings, tmp_path).dtype == "float32"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "force_upcast": False}))
    assert not overflows_in_float16(vae)
    assert convert_vae._settings(bundle, vae, settings, tmp_path).dtype == "float16"
    del values["force_upcast"]
    config.write_text(json.dumps(values))
    assert not overflows_in_float16(vae)
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionXLPipeline"}))
    assert overflows_in_float16(vae)


def test_which_vae_a_pipeline_has(home: Path, tmp_path: Path) -> None:
    model = home / "tiny"
    assert autoencoder_of("demo") is not None and autoencoder_of(f"{model}+controlnet:x") == str(model / "vae")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert autoencoder_of(f"{file}#config={model}") == f"{file}#config={model / 'vae'}"
    assert autoencoder_of(str(file)) is None
    other = shutil.copytree(model, tmp_path / "tiny")
    weights = next((other / "vae").glob("*.safetensors"))
    assert autoencoder_of(f"{other}#variant=fp16") == str(other / "vae")  # the network alone has that variant
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert autoencoder_of(f"{other}#variant=fp16") == f"{other / 'vae'}#variant=fp16"
    index = other / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae": [None, None]}))
    assert autoencoder_of(str(other)) is None
    (other / "vae" / "config.json").write_text("no JSON")
    index.write_text((model / "model_index.json").read_text())
    with pytest.raises(ModelError, match="cannot be read"):
        autoencoder_of(str(other))


def test_the_server_loads_the_vae_that_its_supervisor_chose(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from districompile.runtime.processes import launcher
    from districompile.serve.jobs import GroupOptions, Start
    from districompile.serve.supervisor import _launch

    starts: list[Start] = []
    monkeypatch.setattr(
        launcher, "launch", lambda f, given, *_, **__: starts.append(Start.model_validate_json(given[0]))
    )
    for asked, chosen in ((None, str(home / "b" / "vae")), ("none", "none"), (str(home / "b"), str(home / "b"))):
        options = GroupOptions(bundle=home / "b", vae=asked)
        _launch(Start(address=str(home / "socket"), secret="x", options=options))
        assert starts.pop().options.vae == chosen


@pytest.mark.slow
def test_a_model_that_run_converts_has_a_vae_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``convert`` decides. The cached bundle has it whatever ``--vae`` says, which decides of its use alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(convert_vae, "wanted_vae", lambda conversion, backend: f"{conversion.model}/vae")
    settings = RunSettings(bundle=str(home / "tiny"), backend="eager", vae="none")
    folder = _bundle_folder(settings)
    capsys.readouterr()
    assert own_vae(Bundle.open(folder)) == (folder / "vae", None)
    assert _bundle_folder(dataclasses.replace(settings, vae=None)) == folder and capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_ranks_decode_by_default(
    home: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(copy), "--prompt", "a star", "--steps", "3"]

    def picture(name: str, *more: str) -> tuple[Any, str]:
        capsys.readouterr()
        assert main.main([*words, "--out", str(tmp_path / name), *more]) == 0
        return numpy.asarray(Image.open(tmp_path / name)).astype(int), capsys.readouterr().err

    (every, noted), (one, silent) = picture("all.png"), picture("one.png", "--vae", "none")
    assert "decodes alone" not in noted + silent
    assert every.shape == (64, 64, 3) and every.std() > 0 and abs(one - every).max() <= 1
    wide, noted = picture("wide.png", "--shapes", "auto", "--size", "96x64")
    assert wide.shape == (64, 96, 3) and "note: the first process decodes alone: " in noted
    assert "does not have the size 96x64" in noted
    assert own_vae(Bundle.open(copy)) == (copy / "vae", None)  # the new shape left it alone
    shutil.rmtree(copy / "vae")
    alone, noted = picture("alone.png")
    assert "note: the first process decodes alone: " in noted and (alone == one).all()
