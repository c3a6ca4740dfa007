"""Loaders and example inputs: folders written here with tiny configurations, loaded back, and called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from districompile.models import inputs, sources  # noqa: E402
from districompile.models.sources import ModelError, load_pipeline, load_source  # noqa: E402

BLOCKS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
TEXT_BLOCKS: dict[str, Any] = {
    **BLOCKS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "sample_size": 16,
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "inpainting": {"in_channels": 9},
    "pix2pix": {"in_channels": 8},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    },
    "refiner": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 5 * 8,
    },
    "distilled": {"time_cond_proj_dim": 24},
    "upscaler": {"num_class_embeds": 100, "in_channels": 7},
    "timestep_labels": {"class_embed_type": "timestep"},
    "identity_labels": {"class_embed_type": "identity"},
    "projected_labels": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "text_proj": {"encoder_hid_dim": 20},
    "image_proj": {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 20, "addition_embed_type": "image"},
    "text_image": {
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 20,
        "addition_embed_type": "text_image",
    },
    "image_hint": {
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": 20,
        "addition_embed_type": "image_hint",
        "in_channels": 8,
    },
}


def unet_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = diffusers.UNet2DConditionModel(**{**TEXT_BLOCKS, **CONDITIONS[name]})
    return model


def vae_of(**more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
        **more,
    )


def write_index(folder: Path, **parts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """A pipeline folder with a UNet and a VAE that halves maps once, and a text encoder of 12 tokens."""
    folder = tmp_path / "pipe"
    unet_of("sd15").save_pretrained(folder / "unet")
    vae_of().save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 12}))
    write_index(
        folder,
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "CLIPTextModel"],
    )
    return folder


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_condition_unets_run_with_their_example(name: str, tmp_path: Path) -> None:
    original = unet_of(name).eval()
    original.save_pretrained(tmp_path / "unet")
    loaded = load_source(str(tmp_path / "unet"))
    example = loaded.example(24, 16, batch=1)
    assert example.args[0].shape[0] == (1 if name == "distilled" else 2)
    assert example.args[0].shape[2:] == (24, 16)
    assert example.args[1].shape == () and example.args[1].dtype == torch.float32
    assert example.rows is not None and example.rows["sample"] == 2
    with torch.inference_mode():
        out = loaded.module(*example.args, **example.kwargs)[0]
        torch.testing.assert_close(out, original(*example.args, **example.kwargs)[0], atol=1e-4, rtol=1e-4)
    assert out.shape[2:] == (24, 16) and out.isfinite().all()


def test_time_ids_of_base_and_refiner() -> None:
    base = unet_of("sdxl").config
    refiner = unet_of("refiner").config
    size = inputs.Size(16, 16, 2)
    added = inputs.condition_unet(base, inputs.Context(), size, torch.float32, 0).kwargs["added_cond_kwargs"]
    assert added["time_ids"].shape == (2, 6) and added["text_embeds"].shape == (2, 40)
    added = inputs.condition_unet(refiner, inputs.Context(), size, torch.float32, 0).kwargs["added_cond_kwargs"]
    assert added["time_ids"].shape == (2, 5) and added["text_embeds"].shape == (2, 32)
    # The text encoder's own word goes before the guess.
    added = inputs.condition_unet(base, inputs.Context(pooled=48), size, torch.float32, 0).kwargs["added_cond_kwargs"]
    assert added["time_ids"].shape == (2, 5)


@pytest.mark.parametrize("labels", [{}, {"num_class_embeds": 10}, {"class_embed_type": "timestep"}])
def test_unconditional_unet(labels: dict[str, Any], tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    diffusers.UNet2DModel(sample_size=16, **BLOCKS, **blocks, **labels).save_pretrained(tmp_path / "unet")
    loaded = load_source(str(tmp_path / "unet"))
    assert loaded.cfg == "none"
    example = loaded.example(batch=2)
    assert example.args[0].shape == (2, 3, 16, 16)
    assert loaded.module(*example.args, **example.kwargs)[0].shape == (2, 3, 16, 16)
    with pytest.raises(ModelError, match="height 17 does not work: it must be a multiple of 2; .* 16 or 18"):
        loaded.example(17, 16)


@pytest.mark.parametrize("post", [True, False])
def test_vae_decoder(post: bool, tmp_path: Path) -> None:
    vae = vae_of(use_post_quant_conv=post).eval()
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_source(str(tmp_path / "vae"))
    example = loaded.example(48, 32, batch=1)
    assert example.rows == {"z": 2} and example.args[0].shape == (1, 4, 24, 16)
    with torch.inference_mode():
        out = loaded.module(*example.args)
        assert out.shape == (1, 3, 48, 32)
        torch.testing.assert_close(out, vae.decode(example.args[0]).sample, atol=1e-4, rtol=1e-4)
    assert not any("encoder" in name.split(".")[0] and name[0] == "e" for name, _ in loaded.module.named_parameters())


def test_pipeline_folder(pipeline_folder: Path) -> None:
    loaded = load_source(str(pipeline_folder), torch.float16)
    assert loaded.cfg == "batch" and loaded.default_size == (32, 32) and loaded.pipeline_loader is not None
    assert next(loaded.module.parameters()).dtype == torch.float16
    example = loaded.example()
    assert example.args[0].shape == (2, 4, 16, 16) and example.args[0].dtype == torch.float16
    assert example.kwargs["encoder_hidden_states"].shape == (2, 12, 32)
    assert loaded.example(cfg="none").args[0].shape[0] == 1
    assert loaded.example(batch=3, cfg="split").args[0].shape[0] == 6
    assert torch.equal(loaded.example(seed=1).args[0], loaded.example(seed=1).args[0])
    # The component inside the pipeline knows its surroundings, but draws nothing.
    inner = load_source(str(pipeline_folder / "unet"))
    assert inner.default_size == (32, 32) and inner.pipeline_loader is None
    with pytest.raises(ModelError, match="height 33 does not work: it must be a multiple of 2; .* 32 or 34"):
        loaded.example(33, 32)
    with pytest.raises(ModelError, match="width 0 does not work: it must be above 0"):
        loaded.example(32, 0)
    with pytest.raises(ModelError, match="height -8 does not work"):
        loaded.example(-8, 32)
    with pytest.raises(ModelError, match="batch 0"):
        loaded.example(batch=0)


def test_variant_files_are_found(tmp_path: Path) -> None:
    unet_of("sd15").half().save_pretrained(tmp_path / "unet", variant="fp16")
    assert next(load_source(str(tmp_path / "unet")).module.parameters()).dtype == torch.float32


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    unet_of("sd15").save_pretrained(tmp_path / "unet", safe_serialization=False)
    with pytest.raises(ModelError, match="cannot be loaded: .*safetensors"):
        load_source(str(tmp_path / "unet"))


def test_truncated_weights(tmp_path: Path) -> None:
    unet_of("sd15").save_pretrained(tmp_path / "unet")
    file = next((tmp_path / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_source(str(tmp_path / "unet"))


FACTORIES = """
import torch
net = torch.nn.Conv2d(3, 3, 3, padding=1)
def full(): return net, (torch.zeros(1, 3, 8, 8),), {}, {"input": 2}
def short(): return net, (torch.zeros(1, 3, 8, 8),), {}
def positional(): return net, (torch.zeros(1, 3, 8, 8),)
def named(): return net, {"input": torch.zeros(1, 3, 8, 8)}
def bare(): return net
def wrong(): return "net"
number = 3
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    loaded = load_source("my_factories:full")
    example = loaded.example()
    assert example.rows == {"input": 2} and loaded.module(*example.args).shape == (1, 3, 8, 8)
    assert load_source("my_factories:short").example().rows is None
    positional, named = (load_source(f"my_factories:{name}").example() for name in ("positional", "named"))
    assert len(positional.args) == 1 and not positional.kwargs
    assert not named.args and list(named.kwargs) == ["input"]
    with pytest.raises(ModelError, match="fixes its own inputs"):
        loaded.example(height=64)
    for name, message in {
        "bare": "without inputs",
        "wrong": "must return a module",
        "number": "is not a function",
        "missing": "has no 'missing'",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_source(f"my_factories:{name}")
    with pytest.raises(ModelError, match="there is no module 'no_such_module'"):
        load_source("no_such_module:f")


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = "'demo', a diffusers folder, a .safetensors file, a hub id .owner/name., or package.module:factory"
    with pytest.raises(ModelError, match=f"unknown model 'nonsense': give {accepted}"):
        load_source("nonsense")
    with pytest.raises(ModelError, match="neither model_index.json nor config.json"):
        load_source(str(tmp_path))
    file = tmp_path / "model.txt"
    file.touch()
    with pytest.raises(ModelError, match=f"is a file; a model is {accepted}"):
        load_source(str(file))
    write_index(tmp_path / "audio", vocoder=["x", "y"])
    with pytest.raises(ModelError, match="has no unet and no transformer .it has: vocoder."):
        load_source(str(tmp_path / "audio"))
    (tmp_path / "config.json").write_text('{"_class_name": "SomethingElse"}')
    with pytest.raises(ModelError, match="no example inputs are known for the class SomethingElse"):
        load_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json cannot be read"):
        load_source(str(tmp_path))


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ModelError, match="no folder some/model here, and the model hub could not be reached: Name"):
        load_source("some/model")


def test_pipeline_needs_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a diffusers pipeline"):
        load_pipeline(str(tmp_path))


def test_pipeline_has_a_placeholder_unet(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=16, **BLOCKS, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    loaded = load_source(str(tmp_path / "ddpm"))
    assert loaded.pipeline_loader is not None and loaded.cfg == "none"
    pipe = loaded.pipeline_loader()
    assert all(p.device.type == "meta" for p in pipe.unet.parameters())
    pipe.unet = loaded.module
    assert pipe.unet is loaded.module


def test_demo_model() -> None:
    if not (sources.DEMO / "model_index.json").is_file():
        pytest.skip("the demo model is not there")
    loaded = load_source("demo")
    assert loaded.source == "demo" and loaded.default_size is not None
    example = loaded.example()
    with torch.inference_mode():
        assert loaded.module(*example.args, **example.kwargs)[0].shape == example.args[0].shape
