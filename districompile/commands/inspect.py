"""``districompile inspect``: what a bundle holds, read from its plan and manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from districompile.bundle import Bundle
from districompile.commands.common import console, print_json
from districompile.commands.convert import folder_bytes, pass_lines, quality_lines
from districompile.ir.plan import Phase
from districompile.report import Report, phase_text, size


def main(path: Path, graph: Phase | None, as_json: bool) -> int:
    """Print the report of the bundle at ``path``, or the steps of one phase."""
    bundle = Bundle.open(path, verify="quick")
    if graph is not None:
        text = phase_text(bundle.plan, graph)
        if as_json:
            print_json({"phase": graph, "steps": text.splitlines()})
        else:
            print(text)
        return 0
    report = Report(bundle.plan)
    if as_json:
        print_json({"bundle": str(path), "manifest": _summary(bundle.manifest), "report": report.to_dict()})
        return 0
    terminal = console()
    summary = ", ".join(f"{k} {v}" for k, v in _summary(bundle.manifest).items() if not isinstance(v, dict | list))
    terminal.print(f"{path}: {size(folder_bytes(path))}; {summary}", markup=False, highlight=False)
    terminal.print(report)
    for line in (*quality_lines(bundle.plan.report), *pass_lines(bundle.plan.report)):
        terminal.print(line, markup=False, highlight=False)
    return 0


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its long tables of hashes and engines."""
    return {k: v for k, v in manifest.items() if k not in ("files", "engines", "config")}
