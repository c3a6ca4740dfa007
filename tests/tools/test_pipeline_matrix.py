"""Test the matrix of pipelines: its cells, what passes, and the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pipeline_matrix
import pipeline_page
from pipeline_session import OWN, SCHEDULERS


def line(kind: str, mode: str, **found: Any) -> dict[str, Any]:
    calls = {"unet": ["2+4"], "vae.decoder": ["1+0"]}
    given = {"kind": kind, "scheduler": OWN, "mode": mode, "same": True, "error": 1e-6, "calls": calls}
    return {**given, **found}


def test_every_kind_has_every_mode_once() -> None:
    cells = list(pipeline_matrix.cells())
    assert len(cells) == len(set(cells))
    kinds = pipeline_matrix.all_kinds()
    assert len(kinds) >= 40
    for name in kinds:
        own = {c.mode for c in cells if c.kind == name and c.scheduler == OWN}
        assert own == set(pipeline_matrix.MODES)
        others = {c.scheduler for c in cells if c.kind == name and c.mode == "displaced"}
        assert others == {OWN, *SCHEDULERS} and len(SCHEDULERS) >= 10


def test_what_passes() -> None:
    passed = pipeline_matrix.passed
    assert passed(line("sdxl", "exact")) and passed(line("sdxl", "displaced", error=0.3))
    assert not passed(line("sdxl", "exact", error=2e-4)) and not passed(line("sdxl", "displaced", same=False))
    assert not passed(line("sdxl", "three processes", ranks_equal=False))
    assert not passed(line("sdxl", "exact", refused="ConvertError: no"))
    assert not passed(line("sdxl", "displaced", calls={"unet": ["6+0"], "vae.decoder": ["1+0"]}))
    assert passed(line("guidance_that_stops", "displaced", calls={"unet": ["3+0", "2+1"]}))
    sag = line("sag", "exact", refused="InputError: unet has a forward hook")
    assert passed(sag) and not passed(line("sag", "exact"))
    assert not passed(line("sag", "exact", refused="KeyError: 'x'"))
    assert passed(line("sdxl", "exact", scheduler="LCMScheduler", absent="TypeError: no"))
    assert not passed(line("sdxl", "exact", absent="TypeError: no"))  # one device draws every kind with its own


def test_page_lists_failures_refusals_and_what_is_missing() -> None:
    lines = [
        line("sdxl", "exact"), line("sag", "exact", refused="InputError: a hook"), line("pag", "exact", error=0.01),
        line("lora", "exact", error=float("nan")), line("freeu", "displaced", same=False),
        line("lora", "displaced", calls={"unet": ["6+0"]}),
        line("sag", "displaced", refused="InputError: a forward hook: leave it out"),
        line("sdxl", "exact", scheduler="DDIMScheduler", absent="LMS: no such thing"),
    ]  # fmt: skip
    wanted = [{"kind": c.kind, "scheduler": c.scheduler, "mode": c.mode} for c in pipeline_matrix.cells()]
    page = pipeline_page.page(lines, wanted)
    assert "| sdxl | text to image | 1e-06 | - | - | - |" in page
    assert "sag, its own, exact: InputError: a hook" in page
    assert "pag, its own, exact: 1.0e-02" in page and "lora, its own, exact: nan" in page
    assert "freeu, its own, displaced: 1.0e-06, and not the same bits\n" in page
    assert "lora, its own, displaced: 1.0e-06, and no displaced calls\n" in page
    assert "- LMS: no such thing: sdxl (DDIMScheduler)" in page and "| sag | guidance | refused | refused |" in page
    assert "- sag: InputError: a forward hook: leave it out" in page
    assert f"{len(wanted) - len(lines)} of {len(wanted)} cells were not run" in page


def test_a_session_draws_cells_of_a_kind_with_one_conversion(tmp_path: Path) -> None:
    """Modes and schedulers in turn, and the reason where one device cannot draw."""
    modes = ((OWN, "exact"), (OWN, "displaced"), ("DPMSolverMultistepScheduler", "two images"))
    cells = [pipeline_matrix.Cell("guidance_in_two_calls", *which) for which in modes]
    lines = list(pipeline_matrix.run_cells(cells, tmp_path, 2, False))
    assert all(map(pipeline_matrix.passed, lines)) and len(lines) == 3
    assert len(list(tmp_path.iterdir())) == 1  # the UNet
    (found,) = pipeline_matrix.run_cells(
        [pipeline_matrix.Cell("latent_consistency", "DDIMScheduler", "exact")], tmp_path, 2, False
    )
    assert "original_inference_steps" in found["absent"] and pipeline_matrix.passed(found)
