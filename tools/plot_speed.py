# SPDX-License-Identifier: Apache-2.0
"""Plot the figures of ``bench_gpu.py``: the time of a step by the number of GPUs, and ideal scaling.

    python tools/plot_speed.py docs/measurements/four-h100.jsonl --out docs/images/speed.svg

One panel a latent, one call without guidance. Dashed: the quickest of one GPU, divided by the number of GPUs.
Needs matplotlib (``pip install "districompile[plots]"``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Points = dict[int, float]  # number of GPUs: ms a step

# name in the legend: part of bench_gpu.py, what its figure ends with, style of the line
LINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one GPU, torch.compile": ("single", "", {"color": "0.25", "marker": "s", "linestyle": ""}),
    "distrifuser, exact": ("distrifuser", "exact step", {"color": "tab:orange", "marker": "o", "linestyle": ":"}),
    "distrifuser, displaced": ("distrifuser", "displaced step", {"color": "tab:orange", "marker": "o"}),
    "districompile, exact": ("ours", "exact step", {"color": "tab:blue", "marker": "o", "linestyle": ":"}),
    "districompile, displaced": ("ours", "displaced step", {"color": "tab:blue", "marker": "o"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines of bench_gpu.py")
    parser.add_argument("--out", type=Path, required=True, help="a picture: .svg, .png or .pdf")
    args = parser.parse_args()
    try:
        found = [json.loads(line) for line in args.file.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as e:
        raise SystemExit(f"{args.file} cannot be read: {e}") from e
    panels = read(found)
    if not panels:
        raise SystemExit(f"{args.file} has no step without guidance")
    draw(panels, args.out)


def read(found: list[dict[str, Any]]) -> dict[str, dict[str, Points]]:
    """Return the least time by number of GPUs, for each latent and each of LINES."""
    panels: dict[str, dict[str, Points]] = {}
    for line in found:
        job = line["job"]
        if job.get("guidance", "none") != "none" or "ms" not in line:
            continue
        for name, (part, end, _) in LINES.items():
            if job["part"] == part and line["figure"].endswith(end):
                points = panels.setdefault(job["latent"], {}).setdefault(name, {})
                points[job["ranks"]] = min(line["ms"], points.get(job["ranks"], float("inf")))
    return panels


def draw(panels: dict[str, dict[str, Points]], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "districompile"  # the same file for the same figures
    from matplotlib import pyplot

    latents = sorted(panels, key=lambda latent: int(latent.partition("x")[0]))
    figure, axes = pyplot.subplots(1, len(latents), figsize=(4 * len(latents), 3.6), squeeze=False)
    for axis, latent in zip(axes[0], latents, strict=True):
        panel = panels[latent]
        for name, (_, _, style) in LINES.items():
            if points := panel.get(name):
                axis.plot(sorted(points), [points[n] for n in sorted(points)], label=name, **style)
                for n in points if "exact" not in name else ():
                    axis.annotate(f"{points[n]:.3g}", (n, points[n]), (5, 4), textcoords="offset points", fontsize=8)
        counts = sorted({n for points in panel.values() for n in points})
        if one := panel.get("one GPU, torch.compile", {}).get(1):
            axis.plot(counts, [one / n for n in counts], color="0.6", linestyle="--", label="one GPU / GPUs")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.set_yticks(ticks := _ticks(axis.get_ylim()), [f"{t:g}" for t in ticks])
        axis.margins(x=0.12)
        axis.set_title(f"latent {latent}")
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, format=out.suffix[1:] or "png", metadata={"Date": None} if out.suffix == ".svg" else None)
    temporary.rename(out)


def _ticks(limits: tuple[float, float]) -> list[float]:
    """1, 2, 3, 5, 7, 10, ... within the limits."""
    return [t for e in range(-2, 6) for d in (1, 2, 3, 5, 7) if limits[0] <= (t := d * 10.0**e) <= limits[1]]


if __name__ == "__main__":
    main()
