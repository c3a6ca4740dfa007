"""Test the page that tools/kernels_page.py makes of the lines of bench_kernels.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_check import ROOT, load

tool = load(ROOT / "tools" / "kernels_page.py")


def attention(keys: int, **us: float) -> dict[str, Any]:
    size = {"name": "a size", "batch": 1, "queries": 64, "keys": keys, "heads": 2, "width": 64, "groups": 0}
    return {"part": "attention", **size, "mask": "none", "us": us, "gpu": "a GPU", "torch": "2.11"}


LINES = [
    attention(77, baseline=5.0, cuDNN=4.0, **{"FlashAttention-4": 3.0, "custom (64, 0, 4, 1)": 2.0}),
    attention(77, baseline=5.0, **{"custom (64, 0, 4, 1)": 4.9, "custom (128, 0, 8, 1)": 4.95}),
    attention(999, baseline=5.0),
    {"part": "fp8", "rows": 8, "inner": 16, "columns": 32, "gated": False, "gpu": "a GPU", "torch": "2.11",
     "us": {"baseline": 200.0, "160": 150.0, "sixteen": 120.0}},
]  # fmt: skip


def test_a_kernel_is_compared_with_the_best_library() -> None:
    text = "\n".join(tool.page(LINES))
    assert "| attention to few keys | 1 of 2 sizes | 33% to 33% |" in text  # 2 % is too little
    assert "attention to many keys" not in text.partition("## Attention")[0]  # nothing was tried
    assert "| linear layer in 8 bits | 0 of 1 sizes | - |" in text
    assert "| a size | 1 x 64 x 77, 2 x 64 | 5.0 | 4.0 | 3.0 | **2.0** |" in text
    assert "| 8 rows, 16 to 32 | 200 | **120** | 150 |" in text


def test_the_page_is_that_of_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "kernels.md"
    lines = ROOT / "docs" / "measurements" / "kernels-h200.jsonl"
    monkeypatch.setattr(sys, "argv", ["kernels_page.py", str(lines), "--out", str(page)])
    tool.main()
    assert page.read_text() == (ROOT / "docs" / "kernels.md").read_text()
    empty = tmp_path / "empty"
    empty.write_text(json.dumps("")[:0])
    monkeypatch.setattr(sys, "argv", ["kernels_page.py", str(empty)])
    with pytest.raises(SystemExit, match="has no line"):
        tool.main()
