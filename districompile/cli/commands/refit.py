# SPDX-License-Identifier: Apache-2.0
"""``districompile refit``: replace the weights of a bundle, by a fine-tune or a LoRA."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from districompile.bundle.bundle import Bundle
from districompile.bundle.refit import Lora, check_target, read_lora, refit
from districompile.cli.common import UsageError, chosen_dtype, console, load_extensions, print_json, quiet_libraries
from districompile.cli.refit import Settings
from districompile.models.sources import load_source
from districompile.progress import terminal_progress


def main(settings: Settings) -> int:
    """Write the bundle with other weights and print the number of changed ones."""
    load_extensions(settings.extension)
    if not settings.lora and settings.weights is None:
        raise UsageError("nothing to do: give --lora FILE, --weights FOLDER, or both")
    quiet_libraries()
    progress = terminal_progress()
    started = time.perf_counter()
    bundle = Bundle.open(settings.bundle, verify="quick")
    note = {"weights": settings.weights, "loras": [str(p) for p in settings.lora], "scale": settings.scale}
    check_target(bundle, settings.out, note, settings.force)
    config: dict[str, Any] = bundle.manifest.get("config") or {}
    loras: list[Lora] = []
    elsewhere = 0
    for path in settings.lora:
        found, other = read_lora(path, config, settings.scale)
        loras += found
        elsewhere += other
    earlier = [Path(f).name for r in bundle.manifest.get("refits", ()) for f in r.get("loras", ())]
    if loras and earlier and settings.weights is None:
        print(f"note: added on top of {', '.join(earlier)}; start from --weights to leave that out", file=sys.stderr)
    module = None
    if settings.weights is not None:
        with progress.task(f"loading {settings.weights}"):
            module = load_source(settings.weights, chosen_dtype(bundle.plan)).module
    changed = refit(
        settings.bundle, settings.out, module=module, loras=loras, note=note, progress=progress, force=settings.force
    )
    target = settings.out or settings.bundle
    seconds = round(time.perf_counter() - started, 2)
    if settings.as_json:
        print_json({"bundle": str(target), "changed": changed, "other_networks": elsewhere, "seconds": seconds})
        return 0
    console().print(
        f"{target}: {changed} of {len(bundle.weights)} weights are new, in {seconds} s; no engine was built",
        markup=False,
        highlight=False,
    )
    if elsewhere:
        print(f"note: {elsewhere} tensors are for text encoders, which are not part of a bundle", file=sys.stderr)
    return 0
