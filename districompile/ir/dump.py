# SPDX-License-Identifier: Apache-2.0
"""Dumps of a graph in a folder: the captured graph, then after each pass the graph and what the pass changed."""

from __future__ import annotations

import difflib
from pathlib import Path

from districompile.ir.printer import print_graph
from districompile.ir.unit import CompilationUnit

_CONTEXT = 2  # unchanged nodes around a change


class GraphDump:
    """A writer of ``NN-PASS.txt`` (the graph after the pass) and ``NN-PASS.diff`` (a unified diff to the graph before).

    ``00-captured.txt`` is the graph before the first pass. Passes of one phase are called ``NN-PHASE-PASS``. A pass
    that changed nothing has an empty diff.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts: dict[str | None, str] = {}  # the last text of each phase; None: shared by both
        self._number = 0

    def captured(self, unit: CompilationUnit) -> None:
        """Write the graph before the first pass. Later calls do nothing."""
        if not self._texts:
            self._texts[None] = dump_text(unit)
            self._write("00-captured.txt", self._texts[None])

    def after(self, name: str, unit: CompilationUnit) -> None:
        """Write the graph after the pass ``name``, and its difference to the graph before."""
        self._number += 1
        text = dump_text(unit)
        before = self._texts.get(unit.phase, self._texts.get(None, ""))
        self._texts[unit.phase] = text
        stem = f"{self._number:02d}{f'-{unit.phase}' if unit.phase else ''}-{name}"
        self._write(f"{stem}.txt", text)
        changes = difflib.unified_diff(
            before.splitlines(), text.splitlines(), "before", f"after {name}", lineterm="", n=_CONTEXT
        )
        self._write(f"{stem}.diff", "\n".join(changes))

    def _write(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_text(text + "\n" if text else "")


def dump_text(unit: CompilationUnit) -> str:
    """Return the graph as text, after comment lines with its stage, the number of ranks and the cut points."""
    phase = f", {unit.phase} phase" if unit.phase else ""
    lines = [f"# {unit.stage} graph{phase}, {unit.options.ranks} ranks"]
    for rows, bounds in sorted(unit.report.rows.items(), key=lambda item: -int(item[0])):
        if bounds is not None:
            lines.append(f"# cut points of {rows} rows: {' '.join(map(str, bounds))}")
    return "\n".join([*lines, print_graph(unit.graph)])
