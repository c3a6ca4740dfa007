"""Every family, small: the exact phase equals one device, the steady one converges to it, and what is cut is enough."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

pytest.importorskip("diffusers")

from tests.families.measure import load_families, measure

FAMILIES = load_families()
RANKS = (2, 3, 4, 3)
# Whole networks are slow, but for one of each kind; what one block does is quick
NETWORKS = {"diffusers UNets", "diffusers UNets over frames and sequences", "MONAI",
            "denoising-diffusion-pytorch and relatives"}  # fmt: skip
ALWAYS = {"sdxl", "unet2d", "animatediff", "unet1d_rl", "monai_unet_conditioned", "ddpm"}


def _ranks(name: str) -> int:
    """One number of ranks a family, spread over them; ``tools/coverage.py`` runs them all."""
    return RANKS[zlib.crc32(name.encode()) % len(RANKS)]


def _cases() -> list[Any]:
    slow = {name for name, family in FAMILIES.items() if family.group in NETWORKS} - ALWAYS
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else []) for name in FAMILIES]


@pytest.mark.parametrize("name", _cases())
def test_family(name: str) -> None:
    family = FAMILIES[name]
    ranks = _ranks(name)
    # The steady phase takes dozens of calls to settle: a third of the families here, all of them in tools/coverage.py
    settled = [ranks] if zlib.crc32(name.encode()) % 3 == 0 else []
    [result] = measure(family, family.sizes[0], [ranks], settled)
    assert result.exact <= 1e-5
    if settled:
        assert result.steady is not None and result.steady <= 1e-5
    # Maps with fewer rows than ranks are named; nothing else may cost more
    assert result.share >= family.share or result.replicated, result
    assert not any("the rule failed" in reason for reason in result.fallbacks), result.fallbacks


def test_an_operator_nobody_foresaw_is_named() -> None:
    family = FAMILIES["unforeseen"]
    [result] = measure(family, family.sizes[0], [3])
    named: Any = " ".join(result.fallbacks)
    assert "aten.sort.default: sort over the rows" in named
    assert "aten.median.default: the operator has no rule" in named
    assert result.exact <= 1e-5
