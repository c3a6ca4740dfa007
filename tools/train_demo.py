"""Train the demo model: a text-conditioned UNet of 7.5 M parameters that draws scenes.

::

    python tools/train_demo.py --out models/demo

trains, on scenes that ``models/scenes.py`` draws on the spot, first a small
autoencoder, then a small CLIP text encoder together with the UNet (v-prediction on
a schedule that ends in pure noise), and saves a standard ``StableDiffusionPipeline``
folder in fp16.  ``--report`` names the folder for ``losses.jsonl`` and the sheets
``training.png`` and ``samples.png``.  The committed model was made with the defaults
on one H200 with torch 2.11: 16 minutes, 3,069 steps of 32 pictures for the
autoencoder, 7,371 steps of 256 scenes for the UNet.  Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
import scenes  # type: ignore[import-not-found, unused-ignore]

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VAE_SHARE = 0.2
"""Part of the time until the autoencoder must be ready, compiling included."""

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


@dataclass(frozen=True)
class Goal:
    """Where results go: the pipeline's folder, and what tells how it came about."""

    folder: Path
    report: Path


class Log:
    """Progress on the terminal, and the same as JSON lines in a file."""

    def __init__(self, path: Path, start: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._start = start

    def __call__(self, **record: Any) -> None:
        seconds = round(time.time() - self._start, 1)
        line = json.dumps({"seconds": seconds, **record})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


class Clock:
    """The way from now to a deadline; its progress drives the learning rate."""

    def __init__(self, deadline: float) -> None:
        self._start = time.time()
        self._seconds = max(deadline - self._start, 1e-3)

    def progress(self) -> float:
        return min(1.0, (time.time() - self._start) / self._seconds)


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
        x, y = scenes.pixel_grid(sizes.picture)
        self._grid = (torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        self._draw = torch.compile(scenes.draw) if sizes.compile else scenes.draw

    def __call__(self, numbers: scenes.Layout) -> Tensor:
        """Pictures in [-1, 1]."""
        numbers = {k: torch.from_numpy(v).to(self._device, non_blocking=True) for k, v in numbers.items()}
        with torch.no_grad():
            drawn: Tensor = self._draw(numbers, self._size, torch, self._grid)
        return drawn * 2 - 1


Batch = tuple[list[str], scenes.Layout]


def scene_batch(seed: int, count: int) -> Batch:
    rng = random.Random(seed)
    chosen = [scenes.random_scene(rng) for _ in range(count)]
    return [s.caption() for s in chosen], scenes.layout(chosen, rng)


def scene_batches(seed: int, count: int) -> Iterator[Batch]:
    """Endless batches, prepared a few ahead in a thread while the device works."""
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(scene_batch, seed * 1_000_000 + i, count) for i in range(8)]
        number = len(waiting)
        while True:
            yield waiting.pop(0).result()
            waiting.append(threads.submit(scene_batch, seed * 1_000_000 + number, count))
            number += 1


# --- Training -----------------------------------------------------------------


def cosine_rate(progress: float, peak: float) -> float:
    """A short linear rise, then half a cosine down to a hundredth of the peak."""
    if progress < 0.02:
        return peak * (0.02 + progress / 0.02 * 0.98)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


def half_precision(device: torch.device) -> torch.autocast:
    """Bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Trainee:
    """Modules with their optimizer and an average of their weights over time."""

    def __init__(self, modules: list[nn.Module], device: torch.device, peak: float) -> None:
        self._peak, self._steps = peak, 0
        self._weights: list[Tensor] = [p for m in modules for p in m.parameters()]
        self._average = [p.detach().clone() for p in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=peak,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )

    def step(self, loss: Tensor, progress: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = cosine_rate(progress, self._peak)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        # A short memory at first, or the average would remember the random start.
        keep = min(0.999, self._steps / (self._steps + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - keep)

    def swap_average(self) -> None:
        """Exchange the weights with their average; a second call puts them back."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self._average, strict=True):
                held = weight.detach().clone()
                weight.copy_(average)
                average.copy_(held)


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def vae_loss(rebuilt: Tensor, pictures: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Absolute error, the same on differences so that edges stay sharp, and a little KL."""
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = F.l1_loss(rebuilt, pictures) + F.mse_loss(rebuilt, pictures)
    for ours, true in zip(edges(rebuilt), edges(pictures), strict=True):
        loss = loss + F.l1_loss(ours, true)
    return loss + 2e-3 * kl


def train_vae(
    vae: AutoencoderKL,
    painter: Painter,
    sizes: Sizes,
    seed: int,
    deadline: float,
    log: Log,
) -> None:
    device = vae.device

    def forward(pictures: Tensor) -> Tensor:
        moments = vae.quant_conv(vae.encoder(pictures))
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        noisy = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        rebuilt = vae.decoder(vae.post_quant_conv(noisy))
        return vae_loss(rebuilt.float(), pictures, mean, logvar)

    run = torch.compile(forward) if sizes.compile else forward
    trainee = Trainee([vae], device, 1e-3)
    batches = scene_batches(seed, sizes.vae_batch)
    clock, step = Clock(deadline), 0
    while (progress := clock.progress()) < 1 or step < 2:
        pictures = painter(next(batches)[1]).contiguous(memory_format=torch.channels_last)
        with half_precision(device):
            loss = run(pictures)
        trainee.step(loss, progress)
        if step == 1:
            clock = Clock(deadline)  # compiling does not count
        if step % 200 == 0:
            log(stage="vae", step=step, progress=round(progress, 3), loss=loss.item())
        step += 1
    trainee.swap_average()
    with torch.no_grad():
        pictures = painter(next(batches)[1])
        error = (vae(pictures).sample.clamp(-1, 1) - pictures).square().mean().item() / 4
    log(stage="vae", step=step, psnr_db=round(-10 * math.log10(error), 2))


@dataclass
class Pool:
    """Encoded scenes, all on the device."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents and tokens; one caption of ten is left out, for guidance."""
        pick = torch.randint(len(self.latents), (count,), device=self.latents.device)
        tokens = self.tokens[pick]
        left_out = torch.rand(count, 1, device=tokens.device) < 0.1
        return self.latents[pick].float(), torch.where(left_out, self.empty, tokens)

    def save(self, path: Path) -> None:
        torch.save((self.latents.cpu(), self.tokens.cpu(), self.empty.cpu()), path)

    @staticmethod
    def load(path: Path, device: torch.device) -> Pool:
        parts = torch.load(path, weights_only=True)
        return Pool(*(part.to(device) for part in parts))

    @staticmethod
    def dummy(sizes: Sizes, device: torch.device) -> Pool:
        """As real pools in shapes and types, to compile with."""
        side = sizes.picture // 4
        latents = torch.randn(8, 4, side, side, device=device, dtype=torch.bfloat16)
        tokens = torch.ones(8, MAX_TOKENS, dtype=torch.long, device=device)
        return Pool(latents, tokens, tokens[:1])


def fill_pool(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    painter: Painter,
    sizes: Sizes,
    seed: int,
    log: Log,
) -> Pool:
    """Encode the training scenes once, and set the VAE's scaling factor by them."""
    device, latents, captions = vae.device, [], []
    batches = scene_batches(seed + 1, sizes.vae_batch)
    for _ in range(max(1, sizes.pool // sizes.vae_batch)):
        texts, numbers = next(batches)
        captions += texts
        pictures = painter(numbers).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), half_precision(device):
            mean = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)[0]
        latents.append(mean.bfloat16())
    pool = torch.cat(latents)
    spread = pool[:4096].float().std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    pool.mul_(vae.config.scaling_factor)
    per_channel = [round(v, 3) for v in pool[:4096].float().std(dim=(0, 2, 3)).tolist()]
    log(stage="pool", scenes=len(pool), spread=spread, channels=per_channel)
    tokens = tokens_of(tokenizer, captions).to(device)
    return Pool(pool, tokens, tokens_of(tokenizer, [""]).to(device))


def prepare(folder: Path, sizes: Sizes, seed: int, start: float, deadline: float, report: Path) -> None:
    """The first half, in a process of its own: the autoencoder and the encoded scenes."""
    settle(seed)
    device, log = pick_device(), Log(report / "losses.jsonl", start)
    painter = Painter(sizes, device)
    save_training_sheet(painter, sizes, report)
    vae = make_vae(sizes).to(device, memory_format=torch.channels_last)
    train_vae(vae, painter, sizes, seed, deadline, log)
    tokenizer = make_tokenizer(folder / "tokenizer")
    fill_pool(vae, tokenizer, painter, sizes, seed, log).save(folder / "pool.pt")
    vae.save_pretrained(folder / "vae")


class UNetTraining:
    """The second half: text encoder and UNet together, on encoded scenes."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, sizes: Sizes) -> None:
        self._unet, self._text, self._sizes = unet, text, sizes
        self._device = unet.device
        alphas = make_scheduler().alphas_cumprod.to(self._device)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()
        self._run = torch.compile(self._loss) if sizes.compile else self._loss

    def _loss(self, latents: Tensor, states: Tensor) -> Tensor:
        t = torch.randint(1000, (len(latents),), device=latents.device)
        a, b = self._signal[t][:, None, None, None], self._noise[t][:, None, None, None]
        eps = torch.randn_like(latents)
        v = self._unet(a * latents + b * eps, t, states, return_dict=False)[0]
        return F.mse_loss(v.float(), a * eps - b * latents)

    def loss(self, pool: Pool) -> Tensor:
        with half_precision(self._device):
            latents, tokens = pool.batch(self._sizes.batch)
            loss: Tensor = self._run(latents, self._text(tokens)[0])
        return loss

    def warm_up(self, log: Log) -> None:
        """Compile, while the other process still trains the autoencoder."""
        for _ in range(2):
            loss = self.loss(Pool.dummy(self._sizes, self._device))
            loss.backward()  # type: ignore[no-untyped-call]
        for module in (self._unet, self._text):
            module.zero_grad(set_to_none=True)
        log(stage="unet", compiled=True)

    def run(self, pipeline: StableDiffusionPipeline, pool: Pool, deadline: float, goal: Goal, log: Log) -> None:
        trainee = Trainee([self._unet, self._text], self._device, 8e-4)
        clock, step, saves = Clock(deadline), 0, 1
        total = torch.zeros((), device=self._device)
        while (progress := clock.progress()) < 1 or step < 2:
            loss = self.loss(pool)
            trainee.step(loss, progress)
            total += loss.detach()
            step += 1
            if step % 200 == 0:
                mean = round(total.item() / 200, 5)
                log(stage="unet", step=step, progress=round(progress, 3), loss=mean)
                total.zero_()
            if progress > saves / 4:
                # What is there so far, in case the run does not live to its end.
                saves += 1
                trainee.swap_average()
                save(pipeline, goal, log, captions=SAMPLE_CAPTIONS[:8])
                trainee.swap_average()
        trainee.swap_average()
        log(stage="unet", step=step, scenes_seen=step * self._sizes.batch)


# --- Saving -------------------------------------------------------------------


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


def save(
    pipeline: StableDiffusionPipeline,
    goal: Goal,
    log: Log,
    captions: tuple[str, ...] = SAMPLE_CAPTIONS,
) -> None:
    """The folder in fp16, and a contact sheet drawn with the weights as they are saved."""
    parts = {k: copy.deepcopy(m) for k, m in pipeline.components.items() if m is not None}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.half()
    halved = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    )  # fmt: skip
    halved.save_pretrained(goal.folder, safe_serialization=True)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.float()
    halved.set_progress_bar_config(disable=True)
    pictures = sample(halved, list(captions), seed=0)
    contact_sheet(pictures).save(goal.report / "samples.png")
    weight = sum(f.stat().st_size for f in goal.folder.rglob("*") if f.is_file())
    log(stage="saved", folder=str(goal.folder), megabytes=round(weight / 1e6, 2))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def save_training_sheet(painter: Painter, sizes: Sizes, report: Path) -> None:
    """A sheet of training pictures, to look at."""
    pictures = painter(scene_batch(7, sizes.vae_batch)[1])[:16]
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = contact_sheet([Image.fromarray(np.ascontiguousarray(p)) for p in pixels])
    sheet.save(report / "training.png")


# --- The whole ----------------------------------------------------------------


def settle(seed: int) -> None:
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True  # rather slow than not at all


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(sizes: Sizes, seed: int, minutes: float, goal: Goal) -> None:
    start = time.time()
    settle(seed)
    device, log = pick_device(), Log(goal.report / "losses.jsonl", start)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vae_deadline = start + minutes * 60 * VAE_SHARE
        child = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, sizes, seed, start, vae_deadline, goal.report)
        )
        child.start()
        tokenizer = make_tokenizer(goal.folder / "tokenizer")
        unet = make_unet(sizes).to(device, memory_format=torch.channels_last)
        text = make_text_encoder(sizes, tokenizer).to(device)
        log(unet=count_parameters(unet), text_encoder=count_parameters(text))
        training = UNetTraining(unet, text, sizes)
        training.warm_up(log)
        child.join()
        if child.exitcode != 0:
            raise SystemExit("the autoencoder's training failed")
        pool = Pool.load(folder / "pool.pt", device)
        vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    log(vae=count_parameters(vae), pool=len(pool.latents))
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    training.run(pipeline, pool, start + minutes * 60, goal, log)
    save(pipeline, goal, log)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=16.2, help="time for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--report", type=Path, default=Path("build/demo"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else Sizes()
    goal = Goal(arguments.out, arguments.report)
    train(sizes, arguments.seed, arguments.minutes, goal)


if __name__ == "__main__":
    main()
