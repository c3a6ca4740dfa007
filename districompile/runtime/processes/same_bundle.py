# SPDX-License-Identifier: Apache-2.0
"""Check that all ranks have loaded the same bundle, with the same software."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from districompile.bundle.bundle import ENGINES, WEIGHTS, Bundle, check_hashes
from districompile.bundle.plans import plan_files
from districompile.errors import LaunchError
from districompile.plan.plan_report import PlanReport
from districompile.runtime.processes.liveness import Liveness
from districompile.version import __version__

# The facts that are compared: their names in the error, and how to make them equal on all ranks.
_NAMES = {
    "plan": ("another plan", "load the same bundle on all ranks"),
    "weights": ("other weights", "load the same bundle on all ranks"),
    "engines": ("other engines", "load the same bundle on all ranks"),
    "shapes": ("other shapes", "pass the same shapes on all ranks"),
    "backend": ("another backend", "load the same bundle on all ranks"),
    "transport": ("another transport", "pass the same transport on all ranks"),
    "districompile": ("another version of districompile", "install the same version for all ranks"),
    "torch": ("another version of torch", "install the same version for all ranks"),
    "python": ("another version of Python", "use the same version for all ranks"),
}


def facts(bundle: Bundle, backend: str, transport: str, shapes: str = "") -> dict[str, str]:
    """Return the facts that must be equal on all ranks: hashes of the executed files, and versions of the software.

    The plans' hash is that of the plans that were read, without their reports of how long passes took. Hashes of the
    other files are the manifest's, which were checked when the bundle was opened."""
    files: Mapping[str, Any] = bundle.manifest["files"]
    engines = {name: entry["sha256"] for name, entry in files.items() if name.startswith(f"{ENGINES}/")}
    return {
        "plan": _digest("".join(dataclasses.replace(p, report=PlanReport()).to_json() for p in bundle.plans.values())),
        "weights": str(files[WEIGHTS]["sha256"]),
        "engines": _digest(json.dumps(sorted(engines.items()))),
        "shapes": shapes,
        "backend": backend,
        "transport": transport,
        "districompile": __version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def difference(ranks: Sequence[Mapping[str, str]]) -> str | None:
    """Return one line for the first rank that differs from rank 0, the same on all ranks; None if all are equal."""
    for rank, found in enumerate(ranks):
        for key, (name, way_out) in _NAMES.items():
            here, there = found.get(key, "none"), ranks[0].get(key, "none")
            if here != there:
                long = max(len(here), len(there)) >= 64
                values = f"{here[:12]}, not {there[:12]}" if long else f"{here}, not {there}"
                return f"rank {rank} has {name} than rank 0 ({values}): {way_out}"
    return None


def compare(
    liveness: Liveness, bundle: Bundle, backend: str, transport: str, verified: bool | None, shapes: str = ""
) -> None:
    """Compare the bundles of all ranks. Raises the same :class:`LaunchError` on all ranks if they differ.

    ``verified``: whether this rank has checked the bundle's hashes; None if no rank is to check them. A rank that has
    not checked them, and whose folder no other rank has checked, checks them now."""
    place = [socket.gethostname(), str(bundle.path.resolve())]
    own = {"facts": facts(bundle, backend, transport, shapes), "place": place, "verified": verified}
    every = liveness.exchange("bundle", own)
    problem = difference([e["facts"] for e in every])
    if problem is not None:
        raise LaunchError(problem)
    if verified is False and not any(e["verified"] and e["place"] == place for e in every):
        plans = plan_files(bundle.manifest["files"])
        check_hashes(bundle.path, {n: e["sha256"] for n, e in bundle.manifest["files"].items() if n not in plans})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
