"""Test an enabled pipeline on two processes: one converts, both draw, and a rank with other weights is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_live import worker

from districompile.runtime.processes.launcher import launch


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    ranks = launch(worker, (str(tmp_path),), 2)
    assert len(list(tmp_path.iterdir())) == 1
    for found in ranks.values():
        assert found["plain"] <= 1e-4 and found["lora"] <= 1e-4 < found["differ"]
        assert found["said"].startswith("rank 1 calls other weights or adapters than rank 0 (unet)")
    assert ranks[0]["hash"] == ranks[1]["hash"]
