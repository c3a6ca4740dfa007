# SPDX-License-Identifier: Apache-2.0
"""Train the demo model: a text-conditioned UNet of 7.5 M parameters that draws scenes.

::

    python tools/train_demo.py --out models/demo

trains, on scenes that ``models/scene_pictures.py`` draws on the spot, first a small
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
import math
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_parts import (
    MAX_TOKENS,
    SAMPLE_CAPTIONS,
    TINY,
    Painter,
    Sizes,
    contact_sheet,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    sample,
    save_training_sheet,
    scene_batches,
    tokens_of,
)
from demo_training import Clock, Log, Trainee, half_precision
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

VAE_SHARE = 0.2
"""Part of the time until the autoencoder must be ready, compiling included."""


@dataclass(frozen=True)
class Goal:
    """Where results go: the pipeline's folder, and what tells how it came about."""

    folder: Path
    report: Path


# --- Training -----------------------------------------------------------------


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
