# SPDX-License-Identifier: Apache-2.0
"""The page that ``gpu_coverage.py`` writes: a table a device, with one line a family."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = """# Coverage of compiled networks

Written by `tools/gpu_coverage.py`. The networks of [coverage](coverage.md), in their small configurations with random
parameters, compiled by the `inductor` backend with all optimisations, and run with all ranks in one process.

- **exact**: the relative error of the exact phase against the network in eager PyTorch on the same device.
- **displaced**: the largest relative error of three displaced steps, against the displaced program run by eager
  PyTorch on the same device.
- **float16**: both errors as above, but the exact phase is compared with float32 of the same weights and inputs. The
  figure in brackets is the error of eager PyTorch in float16.
- Limits: 1e-4 in float32 (twice that for displaced steps); in float16 three times eager's error, plus 1e-3.
"""
Line = Mapping[str, Any]


def page(lines: Sequence[Line], order: Sequence[str]) -> str:
    """Return the page as Markdown. ``order`` has the names of all families."""
    parts = [HEADER]
    machines = sorted({(str(x["device"]), str(x["torch"])) for x in lines}, key=lambda m: m[0].startswith("CPU"))
    gpus = [device for device, _ in machines if not device.startswith("CPU")]
    if not gpus:
        parts.append("**Nothing on this page ran on a GPU.**\n")
    for device, release in machines:
        found = [x for x in lines if (x["device"], x["torch"]) == (device, release)]
        parts += _of_device(device, release, found, order)
    return "\n".join(parts).rstrip() + "\n"


def _of_device(device: str, release: str, lines: Sequence[Line], order: Sequence[str]) -> list[str]:
    ran = {str(x["family"]) for x in lines}
    columns = sorted({(str(x["dtype"]), int(x["ranks"])) for x in lines}, key=lambda c: (c[0] != "float32", c))
    wrong = [x for x in lines if x["error"] is not None]
    parts = [
        f"## {device}, torch {release}\n",
        f"{len(ran)} of {len(order)} families, {len(lines)} runs, {len(wrong)} failures.\n",
    ]
    for x in sorted(wrong, key=lambda x: (order.index(x["family"]) if x["family"] in order else -1, x["ranks"])):
        parts.append(f"- {x['family']} on {x['ranks']} ranks in {x['dtype']}: {_escaped(str(x['error']))}")
    if wrong:
        parts.append("")
    if left := [name for name in order if name not in ran]:
        parts.append("\n".join(textwrap.wrap(f"Not run: {', '.join(left)}.", 150)) + "\n")
    heads = [f"{dtype}, {ranks} ranks" for dtype, ranks in columns]
    parts.append(f"| family | {' | '.join(heads)} |")
    parts.append(f"| --- |{' --- |' * len(columns)}")
    cells = {(str(x["family"]), str(x["dtype"]), int(x["ranks"])): _cell(x) for x in lines}
    for name in order:
        if name in ran:
            parts.append(f"| {name} | {' | '.join(cells.get((name, *c), 'not run') for c in columns)} |")
    parts.append("")
    return parts


def _cell(x: Line) -> str:
    if "exact" not in x:
        return "failed"
    noise = f" ({x['eager']:.0e})" if x["dtype"] != "float32" else ""
    text = f"{x['exact']:.1e}{noise}, {x['displaced']:.1e}"
    return text if x["error"] is None else f"**{text}**"


def _escaped(text: str) -> str:
    return "`" + text.replace("`", "'")[:300] + "`"
