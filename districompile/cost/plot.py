# SPDX-License-Identifier: Apache-2.0
"""Plot predictions: seconds of an image by number of GPUs."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path

from districompile.common.outputs import write_file
from districompile.cost.planner import Division
from districompile.errors import Error

KINDS = (".png", ".svg", ".pdf")


class PlotError(Error):
    """A plot that cannot be drawn: another kind of file, or matplotlib is not there."""


def check_plot(path: Path) -> None:
    """Raise :class:`PlotError` where ``path`` is no kind of picture that can be drawn here."""
    if path.suffix.lower() not in KINDS:
        raise PlotError(f"--plot {path}: the name must end with {', '.join(KINDS)}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as e:
        raise PlotError('--plot needs matplotlib: pip install "districompile[plots]"') from e


def draw_plot(found: Sequence[Division], path: Path, title: str) -> None:
    """Write the picture: a line for each kind of guidance, and one GPU's time divided by the number of GPUs."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(figsize=(6.4, 4.0))
    alone = found[0]
    counts = sorted({d.gpus for d in found})
    axes.plot(counts, [alone.seconds / n for n in counts], "--", color="0.6", label="one GPU, divided")
    for kind in dict.fromkeys(d.guidance for d in found[1:]):
        line = [alone, *(d for d in found[1:] if d.guidance == kind)]
        (drawn,) = axes.plot([d.gpus for d in line], [d.seconds for d in line], "o-", label=f"guidance {kind}")
        axes.plot([d.gpus for d in line], [d.exact_seconds for d in line], ":", color=drawn.get_color())
    axes.set(xlabel="GPUs", ylabel="seconds an image (dotted: all steps exact)", title=title, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower(), bbox_inches="tight")
    write_file(path, data.getvalue())
