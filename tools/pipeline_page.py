# SPDX-License-Identifier: Apache-2.0
"""The page docs/pipelines-matrix.md, from the lines of tools/pipeline_matrix.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline_matrix import LIMIT, MODES, SPREAD, all_kinds, displaced, passed
from pipeline_session import OWN, ROUNDING, SCHEDULERS

_SPREAD = ", ".join(name.replace("_", " ") for name in SPREAD)
_HEAD = f"""# Which pipelines work

Written by `python tools/pipeline_matrix.py --docs docs/pipelines-matrix.md` from `docs/measurements/pipelines.jsonl`.
Do not edit.

Each kind is a pipeline of diffusers with small random networks (`tools/pipeline_kinds.py`,
`tools/pipeline_attached.py`), drawn with `districompile.enable` and the eager backend, in float32, on a CPU. Figures
are the largest difference of a picture from one device's, relative to the largest value. Exact figures must be at most
{LIMIT:g}. Every picture was drawn twice, and was the same bits both times.

- *exact*: two ranks in one process.
- *displaced*: two exact steps, then displaced ones, without a drift limit. The figure is the drift of random networks,
  which are no measure for trained ones. Displaced calls were counted.
- *two images*: an image after another one is the same bits as without it; the figure is of its exact phase.
- *three processes*: over gloo, exact; all ranks had the same bits.

The cells of a kind were drawn one after the other by one enabled pipeline. A dash was not run. A line is kept until it
is run again, so that lines may be of different commits of the project.
"""
_SCHEDULERS = f"""
## Schedulers

The largest exact figure of *exact*, *two images* and, for {_SPREAD}, *three processes*. Their displaced pictures are
the same bits twice, too. "n/a": diffusers cannot draw the kind with this scheduler on one device. \\*: some modes were
not run yet.

"""


def page(lines: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, str]]) -> str:
    """Return the page. ``wanted`` are all cells: those without a line are listed as not run."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    found |= {(line["kind"], line["scheduler"], line["mode"]): dict(line) for line in lines}
    notes: list[str] = []
    parts = [_HEAD, "\n## Kinds\n\n", _row("kind", "family", *MODES), _row(*["---"] * (2 + len(MODES)))]
    for name, kind in all_kinds().items():
        figures = (_text([(name, OWN, mode)], found, notes) for mode in MODES)
        parts.append(_row(name.replace("_", " "), kind.family, *figures))
    names = [name.removesuffix("Scheduler").removesuffix("Discrete") for name in SCHEDULERS]
    parts += [_SCHEDULERS, _row("kind", *names), _row(*["---"] * (1 + len(names)))]
    for name, kind in all_kinds().items():
        if not kind.refused:
            modes = MODES if name in SPREAD else MODES[:3]
            figures = (_text([(name, s, mode) for mode in modes], found, notes) for s in SCHEDULERS)
            parts.append(_row(name.replace("_", " "), *figures))
    missing = [w for w in wanted if (w["kind"], w["scheduler"], w["mode"]) not in found]
    refused = {kind: line["refused"] for (kind, *_), line in found.items() if line.get("refused") and passed(line)}
    if refused:
        text = "".join(f"- {kind.replace('_', ' ')}: {reason}\n" for kind, reason in refused.items())
        parts.append("\n## Refused, with the way out\n\n" + text)
    absent = {(line["kind"], line["scheduler"]): line["absent"] for line in found.values() if line.get("absent")}
    if absent:
        parts.append("\n## What diffusers cannot draw on one device\n\n" + "".join(_absent(absent)))
    if notes:
        parts.append("\n## What did not pass\n\n" + "".join(f"- {note}\n" for note in notes))
    if missing:
        parts.append(f"\n{len(missing)} of {len(wanted)} cells were not run yet (-). The tool runs what is missing.\n")
    else:
        parts.append(f"\nAll {len(wanted)} cells were run.\n")
    return "".join(parts)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _text(
    cells: Sequence[tuple[str, str, str]], lines: Mapping[tuple[str, ...], dict[str, Any]], notes: list[str]
) -> str:
    """Return the text of one or several cells: the largest exact figure, or what is wrong with one of them."""
    worst, missing = 0.0, 0
    for cell in cells:
        line = lines.get(cell)
        if line is None:
            missing += 1
            continue
        if line.get("absent") and passed(line):
            return "n/a"
        if line.get("refused"):
            if not passed(line):
                notes.append(f"{', '.join(cell)}: {line['refused']}")
            return "refused"
        if not passed(line):
            return _failed(cell, line, notes)
        if len(cells) == 1 or cell[2] != "displaced":
            worst = max(worst, line["error"])
    if missing == len(cells):
        return "-"
    return f"{worst:.0e}" + ("\\*" if missing else "")


def _failed(cell: tuple[str, str, str], line: Mapping[str, Any], notes: list[str]) -> str:
    if line.get("absent"):
        notes.append(f"{', '.join(cell)}: {line['absent']}")
        return "**n/a**"
    equal = "" if line["same"] and line.get("ranks_equal", True) else ", and not the same bits"
    idle = ", and no displaced calls" if cell[2] == "displaced" and not displaced(dict(line)) else ""
    one = line.get("one_device")
    beside = "" if one is None else f"; one device, where its UNet's outputs are off by {ROUNDING:g}: {one:.1e}"
    notes.append(f"{', '.join(cell)}: {line['error']:.1e}{equal}{idle}{beside}")
    return f"**{line['error']:.0e}**"


def _absent(found: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Yield a line for each reason, with the kinds and schedulers that have it."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for (kind, scheduler), reason in found.items():
        reasons.setdefault(reason.split(". ")[0][:160], {}).setdefault(kind.replace("_", " "), []).append(scheduler)
    for reason, kinds in reasons.items():
        where = "; ".join(f"{kind} ({', '.join(s)})" for kind, s in kinds.items())
        yield "\n  ".join(textwrap.wrap(f"- {reason}: {where}", 150, break_long_words=False)) + "\n"
