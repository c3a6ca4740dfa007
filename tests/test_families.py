"""Test every family: the exact phase equals one device, the displaced phase converges to it, and enough work is
sharded."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

pytest.importorskip("diffusers")

from tests.families.measure import load_families, measure

FAMILIES = load_families()
RANKS = (2, 3, 4, 3)
# Networks are marked slow, except for one of each kind. Small networks around one block are quick.
NETWORKS = {"diffusers UNets", "diffusers UNets over frames and sequences", "MONAI", "science",
            "denoising-diffusion-pytorch and relatives", "transformers for text and video"}  # fmt: skip
ALWAYS = {"sdxl", "unet2d", "animatediff", "unet1d_rl", "monai_unet_conditioned", "ddpm",
          "qwen_image"}  # fmt: skip


def _ranks(name: str) -> int:
    """Return the number of ranks that a family runs on. ``tools/coverage.py`` runs all numbers of ranks."""
    return RANKS[zlib.crc32(name.encode()) % len(RANKS)]


def _cases() -> list[Any]:
    slow = {name for name, family in FAMILIES.items() if family.group in NETWORKS} - ALWAYS
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else []) for name in FAMILIES]


@pytest.mark.parametrize("name", _cases())
def test_family(name: str) -> None:
    family = FAMILIES[name]
    ranks = _ranks(name)
    # The displaced phase takes dozens of calls to converge, so a third of the families run it here and all of them in
    # tools/coverage.py.
    converging = [ranks] if zlib.crc32(name.encode()) % 3 == 0 else []
    [result] = measure(family, family.sizes[0], [ranks], converging)
    assert result.exact <= 1e-5
    if converging:
        assert result.displaced is not None and result.displaced <= 1e-5
    # Operators on maps with fewer rows than ranks may lower the share; nothing else may.
    assert result.share >= family.share or result.replicated, result
    assert not any("the rule failed" in reason for reason in result.fallbacks), result.fallbacks


def test_operators_without_a_rule_are_reported() -> None:
    family = FAMILIES["unforeseen"]
    [result] = measure(family, family.sizes[0], [3])
    named: Any = " ".join(result.fallbacks)
    assert "aten.sort.default: sort over the rows" in named
    assert "aten.median.default: the operator has no rule" in named
    assert result.exact <= 1e-5
