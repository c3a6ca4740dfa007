"""Fixtures: a small UNet, its bundle, and the module loaded from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.runtime.module import DistributedModule

diffusers = pytest.importorskip("diffusers")
from small_models import randomise  # noqa: E402


def example() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor(521.0),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=g),
    }


def original() -> Any:
    return randomise(
        diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=24,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Any:
    return original()


@pytest.fixture(scope="module")
def bundle(net: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "bundle"
    dc.convert(net, kwargs=example(), ranks=2, warmup_steps=2, optimise="fuse-parallel-linears").save(
        path, backend="eager"
    )
    return path


@pytest.fixture(scope="module")
def shared(bundle: Path) -> DistributedModule:
    return dc.load(bundle, lockstep=True)


@pytest.fixture
def unet(shared: DistributedModule) -> Iterator[DistributedModule]:
    """One loaded module for all tests; attributes that a test adds are deleted."""
    before = dict(shared.__dict__)
    shared.reset()
    yield shared
    for name in shared.__dict__.keys() - before.keys():
        delattr(shared, name)


@pytest.fixture(scope="module")
def want(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(**example()).sample


def check(unet: Any, want: torch.Tensor, **changes: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(unet(**{**example(), **changes})[0], want, rtol=1e-4, atol=1e-5)


def pipeline(unet: Any) -> Any:
    pipe = diffusers.DDIMPipeline(original(), diffusers.DDIMScheduler())
    pipe.unet = unet
    return pipe
