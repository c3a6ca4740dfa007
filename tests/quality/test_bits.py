# SPDX-License-Identifier: Apache-2.0
"""Bits among the settings that the gate on quality chooses from, and among the modes that it compares."""

from __future__ import annotations

from typing import Any

import pytest

from districompile.cli.main import main
from districompile.ir.unit import DISPLACEABLE
from districompile.quality.cases import QualityError
from districompile.quality.floor import Candidate, ladder
from districompile.quality.measure import check_modes, options_of

FIRST = Candidate("forecast", 4, 1.0, DISPLACEABLE)


def test_each_setting_is_tried_in_8_bits_and_without() -> None:
    plain, both = list(ladder(FIRST)), list(ladder(FIRST, ("fp8", "none")))
    assert [c for c in both if c.quantise == "none"] == plain and len(both) == 2 * len(plain)
    assert [c.quantise for c in both] == ["fp8", "none"] * len(plain)
    assert str(both[0]).endswith("displace all, fp8") and str(both[1]).endswith("displace all")


def test_modes_with_bits() -> None:
    check_modes(["sync", "exact+fp8", "forecast+fp8:40", "forecast+float"])
    for wrong, part in (("sync+int3", "int3"), ("sync+none", "none"), ("fp8:400", "fp8:400")):
        with pytest.raises(QualityError, match=f"no mode '{part}'; there are: .*fp8, float"):
            check_modes([wrong])
    options = {"displace": DISPLACEABLE, "quantise": ("layers",), "drift_limit": 1.0}
    plain = {**options, "groupnorm": "forecast", "reuse": "none", "transfer_bits": None}
    assert options_of("sync", options) == {**plain, "groupnorm": "sync"}
    assert options_of("sync+float", options)["quantise"] == "none"
    assert options_of("exact+fp8:40", options) == {**plain, "displace": "none", "quantise": "fp8:40"}
    assert options_of("fp8+deep=2", options) == {**plain, "quantise": "fp8", "reuse": "deep=2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--quantise", "int3"], "is none of: none, auto, fp8"), (["--quantise", "auto"], "give --quality-floor")],
)
def test_mistakes_of_the_command_line(words: list[str], message: str, capsys: Any, tmp_path: Any) -> None:
    assert main(["convert", "demo", "--gpus", "2", "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ") and "Traceback" not in error
