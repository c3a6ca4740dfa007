# SPDX-License-Identifier: Apache-2.0
"""``districompile inspect``: show what a bundle holds, read from its plan and manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from districompile.bundle.bundle import Bundle
from districompile.bundle.own_vae import own_vae
from districompile.cli.common import UsageError, console, folder_bytes, load_extensions, print_json
from districompile.cli.inspect import Settings
from districompile.cli.shapes import at_shape
from districompile.errors import BundleError
from districompile.live.autoencoder import parts_at
from districompile.plan.report import Report, size
from districompile.plan.shapes import input_shapes, shapes_text
from districompile.plan.steps_text import WIDTH, phase_text, step_lines


def main(settings: Settings) -> int:
    """Print the report of a bundle, or the steps of one phase."""
    load_extensions(settings.extension)
    opened = Bundle.open(settings.bundle, verify="quick")
    bundle = at_shape(opened, settings.shape)
    terminal = console()
    if settings.graph is not None:
        if settings.graph not in bundle.plan.phases:
            raise UsageError(f"--graph {settings.graph}: the bundle has the phases {', '.join(bundle.plan.phases)}")
        if settings.as_json:
            print_json({"phase": settings.graph, "steps": step_lines(bundle.plan, settings.graph)})
        else:
            print(phase_text(bundle.plan, settings.graph, terminal.width if sys.stdout.isatty() else WIDTH))
        return 0
    report = Report(bundle.plan)
    vae = _vae(opened)
    summary = _summary(bundle.manifest)
    if settings.as_json:
        shapes = {name: {p: list(s) for p, s in input_shapes(plan).items()} for name, plan in opened.plans.items()}
        print_json({"bundle": str(settings.bundle), "manifest": summary, "shapes": shapes, "vae": vae,
                    "report": report.to_dict()})  # fmt: skip
        return 0
    facts = ", ".join(f"{k} {v}" for k, v in summary.items() if v is not None and not isinstance(v, dict | list))
    terminal.print(
        f"{settings.bundle}: {size(folder_bytes(settings.bundle))}; {facts}\n", markup=False, highlight=False
    )
    if vae is not None:
        terminal.print(f"VAE: {_vae_text(vae)}\n", markup=False, highlight=False)
    if len(opened.plans) > 1:
        for name, plan in opened.plans.items():
            terminal.print(f"shape {name}: {shapes_text(plan)}", markup=False, highlight=False)
        terminal.print(f"\n{next(iter(bundle.plans))}:", markup=False, highlight=False)
    terminal.print(report)
    return 0


def _vae(bundle: Bundle) -> dict[str, Any] | None:
    """Return what the folder of a bundle has of a VAE, or why that is not used; None where there is none."""
    folder, reason = own_vae(bundle)
    if folder is None:
        return None if reason is None else {"problem": reason}
    try:
        parts = {part: Bundle.open(path, verify="quick") for part, path in parts_at(folder).items()}
    except BundleError as e:
        return {"problem": str(e)}
    return {
        "folder": str(folder),
        "parts": {part: {"dtype": b.plan.options.dtype, "shapes": list(b.plans)} for part, b in parts.items()},
        "problem": None,
    }


def _vae_text(vae: Mapping[str, Any]) -> str:
    if vae["problem"] is not None:
        return f"not used, because {vae['problem']}"
    parts = "; ".join(f"{part} {p['dtype']} {', '.join(p['shapes'])}" for part, p in vae["parts"].items())
    return f"{vae['folder']}: {parts}"


def _summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without its long tables of hashes and engines."""
    return {k: v for k, v in manifest.items() if k not in ("files", "engines", "config")}
