# SPDX-License-Identifier: Apache-2.0
"""Run every kind of pipeline with ``districompile.enable`` and compare it with one device: docs/pipelines-matrix.md.

Each cell is one line of JSON in ``--results``: a kind, a scheduler and a mode. What has a line is not run again, unless
with ``--again``. The pipelines are small and random (tools/pipeline_kinds.py), on a CPU, in float32.

    python tools/pipeline_matrix.py                                    # every cell that has no line yet
    python tools/pipeline_matrix.py --only controlnet --modes exact    # some of them
    python tools/pipeline_matrix.py --docs docs/pipelines-matrix.md    # write the page from the lines

Modes: ``exact`` (two ranks in one process); ``displaced`` (two exact steps, then displaced ones; its figure is for
information: the drift of random networks); ``two images`` (an image after another one has to be the same bits as
without it, and its exact phase is compared); ``three processes`` (over gloo, exact). Exact figures have to be within
1e-4 of one device, and every picture is drawn twice, bit for bit the same. A scheduler that one device cannot draw a
kind with is no failure: its line has the reason under ``absent``.

The cells of a kind share its conversions. ``--cache FOLDER`` keeps them between runs of the tool. Edits of
districompile's files make them anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from pipeline_session import OWN, SCHEDULERS, OneDeviceFails, Session, first_line  # noqa: E402

PROCESSES = "three processes"
MODES = ("exact", "displaced", "two images", PROCESSES)
SPREAD = ("text_to_image", "sdxl", "image_to_image")
LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    kind: str
    scheduler: str
    mode: str


def cells() -> Iterator[Cell]:
    """Yield the cells, those of one kind together: each kind's own scheduler first, then all others.

    Other schedulers run on three processes for ``SPREAD`` alone: processes see numbers, whichever scheduler made them.
    """
    others = [kind for kind in all_kinds() if kind not in SPREAD]
    for schedulers, kinds, modes in (
        ([OWN], list(all_kinds()), MODES[:3]),
        (SCHEDULERS, SPREAD, MODES[:3]),
        ([OWN], list(all_kinds()), MODES[3:]),
        (SCHEDULERS, SPREAD, MODES[3:]),
        (SCHEDULERS, others, MODES[:3]),
    ):
        for kind in kinds:
            yield from (Cell(kind, scheduler, mode) for scheduler in schedulers for mode in modes)


def all_kinds() -> dict[str, Any]:
    """Return the kinds by name."""
    import pipeline_attached
    import pipeline_kinds

    assert pipeline_attached
    return pipeline_kinds.KINDS


def run_cells(cells: Iterable[Cell], cache: Path, ranks: int, distributed: bool) -> Iterator[dict[str, Any]]:
    """Run cells, those of one kind with one session. Yield their lines. After an error the session is made again."""
    import torch

    torch.set_num_threads(1)
    for name, group in itertools.groupby(cells, key=lambda c: c.kind):
        session: Session | None = None
        for cell in group:
            started = time.monotonic()
            try:
                session = session or Session(all_kinds()[name], ranks, cache, distributed)
                found = session.cell(cell.scheduler, cell.mode)
                if cell.mode != "displaced" and found["error"] > LIMIT:
                    found["one_device"] = session.sensitivity(cell.scheduler, cell.mode)
            except OneDeviceFails as e:
                found = {"absent": str(e)}
            except Exception as e:
                found = {"refused": first_line(e)}
                if session is not None:
                    session.close()
                session = None
            yield {**dataclasses.asdict(cell), **found, "seconds": round(time.monotonic() - started, 1)}
        if session is not None:
            session.close()


def run_on_processes(cells: Sequence[Cell], cache: Path, results: Path) -> None:
    """Run cells on three processes, whose rank 0 writes the lines. After a failure the rest has new processes."""
    from districompile.errors import LaunchError
    from districompile.runtime.processes.launcher import launch

    while cells:
        try:
            launch(rank_work, (cells, str(cache), str(results)), 3)
            return
        except LaunchError as e:
            if str(e).startswith("ended by"):  # a signal to this process
                raise
            known = read(results)
            failed = next(c for c in cells if dataclasses.astuple(c) not in known)
            write(results, {**dataclasses.asdict(failed), "refused": first_line(e)})
            cells = cells[cells.index(failed) + 1 :]


def rank_work(cells: Sequence[Cell], cache: str, results: str) -> None:
    """The work of one rank."""
    import os

    warnings.simplefilter("ignore")
    for line in run_cells(cells, Path(cache), 3, True):
        if os.environ["RANK"] == "0":
            write(Path(results), line)


def passed(line: dict[str, Any]) -> bool:
    """Return whether a line shows what its mode has to show."""
    expected = all_kinds()[line["kind"]].refused
    if line.get("refused") or expected:
        return bool(expected) and expected in line.get("refused", "")
    if line.get("absent"):
        return bool(line["scheduler"] != OWN)
    exact = line["mode"] != "displaced"
    right = line["same"] and line.get("ranks_equal", True) and (not exact or line["error"] <= LIMIT)
    return bool(right and (exact or displaced(line)))


def displaced(line: dict[str, Any]) -> bool:
    """Return whether every network that was called more than twice in an image had displaced calls."""
    calls = [tuple(map(int, text.split("+"))) for texts in line["calls"].values() for text in texts]
    most = max((sum(c) for c in calls), default=0)
    return most <= 2 or any(c[1] for c in calls if sum(c) == most)


def main() -> int:
    """Run the cells that have no line, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=TOOLS.parent / "docs" / "measurements" / "pipelines.jsonl")
    parser.add_argument("--only", default="", help="a part of a kind's name, or several with commas")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--schedulers", default="", help="names of schedulers, or 'its own'; by default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--again", action="store_true", help="run cells that have a line again")
    parser.add_argument("--cache", type=Path, help="folder of conversions; by default a temporary one")
    parser.add_argument("--docs", type=Path, help="write this page, and run nothing")
    given = parser.parse_args()
    lines = read(given.results)
    if given.docs is not None:
        import pipeline_page

        given.docs.write_text(pipeline_page.page(list(lines.values()), [dataclasses.asdict(c) for c in cells()]))
        return 0
    wanted = [c for c in cells() if selected(c, given) and (given.again or dataclasses.astuple(c) not in lines)]
    if given.again:  # a line of before never stands for a cell that this run does not reach
        rewrite(given.results, [line for key, line in lines.items() if Cell(*key) not in wanted])
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch:
        run(wanted, given.cache or Path(scratch), given.results, given.seconds)
    found = read(given.results)
    return int(not all(dataclasses.astuple(c) in found and passed(found[dataclasses.astuple(c)]) for c in wanted))


def selected(cell: Cell, given: argparse.Namespace) -> bool:
    """Return whether the command line asks for a cell."""
    named = any(part in cell.kind for part in given.only.split(",")) and cell.mode in given.modes.split(",")
    return named and (not given.schedulers or cell.scheduler in given.schedulers.split(","))


def run(wanted: Sequence[Cell], cache: Path, results: Path, seconds: float) -> None:
    """Run cells in their order and write their lines, until the time is over."""
    began = time.monotonic()
    for on_processes, group in itertools.groupby(wanted, key=lambda c: c.mode == PROCESSES):
        if time.monotonic() - began > seconds:
            return
        if on_processes:
            for batch in batches(group):
                if time.monotonic() - began > seconds:
                    return
                run_on_processes(batch, cache, results)
            continue
        for line in run_cells(group, cache, 2, False):
            print(json.dumps(line), flush=True)
            write(results, line)
            if time.monotonic() - began > seconds:
                return


def batches(cells: Iterable[Cell], kinds: int = 6) -> Iterator[list[Cell]]:
    """Yield the cells of a few kinds at a time: what processes are started for once."""
    groups = [list(group) for _, group in itertools.groupby(cells, key=lambda c: c.kind)]
    for i in range(0, len(groups), kinds):
        yield [cell for group in groups[i : i + kinds] for cell in group]


def write(results: Path, line: dict[str, Any]) -> None:
    """Append a line to the results."""
    with results.open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def rewrite(results: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the results."""
    results.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def read(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the last line of each cell."""
    if not path.is_file():
        return {}
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(line["kind"], line["scheduler"], line["mode"]): line for line in found}


if __name__ == "__main__":
    sys.exit(main())
