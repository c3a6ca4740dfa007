"""Comparing pictures, and looking for a setting that is good enough."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import districompile as dc
from districompile.cli.checks import seeds as parse_seeds
from districompile.cli.commands.run_rank import drift_warning, not_finite
from districompile.cli.main import main
from districompile.ir.ops import ops
from districompile.ir.unit import DISPLACEABLE, DRIFT_LIMIT
from districompile.plan.options import PlanOptions
from districompile.plan.plan_report import PlanReport, QualitySearch, QualityTrial
from districompile.quality import metrics, reference
from districompile.quality.cases import Case, QualityError, demo_prompts, make_cases, read_prompts
from districompile.quality.draw import Drawn
from districompile.quality.floor import REUSE, Candidate, ladder, parse_floor, reusing, search
from districompile.quality.measure import Measured, Result, check_modes, compare, options_of
from districompile.quality.page import worst_cases, write_page
from tests.helpers_net import make_program


def picture(seed: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 24, generator=torch.Generator().manual_seed(seed))


def test_psnr() -> None:
    a = picture(0)
    assert metrics.psnr(a, a) == [metrics.IDENTICAL] * 2
    assert metrics.psnr(a + 0.1, a) == pytest.approx([20.0] * 2, abs=1e-4)
    assert math.isnan(metrics.psnr(a * math.nan, a)[0])


def test_ssim_is_one_for_equal_pictures() -> None:
    found = metrics.ssim(picture(0), picture(0))
    assert found is None or found == pytest.approx([1.0] * 2, abs=1e-5)
    other = metrics.ssim(picture(0), picture(1))
    assert other is None or max(other) < 0.5


def test_a_seam_shows_where_patches_meet() -> None:
    smooth = torch.linspace(0, 0.5, 32).reshape(1, 1, 32, 1).expand(1, 3, 32, 24)
    torn = smooth.clone()
    torn[:, :, 16:] += 0.2
    assert metrics.seams(smooth, smooth, [16]) == pytest.approx([1.0])
    assert metrics.seams(torn, smooth, [16])[0] > 5
    assert metrics.seams(torn, smooth, [8])[0] < 1
    assert metrics.seams(torn, smooth, [0, 32]) == [1.0]


def test_drift_is_relative_by_step_and_picture() -> None:
    want = torch.ones(3, 2, 4, 5, 5)
    got = want.clone()
    got[1, 0] *= 1.5
    got[2] *= 2
    assert metrics.drift(got, want) == [[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]]


def test_prompts_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# what to draw\n a cat \n\na dog\n")
    assert read_prompts(file) == ["a cat", "a dog"]
    for content, message in ((b"\n# none\n", "holds no prompt"), (b"\xff\xfe", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(QualityError, match=message):
            read_prompts(file)
    with pytest.raises(QualityError, match="No such file"):
        read_prompts(tmp_path / "missing.txt")


def test_cases() -> None:
    assert len(set(demo_prompts(64))) == 64
    assert demo_prompts(5) == demo_prompts(64)[:5]
    assert make_cases(["a", "b"], [1, 2]) == [Case("a", 1), Case("b", 1), Case("a", 2), Case("b", 2)]
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]
    for text in ("", "a", "1-", "1e3", str(2**64)):
        with pytest.raises(dc.Error, match="--seeds"):
            parse_seeds(text)


def test_what_is_not_finite_is_black_and_worst() -> None:
    want = Drawn(picture(0), None)
    bad = picture(0)
    bad[1] = math.nan
    scores = compare([Case("a", 0), Case("b", 0)], Drawn(bad, None), want, [0.5])
    assert [s.finite for s in scores] == [True, False]
    result = Result("way", 2, scores, 1.0)
    assert result.worst.case.prompt == "b" and result.to_dict()["not_finite"] == 1
    json.dumps(result.to_dict())


def test_page_holds_all_pictures(tmp_path: Path) -> None:
    cases = (Case("a <b> & c", 0), Case(None, 3))
    want, drawn = Drawn(picture(0), torch.ones(4, 2, 4)), Drawn(picture(1), torch.rand(4, 2, 4), (2, 3))
    result = Result("forecast", 8, compare(cases, drawn, want, [0.5]), 1.0)
    measured = Measured(cases, want, (result,), (drawn,))
    write_page(tmp_path / "page.html", "Pictures", ["20 steps"], measured)
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 4 and "a &lt;b&gt; &amp; c" in text and "<polyline" in text
    assert sorted(worst_cases(measured, 9)) == [0, 1]


@pytest.mark.parametrize("text", ["", "dB", "-3", "0", "100", "40 dBs", "inf", "nan"])
def test_floors_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(QualityError, match="--quality-floor"):
        parse_floor(text)


def test_floors() -> None:
    assert parse_floor("40dB") == parse_floor(" 40 db") == parse_floor("40.0") == 40.0


FIRST = Candidate("corrected_async", 4, 0.0, DISPLACEABLE)


def test_the_ladder_ends_with_exact_steps_alone() -> None:
    found = list(ladder(FIRST))
    assert found[0] == FIRST and len(set(found)) == len(found)
    assert found[-1].displace == () and found[-1].groupnorm == "sync"
    assert any(c.drift_limit == DRIFT_LIMIT for c in found)
    default = list(ladder(Candidate("forecast", 4, DRIFT_LIMIT, DISPLACEABLE)))
    limits = [c.drift_limit for c in default]
    assert limits == sorted(limits, reverse=True)


def scored(values: list[float]) -> Result:
    case = Case("x", 0)
    scores = compare(
        [case] * len(values), Drawn(picture(0, len(values)), None), Drawn(picture(0, len(values)), None), []
    )
    return Result("way", 2, tuple(dataclasses.replace(s, psnr=v) for s, v in zip(scores, values, strict=True)), 0.0)


def test_the_first_setting_whose_worst_picture_is_good_is_chosen() -> None:
    values = iter([[50.0, 20.0], [39.9, 60.0], [40.0, 41.0], [90.0, 90.0]])
    trials = search(40.0, ladder(FIRST), lambda _: scored(next(values)))
    assert [t.good for t in trials] == [False, False, True]
    assert trials[-1].worst_db == 40.0 and json.dumps([dataclasses.asdict(t.record()) for t in trials])
    with pytest.raises(QualityError, match=r"no setting reaches 99 dB: the best was .* 50.0 dB"):
        search(99.0, ladder(FIRST), lambda _: scored([50.0]))


def test_the_reference_turns_black_where_ours_does_not() -> None:
    """A mean of 300 beside a spread of 0.1, in half precision: squares cancel."""
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 8, 8) * 0.1 + 300).half()
    ours = ops.normalize(x, ops.merge_moments(ops.moments(x, 2), [128.0]), 2, None, None, 1e-5)
    stats = reference.merge_moments(reference.moments(x, 2), [128.0])
    theirs = reference.normalize(x, stats, 2, None, None, 1e-5)
    want = torch.nn.functional.group_norm(x.double(), 2)
    assert float((ours - want).abs().max()) < 0.01
    assert not theirs.isfinite().all() or float((theirs - want).abs().max()) > 1


def test_the_reference_corrects_by_the_count_of_one_patch() -> None:
    x = torch.randn(1, 4, 2, 4, dtype=torch.float64)
    stats = reference.merge_moments(reference.moments(x, 2), [16.0])
    got = reference.normalize(x, stats, 2, None, None, 0.0)
    grouped = x.reshape(1, 2, -1)
    want = (grouped - grouped.mean(-1, keepdim=True)) / grouped.std(-1, keepdim=True)
    torch.testing.assert_close(got, want.reshape(x.shape))


def test_run_warns_where_a_picture_moved_too_fast() -> None:
    options = PlanOptions(drift_limit=1.0)
    assert drift_warning({"drift": 1.9}, options, PlanReport()) is None
    assert drift_warning({"drift": None}, options, PlanReport()) is None
    assert not_finite({"latents": torch.tensor([1.0, 2.0]), "image": None}) == {}
    assert not_finite({"image": torch.tensor([1.0, float("nan"), float("-inf"), 0.0])}) == {"image": 0.5}
    assert drift_warning({"drift": 9.0}, PlanOptions(drift_limit=0.0), PlanReport()) is None
    warning = drift_warning({"drift": 4.0}, options, PlanReport())
    assert warning is not None and "4.0 times" in warning and "--drift-limit" in warning
    trial = QualityTrial("sync", 41.0, 45.0, "a cat", None, 5.0, True)
    seen = PlanReport(quality=QualitySearch("40dB", 8, (trial,)))
    assert drift_warning({"drift": 4.0}, options, seen) is None


def test_few_rows_are_said_with_the_way_out() -> None:
    line = make_program(8).report().few_rows()
    assert line is not None and "few rows a rank: 2 of the map of 20, so 50%" in line and "--cfg split" in line
    assert make_program(2).report().few_rows() is None
    assert make_program(8, displace="none").report().few_rows() is None
    assert "few rows a rank" in str(make_program(8).report())


@pytest.mark.slow
def test_quality_of_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways of running the ranks give the same pictures, and the other mode is beside them in one run."""
    bundle, page = str(tmp_path / "bundle"), tmp_path / "page.html"
    assert main(["convert", "demo", "--gpus", "2", "--backend", "eager", "--out", bundle]) == 0
    common = ["verify", bundle, "--quality", "--pictures", "1", "--steps", "6", "--seeds", "7", "--json"]
    capsys.readouterr()
    assert main([*common, "--modes", "reference", "--report", str(page)]) == 0
    here = json.loads(capsys.readouterr().out)["results"]
    assert main([*common, "--processes"]) == 0
    (there,) = json.loads(capsys.readouterr().out)["results"]
    assert [r["way"] for r in here] == ["bundle (forecast)", "reference"]
    assert there["psnr_db"]["worst"] == pytest.approx(here[0]["psnr_db"]["worst"], abs=0.01)
    assert there["exact_steps"] == here[0]["exact_steps"] and here[0]["psnr_db"]["worst"] > 30
    assert page.read_text().count("data:image/png") == 3


@pytest.mark.slow
def test_a_floor_is_reached_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's mode with two exact steps does not reach it; what was tried is in the bundle."""
    bundle, prompts = tmp_path / "bundle", tmp_path / "prompts.txt"
    prompts.write_text("a blue square right of a red star in the rain\n")
    words = [
        "convert",
        "demo",
        "--gpus",
        "8",
        "--backend",
        "eager",
        "--out",
        str(bundle),
        "--groupnorm",
        "corrected_async",
    ]
    words += ["--warmup-steps", "2", "--drift-limit", "0", "--quality-floor", "38dB", "--quality-steps", "8"]
    words += ["--quality-prompts", str(prompts), "--quality-seeds", "7"]
    assert main([*words, "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["report"]["quality"]
    trials = quality["trials"]
    assert not trials[0]["good"] and trials[0]["worst_db"] < 38 and trials[-1]["good"]
    assert main(["inspect", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "quality floor 38dB" in printed and "<- chosen" in printed
    assert "few rows a rank: 2 of the map of 16" in printed or trials[-1]["candidate"].endswith("none")


@pytest.mark.parametrize(
    "words,message",
    [
        (["--modes", "fast"], "there is no mode 'fast'"),
        (["--report", "page.txt"], "ends in .html"),
        (["--seeds", "x"], "--seeds x"),
        (["--prompts", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_bad_quality_options_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_bundle: Path
) -> None:
    assert main(["verify", str(demo_bundle), "--quality", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "bundle"
    assert main(["convert", "demo", "--gpus", "2", "--backend", "eager", "--out", str(path)]) == 0
    return path


def test_reuse_is_tried_before_all_else_where_the_user_allows_it() -> None:
    first = Candidate("forecast", 4, 1.0, DISPLACEABLE)
    found = list(reusing(first))
    assert [c.reuse for c in found[:4]] == [r for r in REUSE for _ in range(2)]
    assert [c.drift_limit for c in found[:4]] == [1.0, 0.5] * 2
    assert found[4:] == list(ladder(first)) and "reuse" not in str(found[4])
    assert "reuse deep=3" in str(found[0]) and found[0].options["reuse"] == "deep=3"
    given = dataclasses.replace(first, reuse="deep=2:1")
    assert {c.reuse for c in ladder(given)} == {"deep=2:1"}


def test_modes_name_reuse_and_differences() -> None:
    assert options_of("sync") == {"groupnorm": "sync", "reuse": "none", "transfer_bits": None}
    assert options_of("deep=2:1+8bit") == {"groupnorm": "forecast", "reuse": "deep=2:1", "transfer_bits": 8}
    for mode, message in (("deep=x", "give none, or deep=N"), ("deep=2+fast", "no mode 'fast'")):
        with pytest.raises(QualityError, match=message):
            check_modes([mode])


def test_auto_needs_a_floor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", "--gpus", "2", "--reuse", "auto"]) == 2
    assert "--reuse auto: only with --quality-floor" in capsys.readouterr().err
