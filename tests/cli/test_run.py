"""``run``: what it draws from, how many, how files are named and what they hold, and what is refused before the work.

One rank runs in this process, as under torchrun; test_cli.py and tests/runtime have several processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.cli import checks, main
from districompile.cli.commands.run import parse_scaled
from districompile.cli.pictures import Targets, fitted, grid_of, read_record, write_picture
from districompile.errors import Error
from tests.helpers_errors import failing

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")
from tests.helpers_pipelines import SIZE, write_pipeline  # noqa: E402

STEPS = ("--steps", "5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, its bundle for one rank, and pictures."""
    home = tmp_path_factory.mktemp("home")
    convert(write_pipeline(home / "pipe"), home / "bundle")
    falling, round_ = (g.resize((48, 40)) for g in (Image.linear_gradient("L"), Image.radial_gradient("L")))
    Image.merge("RGB", (falling, falling.rotate(180), round_)).save(home / "start.png")
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    mask.save(home / "mask.png")
    Image.new("L", (8, 8)).save(home / "other.png")
    (home / "text.png").write_text("no picture")
    return home


def convert(model: Path, out: Path, *more: str) -> None:
    words = ["convert", str(model), "--gpus", "1", "--backend", "eager", "--out", str(out), "--warmup-steps", "2"]
    assert main.main([*words, "--drift-limit", "0", "--json", *more]) == 0


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which one rank runs in this process."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], bundle: Path, *words: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    prompt = () if "--prompts" in words else ("--prompt", "a red circle")
    assert main.main(["run", str(bundle), *prompt, *STEPS, *words, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def pixels(path: Path) -> bytes:
    with Image.open(path) as opened:
        assert opened.size == (SIZE, SIZE)
        data: bytes = opened.tobytes()
        return data


def test_prompts_and_seeds(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "prompts.txt").write_text("a red circle\n# none\na blue square\n")
    found, _ = run(capsys, home / "bundle", "--prompts", "prompts.txt", "--seeds", "3,7", "--grid", "--out", "a.png")
    names = ["a.png", "a-1.png", "a-2.png", "a-3.png"]
    cases = [("a red circle", 3), ("a red circle", 7), ("a blue square", 3), ("a blue square", 7)]
    assert found["pictures"] == [
        {"file": str(place / n), "prompt": p, "seed": s} for n, (p, s) in zip(names, cases, strict=True)
    ]
    assert found["grid"] == str(place / "a-grid.png") and found["calls"]["exact"] >= 4 * 2
    with Image.open(place / "a-grid.png") as sheet:
        assert sheet.size == (2 * SIZE, 2 * SIZE)
        for i, name in enumerate(names):
            x, y = i % 2 * SIZE, i // 2 * SIZE
            assert sheet.crop((x, y, x + SIZE, y + SIZE)).tobytes() == pixels(place / name)
    # A picture does not depend on those drawn with it.
    run(capsys, home / "bundle", "--seed", "7", "--num-images", "1", "--out", "b.png")
    assert pixels(place / "b.png") == pixels(place / "a-1.png") != pixels(place / "a.png")
    record = read_record(place / "a-1.png")
    manifest = json.loads((home / "bundle" / "manifest.json").read_text())
    assert record is not None and (record["prompt"], record["seed"], record["steps"]) == ("a red circle", 7, 5)
    assert record["bundle"] == manifest["sha256"] and record["scheduler"] == "DDIMScheduler"


@pytest.mark.slow
def test_a_batch_bundle_draws_the_same_pictures(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(home / "pipe", place / "two", "--batch", "2")
    found, _ = run(capsys, place / "two", "--out", "a.png")
    assert [p["seed"] for p in found["pictures"]] == [0, 1]
    run(capsys, place / "two", "--seeds", "0-2", "--out", "b.png")
    run(capsys, home / "bundle", "--seeds", "0-2", "--out", "c.png")
    for one, other in (("a", "b"), ("b", "c")):
        for name in ("", "-1"):
            a, b = (
                torch.frombuffer(bytearray(pixels(place / f"{n}{name}.png")), dtype=torch.uint8) for n in (one, other)
            )
            assert (a.int() - b.int()).abs().max() <= 1
    assert pixels(place / "b-2.png") and not (place / "b-3.png").exists()


def test_image_to_image_and_inpainting(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ("--image", str(home / "start.png"))
    found, err = run(capsys, home / "bundle", *image, "--strength", "0.6", "--out", "weak.png")
    assert sum(found["calls"].values()) == 3 and f"is 48x40, and is scaled and cropped to {SIZE}x{SIZE}" in err
    run(capsys, home / "bundle", *image, "--strength", "1", "--out", "strong.png")
    run(capsys, home / "bundle", *image, "--mask", str(home / "mask.png"), "--strength", "1", "--out", "part.png")
    run(capsys, home / "bundle", "--out", "noise.png")
    assert len({pixels(place / f"{n}.png") for n in ("weak", "strong", "part", "noise")}) == 4
    # The image-to-image pipeline of diffusers, around the original UNet, draws the same.
    import diffusers

    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(home / "pipe", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(home / "start.png") as opened:
        start = fitted(opened, (SIZE, SIZE), "RGB")
    expected = pipe(
        "a red circle", image=start, strength=0.6, num_inference_steps=5, generator=torch.Generator().manual_seed(0)
    ).images[0]
    a, b = (
        torch.frombuffer(bytearray(x), dtype=torch.uint8).int()
        for x in (expected.tobytes(), pixels(place / "weak.png"))
    )
    assert (a - b).abs().max() <= 2
    record = read_record(place / "part.png")
    assert record is not None and record["mask"] == str(home / "mask.png") and record["strength"] == 1


def test_schedulers_and_previews(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, home / "bundle", "--scheduler", "EulerDiscreteScheduler", "--preview-every", "2", "--out", "a.png")
    run(capsys, home / "bundle", "--out", "b.png")
    assert pixels(place / "a.png") != pixels(place / "b.png")
    record, unfinished = read_record(place / "a.png"), read_record(place / "a-preview.png")
    assert record is not None and record["scheduler"] == "EulerDiscreteScheduler" and "preview" not in record
    assert unfinished is not None and unfinished["preview"] is True
    assert pixels(place / "a-preview.png") != pixels(place / "a.png")


@pytest.mark.slow
def test_pipelines_that_start_from_a_picture(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A UNet that reads the picture beside the latents: run needs it, and verify makes one."""
    convert(write_pipeline(place / "inpaint", "StableDiffusionInpaintPipeline", 9), place / "nine")
    words = ("run", str(place / "nine"), "--prompt", "a", *STEPS)
    assert "--image is needed: the pipeline StableDiffusionInpaintPipeline" in failing(capsys, *words)
    image = ("--image", str(home / "start.png"))
    assert "--mask is needed" in failing(capsys, *words, *image)
    run(capsys, place / "nine", *image, "--mask", str(home / "mask.png"))
    assert pixels(place / "image.png")
    capsys.readouterr()
    assert main.main(["verify", str(place / "nine"), "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]["ok"] and found["drift"]["of"] == "image" and found["drift"]["relative_error"] < 1e-3


def test_verify_says_what_it_does_not_measure(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(home / "pipe" / "vae", place / "vae")
    capsys.readouterr()
    assert main.main(["verify", str(place / "vae")]) == 0
    assert "not measured, because the model has no sampling run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "{mask}"], "--mask: only with --image"),
        (["--strength", "0.5"], "--strength: only with --image"),
        (["--image", "none.png"], "--image none.png cannot be read: No such file"),
        (["--image", "{text}"], "cannot be read: it is no picture"),
        (["--image", "{start}", "--mask", "{other}"], "other.png is 8x8, and --image"),
        (["--image", "{start}", "--strength", "1.5"], "Invalid value for '--strength'"),
        (["--image", "{start}", "--strength", "0"], "Invalid value for '--strength'"),
        (["--image", "{start}", "--strength", "0.1"], "--strength 0.1 of 5 steps is less than one"),
        (["--seeds", "1,x"], "--seeds 1,x: give numbers"),
        (["--seeds", "1", "--num-images", "2"], "--seeds gives all seeds"),
        (["--seeds", "1", "--seed", "2"], "--seeds gives all seeds"),
        (["--prompts", "none.txt"], "--prompts and --prompt: give one"),
        (["--num-images", "20000"], "Invalid value for '--num-images'"),
        (["--scheduler", "Euler"], "did you mean EulerDiscreteScheduler or"),
        (["--scheduler", "UNet2DModel"], "has no scheduler of that name"),
        (["--lora", "none.safetensors=2"], "there is no file none.safetensors"),
        (["--lora", "{text}=1"], "a LoRA is read from a .safetensors file"),
        (["--timeout", "0"], "the timeout is 0 seconds"),
        (["--transport", "pigeon"], "pigeon"),
        (["--guidance", "0.5"], "--guidance must be above 1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_refused_before_the_work(
    words: list[str], message: str, home: Path, place: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from districompile.cli.commands import run_rank

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("it came to the work")

    monkeypatch.setattr(run_rank, "attach", loaded)
    names = {name: str(home / f"{name}.png") for name in ("start", "mask", "other", "text")}
    words = [w.format(**names) for w in words]
    line = failing(capsys, "run", str(home / "bundle"), "--prompt", "a", *STEPS, *words)
    assert message in line and not list(place.glob("*.png"))


def test_prompts_files(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompts none.txt cannot be read" in failing(capsys, "run", str(home / "bundle"), "--prompts", "none.txt")
    assert "--prompt is needed" in failing(capsys, "run", str(home / "bundle"), *STEPS)


def test_files_of_others_are_kept(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(place / "image-1.png")
    (place / "image.webp").write_text("mine")
    for words, name in (
        (("--num-images", "2"), "image-1.png"), (("--out", "image.webp"), "image.webp"),
    ):  # fmt: skip
        line = failing(capsys, "run", str(home / "bundle"), "--prompt", "a", *STEPS, *words)
        assert f"{name} exists, and districompile run did not draw it: give --force" in line
    assert not (place / "image.png").exists() and (place / "image.webp").read_text() == "mine"
    run(capsys, home / "bundle", "--num-images", "2", "--force")
    first = pixels(place / "image-1.png")
    run(capsys, home / "bundle", "--num-images", "2")  # its own are replaced
    assert pixels(place / "image-1.png") == first


def test_records_and_names(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".webp"):
        write_picture(tmp_path / f"a{suffix}", Image.new("RGB", (8, 8)), {"prompt": "\u00e9 <x>", "seed": 2**64 - 1})
        record = read_record(tmp_path / f"a{suffix}")
        assert record is not None and (record["prompt"], record["seed"]) == ("\u00e9 <x>", 2**64 - 1)
    write_picture(tmp_path / "a.bmp", Image.new("RGB", (8, 8)), {})
    assert read_record(tmp_path / "a.bmp") is None and read_record(tmp_path / "none") is None
    targets = Targets.of(Path("x/a.b.png"), 3, True, True)
    assert [str(p) for p in targets.pictures] == ["x/a.b.png", "x/a.b-1.png", "x/a.b-2.png"]
    assert (str(targets.grid), str(targets.preview)) == ("x/a.b-grid.png", "x/a.b-preview.png")
    assert grid_of([Image.new("RGB", (4, 2))] * 3, 2).size == (8, 4)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert fitted(clear, (2, 2), "RGB").getpixel((0, 0)) == (255, 255, 255)
    assert checks.seeds("1,2,5-8") == [1, 2, 5, 6, 7, 8]


def test_loras_are_named_with_a_scale(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a=b.safetensors"):
        (tmp_path / name).touch()
        assert parse_scaled(str(tmp_path / name), "--lora") == (tmp_path / name, 1.0)
        assert parse_scaled(f"{tmp_path / name}=-0.5", "--lora") == (tmp_path / name, -0.5)
    with pytest.raises(Exception, match="not a finite number"):
        parse_scaled(f"{tmp_path}/a.safetensors=nan", "--lora")
    with pytest.raises(Error, match="there is no file"):
        parse_scaled("=1", "--lora")


@pytest.mark.slow
def test_control_nets(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle with a ControlNet draws what diffusers draws with it, also from a picture; verify measures it."""
    import diffusers

    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel.from_pretrained(home / "pipe" / "unet")
    net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    net.save_pretrained(place / "net")
    convert(home / "pipe", place / "controlled", "--controlnet", str(place / "net"))
    start = str(home / "start.png")
    words = ("run", str(place / "controlled"), "--prompt", "a", *STEPS)
    assert "the bundle has 1 ControlNets, and 0 pictures are given" in failing(capsys, *words)
    assert "has 0 ControlNets" in failing(
        capsys, "run", str(home / "bundle"), *words[2:], "--control-image", start, "--out", "x.png"
    )
    run(capsys, place / "controlled", "--control-image", f"{start}=0.7", "--out", "a.png")
    run(capsys, place / "controlled", "--control-image", f"{start}=0", "--out", "off.png")
    run(capsys, home / "bundle", "--out", "plain.png")
    image = ("--image", start, "--strength", "0.6")
    run(capsys, place / "controlled", "--control-image", start, *image, "--out", "both.png")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        home / "pipe", controlnet=net, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    with Image.open(start) as opened:
        control = fitted(opened, (SIZE, SIZE), "RGB")
    expected = pipe(
        "a red circle", image=control, controlnet_conditioning_scale=0.7, num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert apart(expected.tobytes(), pixels(place / "a.png")) <= 2
    assert apart(pixels(place / "off.png"), pixels(place / "plain.png")) <= 1
    assert len({pixels(place / f"{n}.png") for n in ("a", "plain", "both")}) == 3
    capsys.readouterr()
    assert main.main(["verify", str(place / "controlled"), "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]["ok"] and found["drift"]["relative_error"] < 1e-3


def apart(a: bytes, b: bytes) -> int:
    """The largest difference of two pictures, of 255."""
    one, other = (torch.frombuffer(bytearray(x), dtype=torch.uint8).int() for x in (a, b))
    return int((one - other).abs().max())


def test_a_lora_is_that_of_a_refitted_bundle(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    torch.manual_seed(1)
    save_file(
        {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(16, 2)},
        place / "style.safetensors",
    )
    _, err = run(capsys, home / "bundle", "--lora", "style.safetensors=0.5", "--out", "a.png")
    assert "the bundle with the LoRA is kept in" in err
    _, err = run(capsys, home / "bundle", "--lora", "style.safetensors=0.5", "--out", "b.png")
    assert err == "" and len(list((place / "cache" / "districompile").iterdir())) == 1
    words = ["refit", str(home / "bundle"), "--lora", "style.safetensors", "--scale", "0.5", "--out", "styled"]
    assert main.main(words) == 0
    run(capsys, place / "styled", "--out", "c.png")
    run(capsys, home / "bundle", "--out", "plain.png")
    assert pixels(place / "a.png") == pixels(place / "b.png") == pixels(place / "c.png") != pixels(place / "plain.png")


@pytest.mark.slow
def test_a_lora_of_a_text_encoder(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is added to the encoder of every rank, as diffusers does."""
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    torch.manual_seed(1)
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    state = {
        f"{name}.lora_{half}.weight": torch.randn(*((2, width) if half == "A" else (rows, 2)))
        for name, rows, width in ((unet, 16, 128), (text, 128, 128)) for half in "AB"
    }  # fmt: skip
    save_file(state, place / "both.safetensors")
    run(capsys, home / "bundle", "--lora", "both.safetensors", "--out", "both.png")
    save_file({k: v for k, v in state.items() if k.startswith("unet")}, place / "unet.safetensors")
    run(capsys, home / "bundle", "--lora", "unet.safetensors", "--out", "unet.png")
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(home / "pipe", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(place / "both.safetensors"))
    drawn = pipe("a red circle", num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images[0]
    a, b = (
        torch.frombuffer(bytearray(x), dtype=torch.uint8).int() for x in (drawn.tobytes(), pixels(place / "both.png"))
    )
    assert (a - b).abs().max() <= 2 and pixels(place / "both.png") != pixels(place / "unet.png")


def test_the_parent_imports_nothing_heavy(home: Path) -> None:
    """It gets as far as the start of the ranks, of which there are none here."""
    script = """
import sys
from districompile.cli import main
from districompile.cli.commands import run
run.launch = lambda worker, args, count, log_dir: {"ranks": count} and {}
assert main.main(sys.argv[1:]) == 0
heavy = {"torch", "numpy", "diffusers", "transformers", "onnxruntime", "safetensors", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""
    words = [
        "run",
        str(home / "bundle"),
        "--prompt",
        "a",
        "--image",
        str(home / "start.png"),
        "--out",
        str(home / "n.png"),
    ]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr
