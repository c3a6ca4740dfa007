"""Drift of the displaced phase on the demo model: PSNR of the picture against one device, same seed.

    python tools/demo_psnr.py [--ranks 2,4,8] [--modes corrected_async,sync,stale,local] [--steps 50] [--warmup 4]
    [--pictures 2]

Everything runs in this process (ranks in lockstep, operator by operator). One JSON line a figure, the README's table
at the end.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import districompile as dc
from districompile.ir.plan import Phase
from districompile.models.sources import load_pipeline, load_source

PROMPTS = (
    "a red circle above a blue square at sunset",
    "a small green triangle left of a large yellow star at night on snow",
)
Denoiser = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Sampler:
    """The demo pipeline's own parts, in a plain DDIM loop with guidance."""

    def __init__(self, steps: int, guidance: float) -> None:
        self.pipe: Any = load_pipeline("demo")
        self.unet: Any = load_source("demo").module
        self.steps, self.guidance = steps, guidance

    def text(self, prompt: str) -> Tensor:
        """(2, tokens, width): unconditional and conditional."""
        tokens = self.pipe.tokenizer(
            ["", prompt], padding="max_length", max_length=self.pipe.tokenizer.model_max_length, return_tensors="pt"
        )
        encoded: Tensor = self.pipe.text_encoder(tokens.input_ids)[0]
        return encoded

    def picture(self, denoise: Denoiser, prompt: str, seed: int) -> Tensor:
        """The decoded picture, (1, 3, H, W) in 0 to 1."""
        scheduler, config = self.pipe.scheduler, self.unet.config
        scheduler.set_timesteps(self.steps)
        text = self.text(prompt)
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            without, given = denoise(both, t.float(), text, i).chunk(2)
            x = scheduler.step(without + self.guidance * (given - without), t, x).prev_sample
        image: Tensor = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample
        return (image / 2 + 0.5).clamp(0, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--modes", default="corrected_async,sync,stale,local")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--pictures", type=int, default=2)
    args = parser.parse_args()
    sampler = Sampler(args.steps, args.guidance)
    unet, config = sampler.unet, sampler.unet.config
    cases = [(PROMPTS[i % len(PROMPTS)], i // len(PROMPTS)) for i in range(args.pictures)]
    expected = [sampler.picture(lambda x, t, c, i: unet(x, t, c).sample, p, s) for p, s in cases]
    captured = dc.capture(
        unet,
        (torch.zeros(2, config.in_channels, config.sample_size, config.sample_size), torch.tensor(1.0)),
        {"encoder_hidden_states": sampler.text("")},
    )
    ranks, modes = [int(r) for r in args.ranks.split(",")], args.modes.split(",")
    table: dict[tuple[str, int], float] = {}
    for mode in modes:
        for n in ranks:
            program = dc.convert(captured, ranks=n, groupnorm=mode)

            def denoise(x: Tensor, t: Tensor, text: Tensor, i: int, program: dc.Program = program) -> Tensor:
                phase: Phase = "warmup" if i < args.warmup else "steady"
                out: Tensor = program.simulate(x, t, encoder_hidden_states=text, phase=phase).sample
                return out

            values = []
            for (prompt, seed), want in zip(cases, expected, strict=True):
                program.reset()
                values.append(psnr(sampler.picture(denoise, prompt, seed), want))
            table[mode, n] = sum(values) / len(values)
            figure = {
                "groupnorm": mode,
                "ranks": n,
                "steps": args.steps,
                "warmup": args.warmup,
                "guidance": args.guidance,
            }
            print(json.dumps({**figure, "pictures": len(values), "psnr_db": [round(v, 2) for v in values]}), flush=True)
    print("\n| group norm | " + " | ".join(f"{n} ranks" for n in ranks) + " |\n| --- |" + " --- |" * len(ranks))
    for mode in modes:
        print(f"| `{mode}` | " + " | ".join(f"{table[mode, n]:.1f} dB" for n in ranks) + " |")


if __name__ == "__main__":
    main()
