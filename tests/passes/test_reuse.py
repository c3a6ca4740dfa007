# SPDX-License-Identifier: Apache-2.0
"""Reused steps equal the original module with its deep part frozen by hooks, which know nothing of the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import relative_error, sdxl, unet2d
from torch import Tensor, nn

import districompile as dc
from districompile.ir.captured import CapturedModule
from districompile.ir.spec import Phase
from tests.families.base import randomise


class Frozen:
    """The original module. A full call records what ``layers`` give, and a reused one gives that again.

    ``layers`` maps a layer to its base, or to None. With a base, a layer gives its base's output plus the recorded
    change since that.
    """

    def __init__(self, module: nn.Module, layers: dict[str, str | None]) -> None:
        self.module, self.reused = module, False
        self.recorded: dict[str, list[Tensor]] = {}
        self.now: dict[str, list[Tensor]] = {}
        self.hooks = []
        for base in {b for b in layers.values() if b is not None}:
            self.hooks.append(module.get_submodule(base).register_forward_hook(functools.partial(self._seen, base)))
        for layer, base in layers.items():
            hook = functools.partial(self._kept, layer, base)
            self.hooks.append(module.get_submodule(layer).register_forward_hook(hook))

    def _seen(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self.now[name] = list(output) if isinstance(output, tuple) else [output]

    def _kept(self, name: str, base: str | None, _module: nn.Module, _args: Any, output: Any) -> Any:
        outputs = list(output) if isinstance(output, tuple) else [output]
        before = self.now[base] if base is not None else [torch.zeros_like(t) for t in outputs]
        if self.reused:
            outputs = [a + b for a, b in zip(before, self.recorded[name], strict=True)]
            return tuple(outputs) if isinstance(output, tuple) else outputs[0]
        self.recorded[name] = [b - a for a, b in zip(before, outputs, strict=True)]
        return output

    def __call__(self, reused: bool, **kwargs: Any) -> Tensor:
        self.reused = reused
        with torch.no_grad():
            out: Any = self.module(**kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Block(nn.Module):
    """A block of a transformer: attention, and a linear layer with the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.out, self.more = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.more(nn.functional.silu(x * time))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.embed, self.last = nn.Conv2d(4, 16, 2, 2), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.time = nn.Linear(1, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        b, _, h, w = sample.shape
        x = self.embed(sample).flatten(2).transpose(1, 2)
        time = self.time(timestep.reshape(1, 1) / 100)
        for block in self.blocks:
            x = block(x, time)
        x = self.last(x).reshape(b, h // 2, w // 2, 2, 2, 4)
        result: Tensor = x.permute(0, 5, 1, 3, 2, 4).reshape(b, 4, h, w)
        return result


def transformer() -> tuple[nn.Module, dict[str, Any]]:
    sample = torch.randn(1, 4, 24, 8, generator=torch.Generator().manual_seed(1))
    return randomise(Transformer()), {"sample": sample, "timestep": torch.tensor(90.0)}


def joint() -> tuple[nn.Module, dict[str, Any]]:
    """SD 3's network: a stream of the image and one of the text, which read each other."""
    import diffusers

    module = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=5, joint_attention_dim=8, caption_projection_dim=16,
        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=16, attention_head_dim=8, num_attention_heads=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    return randomise(module), {
        "hidden_states": torch.randn(1, 4, 24, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
        "pooled_projections": torch.randn(1, 12, generator=generator),
        "timestep": torch.tensor([500.0]),
    }


# What a hand-written implementation of each network would keep, by the number behind the colon
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int | None, dict[str, str | None]]] = {
    "unet2d": (lambda: unet2d(1, 32, 8), 1, {"up_blocks.1.upsamplers.0.conv": None}),
    "unet2d two levels": (lambda: unet2d(1, 32, 8), 2, {"up_blocks.0.upsamplers.0.conv": None}),
    "sdxl": (lambda: sdxl(1, 32, 8), None, {"up_blocks.1.upsamplers.0.conv": None}),
    "transformer": (transformer, None, {"blocks.3": "blocks.0"}),
    "transformer, two blocks": (transformer, 2, {"blocks.2": "blocks.1"}),
    "joint": (joint, 1, {"transformer_blocks.3": "transformer_blocks.0"}),
}


@functools.cache
def made(case: str) -> tuple[nn.Module, dict[str, Any], CapturedModule]:
    module, kwargs = CASES[case][0]()
    return module, kwargs, dc.capture(module, kwargs=kwargs)


def given(kwargs: dict[str, Any], step: int) -> dict[str, Any]:
    """The inputs of a step: another sample and an earlier time."""
    name = next(n for n in ("sample", "hidden_states") if n in kwargs)
    more = torch.randn(kwargs[name].shape, generator=torch.Generator().manual_seed(step))
    return {**kwargs, name: kwargs[name] + 0.3 * more, "timestep": kwargs["timestep"] - 5 * step}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


PHASES: tuple[Phase, ...] = ("exact", "reused", "displaced", "reused", "reused", "exact", "reused")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_reused_step_is_the_original_with_its_deep_part_frozen(case: str, ranks: int) -> None:
    """Without displaced exchanges, on any number of ranks."""
    module, kwargs, captured = made(case)
    _, level, layers = CASES[case]
    reuse = "deep=2" if level is None else f"deep=2:{level}"
    program = dc.convert(captured, ranks=ranks, displace="none", reuse=reuse, optimise="all")
    frozen = Frozen(module, layers)
    try:
        for step, phase in enumerate(PHASES):
            inputs = given(kwargs, step)
            want = frozen(phase == "reused", **inputs)
            assert relative_error(first(program.simulate(phase=phase, **inputs)), want) <= 2e-5, (step, phase)
    finally:
        frozen.close()
    found = program.plan.report.reuse
    assert found is not None and 0 < found.share < 0.9
    assert program.work("reused")[0] < program.work("displaced")[0]


class Plain(nn.Module):
    """A network of one resolution, or with ``deep`` an autoencoder without a skip connection."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.deep, self.first, self.last = deep, nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.relu(self.first(sample) * timestep)
        if self.deep:
            x = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2.0)
        result: Tensor = self.last(x)
        return result


PLAIN = {"sample": torch.randn(1, 4, 12, 8), "timestep": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": "deep"}, "give none, or deep=N"),
        ({"reuse": "shallow=2"}, "give none, or deep=N"),
        ({"reuse": "deep=1"}, "deep=1: one step in at least 2 is full"),
        ({"reuse": "deep=2:0"}, "levels count from 1"),
        ({"reuse": "deep=2", "phases": "exact"}, "phases='exact' has none: convert without reuse"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dc.ConvertError, match=message):
        dc.convert(Plain(), kwargs=PLAIN, ranks=2, **options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_networks_that_keep_nothing_are_refused(ranks: int) -> None:
    for deep, why in ((False, "its maps have one resolution"), (True, "its output is made by what level 1 would keep")):
        with pytest.raises(dc.ConvertError, match=why) as refused:
            dc.convert(Plain(deep), kwargs=PLAIN, ranks=ranks, reuse="deep=2")
        assert "no stack of at least 3 equal blocks; convert without reuse" in str(refused.value)
    _, _, captured = made("transformer")
    with pytest.raises(dc.ConvertError, match="it has 2 blocks to choose from.*another number than 3"):
        dc.convert(captured, ranks=ranks, reuse="deep=2:3")
    with pytest.raises(dc.ConvertError, match="without a timestep"):
        dc.convert(nn.Conv2d(4, 4, 3), (PLAIN["sample"],), ranks=ranks, reuse="deep=2")


def test_displaced_exchanges_of_a_reused_step() -> None:
    """With displaced exchanges, a series of equal steps settles to what one device computes, in any phase."""
    module, kwargs, captured = made("unet2d")
    program = dc.convert(captured, ranks=3, reuse="deep=2", groupnorm="forecast", optimise="all")
    with torch.no_grad():
        want = first(module(**kwargs))
    for step, phase in enumerate(("exact", "displaced", "reused", "displaced", "displaced", "reused", "reused")):
        got = first(program.simulate(phase=phase, **kwargs))  # type: ignore[arg-type]
        assert relative_error(got, want) <= 2e-5, step


def test_bundles_without_reuse_have_two_phases() -> None:
    _, _, captured = made("transformer")
    plan = dc.convert(captured, ranks=2).plan
    assert tuple(plan.phases) == ("exact", "displaced") and plan.report.reuse is None
    assert not any("_change" in v for p in plan.phases.values() for v in p.values)
