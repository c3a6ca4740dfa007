"""Fixtures: a small pipeline on two simulated ranks, whose UNet is converted once for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import pipeline_attached
import pipeline_kinds

import districompile as dc

assert pipeline_attached


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversions")


@pytest.fixture
def pipe() -> Any:
    return pipeline_kinds.KINDS["text_to_image"].make()[0]


@pytest.fixture
def enabled(pipe: Any, cache: Path) -> Iterator[Any]:
    with dc.enable(
        pipe, 2, components=["unet"], lockstep=True, backend="eager", cache=cache, warmup_steps=2, drift_limit=0.0
    ) as found:
        found.phase = "exact"
        yield found
