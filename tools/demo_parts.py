# SPDX-License-Identifier: Apache-2.0
"""What the demo model is made of: its sizes, tokenizer and modules, and the pictures it is trained on and draws."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed
from districompile.models import scene_pictures, scenes

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
GUIDANCE = 4.0
SAMPLE_CAPTIONS = (
    "a red circle above a blue square at sunset",
    "a small green triangle left of a large yellow star at night on snow",
    "an orange heart in the mountains at dawn",
    "a large white moon at night in a forest",
    "a pink flower above a purple ring in a meadow",
    "a yellow star right of a red heart at sea at sunset",
    "a cyan diamond below a white circle in space",
    "a black hexagon left of an orange drop in the desert",
    "a large red heart at sea at dawn",
    "a green cross above a small pink square in fog",
    "a blue drop right of a yellow flower on snow at dawn",
    "a purple star above a green circle in the desert at night",
    "a large orange ring in space",
    "a white triangle left of a black square in the mountains at sunset",
    "a small yellow moon above a large blue diamond at night at sea",
    "a red flower right of a cyan hexagon in a forest in fog",
)


@dataclass(frozen=True)
class Sizes:
    """Everything that ``--tiny`` shrinks."""

    picture: int = 256
    vae_channels: tuple[int, ...] = (32, 48, 64)
    unet_channels: tuple[int, ...] = (96, 128, 128)
    text_width: int = 128
    text_layers: int = 4
    vae_batch: int = 32
    batch: int = 256
    pool: int = 128_000
    compile: bool = True


TINY = Sizes(64, (16, 16, 16), (32, 32, 32), 32, 2, 16, 16, 2048, compile=False)


# --- Words --------------------------------------------------------------------


def _apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    pieces = [*word[:-1], word[-1] + "</w>"]
    rank = {pair: i for i, pair in enumerate(merges)}
    while True:
        pairs = [(rank[p], i) for i, p in enumerate(pairwise(pieces)) if p in rank]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer for which every word of the grammar is one token."""
    merges: list[tuple[str, str]] = []
    for word in scenes.words():
        while len(pieces := _apply_merges(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    for word in scenes.words():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3 and ids[1] == vocabulary[word + "</w>"], (word, ids)
    return tokenizer


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    kept = tokenizer(
        captions,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = kept.input_ids
    return ids


# --- Models -------------------------------------------------------------------


def make_vae(sizes: Sizes) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.picture,
        mid_block_add_attention=False,
    )


def make_unet(sizes: Sizes) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sizes.picture // 4,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,  # the number of heads, for all the name says
        norm_num_groups=16,
    )


def make_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Noise that really ends in noise, so that dark and light scenes both come out."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


# --- Pictures -----------------------------------------------------------------


class Painter:
    """Draws scenes on the device."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._size, self._device = sizes.picture, device
        x, y = scene_pictures.pixel_grid(sizes.picture)
        self._grid = (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        self._draw = torch.compile(scene_pictures.draw) if sizes.compile else scene_pictures.draw

    def __call__(self, numbers: scene_pictures.Layout) -> Tensor:
        """Pictures in [-1, 1]."""
        numbers = {k: torch.from_numpy(v).to(self._device, non_blocking=True) for k, v in numbers.items()}
        with torch.no_grad():
            drawn: Tensor = self._draw(numbers, self._size, torch, self._grid)
        return drawn * 2 - 1


Batch = tuple[list[str], scene_pictures.Layout]


def scene_batch(seed: int, count: int) -> Batch:
    rng = random.Random(seed)
    chosen = [scenes.random_scene(rng) for _ in range(count)]
    return [s.caption() for s in chosen], scene_pictures.layout(chosen, rng)


def scene_batches(seed: int, count: int) -> Iterator[Batch]:
    """Endless batches, prepared a few ahead in a thread while the device works."""
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(scene_batch, seed * 1_000_000 + i, count) for i in range(8)]
        number = len(waiting)
        while True:
            yield waiting.pop(0).result()
            waiting.append(threads.submit(scene_batch, seed * 1_000_000 + number, count))
            number += 1


# --- Sheets -------------------------------------------------------------------


def contact_sheet(pictures: list[Image.Image], columns: int = 4) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def sample(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> list[Image.Image]:
    generator = torch.Generator("cpu").manual_seed(seed)
    pictures: list[Image.Image] = pipeline(
        captions, num_inference_steps=50, guidance_scale=GUIDANCE, generator=generator
    ).images
    return pictures


def save_training_sheet(painter: Painter, sizes: Sizes, report: Path) -> None:
    """A sheet of training pictures, to look at."""
    pictures = painter(scene_batch(7, sizes.vae_batch)[1])[:16]
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = contact_sheet([Image.fromarray(np.ascontiguousarray(p)) for p in pixels])
    sheet.save(report / "training.png")
