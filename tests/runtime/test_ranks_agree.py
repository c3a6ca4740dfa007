"""Ranks that are called differently: rank 0's inputs hold, or every rank gets one error; the next image is right."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers_images import dawdle, differing_ranks, make

from districompile.errors import LaunchError
from districompile.runtime.processes.launcher import launch

pytestmark = pytest.mark.multiprocess
EXACT = 1e-5


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_are_called_differently(tmp_path: Path, ranks: int) -> None:
    make(tmp_path / "b", ranks)
    found = launch(differing_ranks, (str(tmp_path / "b"),), ranks)
    for got in found.values():
        assert got["other text"] <= EXACT
        for name in ("other timestep", "stopped"):
            assert got[name].startswith("RanksDifferError: rank 1 is at timestep"), got[name]
        for name in ("other text", "other timestep", "refused", "stopped", "ended"):
            errors = got[name, "next image"]
            assert max(errors[:3]) <= EXACT < min(errors[3:]), (name, errors)
    assert "rank 1 is at timestep 100 and rank 0 at timestep 500" in found[0]["other timestep"]
    assert "rank 1 is at timestep 870 and rank 0 at timestep 950" in found[0]["stopped"]
    assert found[0]["refused"] == "RanksDifferError: rank 1 refused its inputs: see the error of that rank"
    assert found[0].pop("ended") == "ended"
    assert {got["ended"] for rank, got in found.items() if rank} == {
        "RanksDifferError: rank 0 refused its inputs: see the error of that rank"
    }
    assert found[1]["refused"].startswith("InputError: sample: converted for")


@pytest.mark.slow
def test_a_rank_that_stays_away_in_the_midst_of_an_image_is_named(tmp_path: Path) -> None:
    make(tmp_path / "b", 2)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="rank 0 lost rank 1: it does not come to the call within 5 s"):
        launch(dawdle, (str(tmp_path / "b"),), 2)
    assert time.monotonic() - began < 45  # with starting the processes; ten times the timeout would be 50 by itself
