"""The tables of docs/quality.md, made from lines of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.quality_table import pool, read, tables, write_docs

ROOT = Path(__file__).resolve().parents[2]


def line(seeds: str, pictures: int, mean: float, worst: float, **job: Any) -> dict[str, Any]:
    """A measurement as the tool writes it; ``job``: fields that differ from the default's."""
    whole = {"mode": "forecast", "ranks": 3, "steps": 50, "prompts": 64, "warmup_steps": 4, "drift_limit": 1.0,
             "dtype": "float32", "seeds": seeds, **job}  # fmt: skip
    return {
        "way": whole["mode"], "ranks": whole["ranks"], "pictures": pictures, "psnr_db": {"mean": mean, "worst": worst},
        "worst": {"prompt": f"seeds {seeds}", "seed": 0}, "not_finite": 0, "below_35_db": int(worst < 35),
        "exact_steps": 10.0 + mean / 10, "device": f"device {seeds}", "job": whole,
    }  # fmt: skip


def test_seeds_of_one_job_are_pooled() -> None:
    (found,) = pool([line("0", 64, 50.0, 40.0), line("1-3", 192, 54.0, 32.0)])
    assert found["pictures"] == 256 and found["seeds"] == [0, 1, 2, 3]
    assert found["psnr_db"] == {"mean": pytest.approx(53.0), "worst": 32.0}
    assert found["worst"]["prompt"] == "seeds 1-3" and found["below_35_db"] == 1
    assert found["exact_steps"] == pytest.approx(15.3)
    assert found["devices"] == ["device 0", "device 1-3"]


def test_a_picture_that_is_not_finite_is_the_worst_of_a_pool() -> None:
    black = {**line("1", 64, 50.0, 45.0), "not_finite": 2}
    (found,) = pool([line("0", 64, 50.0, 40.0), black])
    assert found["psnr_db"]["worst"] == 45.0 and found["not_finite"] == 2
    assert "50.0 / 45.0 (2 not finite)" in tables([line("0", 64, 50.0, 40.0), black])


@pytest.mark.parametrize(
    "other",
    [{"drift_rule": 2}, {"mode": "sync"}, {"ranks": 4}, {"steps": 20}, {"prompts": 8}, {"dtype": "float16"},
     {"drift_limit": 0.5}, {"warmup_steps": 8}],
)  # fmt: skip
def test_lines_of_different_jobs_are_never_pooled(other: dict[str, Any]) -> None:
    lines = [line("0", 64, 50.0, 40.0), line("1", 64, 52.0, 41.0, **other)]
    assert len(pool(lines)) == 2
    text = tables(lines)
    assert "50.0 / 40.0" in text and "52.0 / 41.0" in text and "51.0" not in text
    one_table = "mode" in other or "ranks" in other
    assert text.count("| group norm |") == (1 if one_table else 2)


def test_lines_without_a_rule_have_the_first_one() -> None:
    lines = [line("0", 64, 50.0, 40.0), line("1", 64, 52.0, 41.0, drift_rule=1)]
    assert [found["pictures"] for found in pool(lines)] == [128]


def test_a_seed_that_was_measured_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="measure one seed twice"):
        pool([line("0-2", 192, 50.0, 40.0), line("2", 64, 50.0, 40.0)])


def test_tables_say_how_many_pictures_they_have() -> None:
    text = tables([line("0-3", 256, 50.0, 40.0), line("0", 64, 50.5, 41.0, ranks=8)])
    assert text.startswith("50 steps, 256 pictures (64 prompts, seeds 0, 1, 2, 3), float32, drift limit 1 (rule 1), ")
    assert "| `forecast` | 50.0 / 40.0 | 50.5 / 41.0 (64 pictures) |" in text
    fixed = tables([line("0", 64, 50.0, 40.0, drift_limit=0.0)])
    assert "(64 prompts, seed 0), float32, 4 steps exact (" in fixed


def test_only_the_tables_of_a_page_are_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- quality tables -->\nold\n<!-- end -->\nafter\n")
    write_docs(page, [line("0", 64, 50.0, 40.0)])
    text = page.read_text()
    assert text.startswith("before\n<!-- quality tables -->\n50 steps") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    write_docs(page, [line("0", 64, 50.0, 40.0)])
    assert page.read_text() == text


def test_the_page_has_the_tables_of_the_measurements() -> None:
    assert tables(read(ROOT / "docs/measurements/quality.jsonl")) in (ROOT / "docs/quality.md").read_text()
