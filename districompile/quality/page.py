# SPDX-License-Identifier: Apache-2.0
"""Write an HTML page of measured images: a table, the error by step, and the worst images side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.common.outputs import write_file
from districompile.quality.cases import Case
from districompile.quality.measure import Measured, Result

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; text-align: right }
th { border-bottom: 1px solid #999 } th:first-child, td:first-child { text-align: left }
figure { display: inline-block; margin: 0 .6em 1em 0; vertical-align: top } figcaption { font-size: 13px }
img { width: 256px; image-rendering: auto; border: 1px solid #ccc } .low { color: #b00; font-weight: 600 }
"""
_COLOURS = ("#1b6ca8", "#d1495b", "#3a8f5c", "#e08e0b", "#6a4c93", "#555555", "#00a5a8")


def write_page(path: Path, title: str, about: Sequence[str], measured: Measured, shown: int = 6) -> None:
    """Write the page to ``path``. ``about`` are lines of introduction; ``shown`` is the number of worst cases."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in about))
    parts.append(_table(measured.results))
    parts.append(_plot(measured.results))
    for number in worst_cases(measured, shown):
        parts.append(_row(measured, number))
    write_file(path, "\n".join(parts) + "\n")


def worst_cases(measured: Measured, count: int) -> list[int]:
    """Return the indices of the ``count`` cases with the lowest PSNR of any configuration, worst first."""
    lowest = [min((r.scores[i].finite, r.scores[i].psnr) for r in measured.results) for i in range(len(measured.cases))]
    return sorted(range(len(lowest)), key=lambda i: lowest[i])[:count]


def figures(result: Result) -> list[str]:
    """Return the cells of a result's row, in the order of :data:`COLUMNS`."""
    data = result.to_dict()

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    psnr = data["psnr_db"]
    return [
        cell(psnr["mean"], 1), cell(psnr["worst"], 1), cell(data["ssim"], 4), cell(data["lpips"], 4),
        cell(data["seam"], 3), cell(data["exact_steps"], 1),
    ]  # fmt: skip


COLUMNS = ("PSNR, mean (dB)", "worst", "SSIM", "LPIPS", "seams", "exact steps")


def _table(results: Sequence[Result]) -> str:
    head = "".join(f"<th>{c}</th>" for c in ("way", "ranks", *COLUMNS, "worst picture"))
    rows = []
    for r in results:
        cells = "".join(f"<td>{c}</td>" for c in (str(r.ranks), *figures(r)))
        rows.append(f"<tr><td>{html.escape(r.way)}</td>{cells}<td>{html.escape(str(r.worst.case))}</td></tr>")
    return (
        f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        "<p>Against one device, from the same prompts and seeds. Seams: the vertical gradient where patches meet, "
        "beside that of other rows, as a multiple of the same on one device; 1 is none.</p>"
    )


def _plot(results: Sequence[Result]) -> str:
    """Plot the relative error of the latents by step, averaged over all images, on a logarithmic scale."""
    lines = [(r.way, r.ranks, r.to_dict()["drift_by_step"]) for r in results]
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return ""
    width, height, low, high = 640, 220, -6.0, 0.5
    parts = []
    for k, (way, ranks, values) in enumerate(lines):
        logs = [min(high, max(low, float(torch.log10(torch.tensor(max(v, 1e-9)))))) for v in values]
        points = " ".join(
            f"{50 + i * (width - 60) / (len(logs) - 1):.1f},{10 + (high - v) / (high - low) * (height - 30):.1f}"
            for i, v in enumerate(logs)
        )
        colour = _COLOURS[k % len(_COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = html.escape(f"{way}, {ranks} ranks")
        parts.append(f'<text x="{width + 8}" y="{24 + 18 * k}" fill="{colour}" font-size="13">{label}</text>')
    for power in range(-6, 1):
        y = 10 + (high - power) / (high - low) * (height - 30)
        parts.append(f'<line x1="50" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="4" y="{y + 4:.1f}" font-size="12">1e{power}</text>')
    view = f'viewBox="0 0 {width + 200} {height}" width="{width + 200}"'
    return f"<h2>Relative error of the latents, step by step</h2><svg {view}>{''.join(parts)}</svg>"


def _row(measured: Measured, number: int) -> str:
    case: Case = measured.cases[number]
    cells = [_figure("one device", measured.expected.pixels[number])]
    for result, drawn in zip(measured.results, measured.drawn, strict=True):
        score = result.scores[number]
        text = f"{result.way}, {result.ranks} ranks: {score.psnr:.1f} dB" + ("" if score.finite else ", not finite")
        cells.append(_figure(text, drawn.pixels[number].nan_to_num(0.0), score.psnr < 35))
    return f"<h2>{html.escape(str(case))}</h2>" + "".join(cells)


def _figure(text: str, pixels: Tensor, low: bool = False) -> str:
    mark = ' class="low"' if low else ""
    source = base64.b64encode(png(pixels)).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}"><figcaption{mark}>{html.escape(text)}</figcaption></figure>'
    )


def png(pixels: Tensor) -> bytes:
    """Encode an image (3, H, W) with values in 0 to 1 as PNG."""
    from PIL import Image

    array: Any = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(array.squeeze()).save(out, format="PNG")
    return out.getvalue()
