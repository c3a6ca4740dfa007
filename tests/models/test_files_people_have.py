"""Files that people have: a single file under the original names, variants, shards, and pickles, which are refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from districompile.cli import main
from districompile.errors import ValueWarning
from districompile.models.files import find_variant
from districompile.models.inputs import ModelError
from districompile.models.origin import Origin
from districompile.models.sources import DEMO, load_pipeline, load_source, pipeline_location

diffusers = pytest.importorskip("diffusers")

CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
    "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
XL = {
    **CONFIG, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36, "use_linear_projection": True,
}  # fmt: skip
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
          "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
          "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def original_name(name: str, layers: int, up_blocks: Sequence[str]) -> str:
    """Return the name that a tensor of a UNet has in the original code (github.com/CompVis/latent-diffusion)."""
    module, _, tensor = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{tensor}"
    found = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert found is not None, name
    side, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        inner, _, tail = rest.partition(".")
        rest = f"{_RESNET[inner]}.{tail}"
    if side == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{rest}"
    step = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{1 + block * step + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attended = up_blocks[block].startswith("Cross")
        return f"output_blocks.{block * step + layers}.{2 if attended else 1}.{rest}"
    number = 1 + block * step + index if side == "down" else block * step + index
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"


def unet_of(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**config).eval()


def pipeline_folder(folder: Path, unet: Any) -> Path:
    """Write a folder of configuration, without weights of the UNet."""
    unet.save_config(folder / "unet")
    parts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(parts))
    return folder


def single_file(path: Path, unet: Any, **more: Tensor) -> Path:
    layers, up_blocks = unet.config.layers_per_block, unet.config.up_block_types
    state = {f"model.diffusion_model.{original_name(n, layers, up_blocks)}": t for n, t in unet.state_dict().items()}
    assert len(state) == len(unet.state_dict())
    save_file({n: t.clone() for n, t in {**state, **more}.items()}, path)
    return path


@pytest.mark.parametrize("config", [CONFIG, XL], ids=["sd1", "xl"])
def test_original_names(tmp_path: Path, config: dict[str, Any]) -> None:
    unet = unet_of(config)
    folder, other = pipeline_folder(tmp_path / "kind", unet), {"cond_stage_model.x": torch.zeros(2)}
    file = single_file(tmp_path / "model.safetensors", unet, **other)
    loaded = load_source(f"{file}#config={folder}")
    assert loaded.source == f"{file}#config={folder}" and load_source(loaded.source).kind == "UNet2DConditionModel"
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name
    example = loaded.example(8, 8)
    found, wanted = (m(*example.args, **example.kwargs)[0] for m in (loaded.module, unet))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert load_source(f"{file}#config={folder / 'unet'}", torch.float16).module.dtype == torch.float16


def test_what_the_file_lacks_and_has_besides(tmp_path: Path) -> None:
    unet = unet_of(CONFIG)
    folder = pipeline_folder(tmp_path / "kind", unet)
    file = single_file(tmp_path / "model.safetensors", unet)
    state = load_file(file)
    save_file({**state, "model.diffusion_model.input_blocks.1.0.strange.weight": torch.ones(3)}, file)
    with pytest.warns(ValueWarning, match=r"has model\.diffusion_model\.input_blocks\.1\.0\.strange\.weight besides"):
        load_source(f"{file}#config={folder}")
    gone = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({n: t for n, t in state.items() if n != gone}, file)
    with pytest.raises(ModelError, match=r"the file lacks mid_block\.resnets\.0\.conv1\.weight: "):
        load_source(f"{file}#config={folder}")
    save_file({"lora_unet_down": torch.ones(3)}, file)
    with pytest.raises(ModelError, match="the file has no weights of a UNet2DConditionModel"):
        load_source(f"{file}#config={folder}")
    other = pipeline_folder(tmp_path / "other", unet_of({**CONFIG, "block_out_channels": (16, 16)}))
    single_file(file, unet)
    with pytest.raises(ModelError, match="of different kinds of model"):
        load_source(f"{file}#config={other}")


def test_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def away(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    file = single_file(tmp_path / "model.safetensors", unet_of(CONFIG))
    with pytest.raises(ModelError) as caught:
        load_source(str(file))
    assert re.search(
        r"looks like .*stable-diffusion.* cannot be reached \(no route\): give --config FOLDER", str(caught.value)
    )
    for config, problem in ((tmp_path, "is no diffusers folder"), (tmp_path / "no", "is no diffusers folder")):
        with pytest.raises(ModelError, match=problem):
            load_source(f"{file}#config={config}")
    with pytest.raises(ModelError, match="--config is for a single file"):
        load_source(f"{tmp_path}#config={tmp_path}")
    file.write_bytes(b"short")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_source(f"{file}#config={tmp_path}")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = unet_of(CONFIG)
    folder = pipeline_folder(tmp_path / "kind", unet)
    file = single_file(tmp_path / "my model.safetensors", unet)
    pickle = file.with_suffix(suffix)
    torch.save({"state_dict": load_file(file), "epoch": 3}, pickle)
    file.unlink()
    with pytest.raises(ModelError, match="is a pickle, which can run code when it is read") as caught:
        load_source(f"{pickle}#config={folder}")
    python, flag, code, *arguments = shlex.split(str(caught.value).partition("give the result: ")[2])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    module = load_source(f"{file}#config={folder}").module
    assert all(torch.equal(module.state_dict()[n], t) for n, t in unet.state_dict().items())


def test_variants(tmp_path: Path) -> None:
    unet = unet_of(CONFIG)
    unet.save_pretrained(tmp_path)
    unet.half().save_pretrained(tmp_path, variant="fp16")
    with torch.no_grad():
        unet.conv_in.bias += 1
    unet.save_pretrained(tmp_path, variant="other")
    assert not torch.equal(load_source(str(tmp_path)).module.conv_in.bias, unet.conv_in.bias.float())
    other = load_source(f"{tmp_path}#variant=other")
    assert torch.equal(other.module.conv_in.bias, unet.conv_in.bias.float()) and other.source.endswith("#variant=other")
    with pytest.raises(ModelError, match=r"no weights of the variant bf16 \(variants there: fp16, other\)"):
        load_source(f"{tmp_path}#variant=bf16")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusion_pytorch_model.other.safetensors").unlink()
    assert find_variant(tmp_path) == "fp16" and load_source(str(tmp_path)).module.dtype == torch.float32


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path: Path, variant: str | None) -> None:
    unet = unet_of(CONFIG)
    unet.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    module = load_source(str(tmp_path)).module
    assert all(torch.equal(module.state_dict()[n], t) for n, t in unet.state_dict().items())
    state = load_file(shards[0])
    gone, kept = min(state), {n: t for n, t in state.items() if n != min(state)}
    save_file(kept, shards[0])
    with pytest.raises(ModelError, match=re.escape(f"says that {shards[0].name} holds {gone}, and it does not")):
        load_source(str(tmp_path))
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"{shards[0].name}, which is missing: download the model again"):
        load_source(str(tmp_path))


def test_a_folder_with_pickles_alone(tmp_path: Path) -> None:
    unet_of(CONFIG).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin is a pickle, .*python -c .*save_file"):
        load_source(str(tmp_path))


def test_origins_as_text() -> None:
    for text in (
        "a/b",
        "a.safetensors#config=/x y/z",
        "a#variant=fp16",
        "a#b",
        "pkg.mod:function",
        "f#config=a#variant=b",
    ):
        assert str(Origin.of(text)) == text
    assert Origin.of("a#b").path == "a#b" and Origin.of("f#config=a#variant=b") == Origin("f", "a", "b")
    with pytest.raises(ModelError, match="unknown options of a model"):
        Origin.of("a#config=b#colour=c")


@pytest.mark.slow
def test_convert_a_single_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unet = unet_of(CONFIG)
    pipeline_folder(tmp_path / "kind", unet)
    single_file(tmp_path / "model.safetensors", unet)
    argv = [
        "convert",
        "model.safetensors",
        "--config",
        "kind",
        "--backend",
        "eager",
        "--size",
        "8x8",
        "--segments",
        "1",
    ]
    assert main.main([*argv, "--json"]) == 0
    capsys.readouterr()
    assert (tmp_path / "model-2gpu" / "plan.json").is_file()
    monkeypatch.chdir(tmp_path / "kind")
    assert main.main(["verify", str(tmp_path / "model-2gpu"), "--no-drift", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]["ok"] is True
    with pytest.raises(ModelError, match="the pipeline cannot be loaded"):  # it has nothing but a UNet
        load_pipeline(f"{tmp_path / 'model.safetensors'}#config={tmp_path / 'kind'}")


def vae_name(name: str, levels: int) -> str:
    """Return the name that a tensor of an autoencoder has in the original code."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "attentions" in name:
        name = re.sub(r"to_([qkv])", r"\1", name.replace("to_out.0", "proj_out").replace("group_norm", "norm"))
    names = {"mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    for new, old in names.items():
        name = name.replace(new, old)
    return name


@pytest.mark.slow
def test_the_pipeline_of_a_single_file(tmp_path: Path) -> None:
    """The demo as one file, with a folder of configuration alone: the same pictures as of its own folder."""
    pipe = load_pipeline("demo")
    unet = load_source("demo").module
    more = {
        f"cond_stage_model.transformer.text_model.{n}": t
        for n, t in load_file(DEMO / "text_encoder" / "model.safetensors").items()
    }
    levels = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        square = tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        more[f"first_stage_model.{vae_name(name, levels)}"] = square
    file = single_file(tmp_path / "demo.safetensors", unet, **more)
    ignored = shutil.ignore_patterns("*.safetensors", "README.md")
    config = shutil.copytree(DEMO, tmp_path / "kind", ignore=ignored)
    model = f"{file}#config={config}"
    loaded, other = load_source(model), load_pipeline(model)
    assert loaded.default_size == load_source("demo").default_size and pipeline_location(model) == str(config)
    pictures = []
    for made, module in ((pipe, unet), (other, loaded.module)):
        made.unet = module
        made.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        drawn = made("a red circle", num_inference_steps=2, height=32, width=32, generator=noise, output_type="pt")
        pictures.append(drawn.images)
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_said_of_a_sound_file(tmp_path: Path) -> None:
    unet = unet_of(CONFIG)
    folder = pipeline_folder(tmp_path / "kind", unet)
    file = single_file(tmp_path / "model.safetensors", unet, **{"first_stage_model.a": torch.ones(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ValueWarning)
        load_source(f"{file}#config={folder}")
    shutil.rmtree(folder)
