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

from districompile.bundle import ENGINES, PLAN, WEIGHTS, Bundle, check_hashes
from districompile.errors import LaunchError
from districompile.runtime.liveness import Liveness

# What is compared, as it is named in the error, and how ranks come to have it alike
_NAMES = {
    "plan": ("another plan", "load the same bundle on all ranks"),
    "weights": ("other weights", "load the same bundle on all ranks"),
    "engines": ("other engines", "load the same bundle on all ranks"),
    "backend": ("another backend", "load the same bundle on all ranks"),
    "transport": ("another transport", "pass the same transport on all ranks"),
    "districompile": ("another version of districompile", "install the same version for all ranks"),
    "torch": ("another version of torch", "install the same version for all ranks"),
    "python": ("another version of Python", "use the same version for all ranks"),
}


def facts(bundle: Bundle, backend: str, transport: str) -> dict[str, str]:
    """What has to be equal on all ranks: hashes of what is executed, and versions of what executes it.

    The plan's hash is of the plan that was read, without its report of how long passes took. Those of the other files
    are the manifest's, which were checked when the bundle was opened.
    """
    from districompile import __version__

    files: Mapping[str, Any] = bundle.manifest["files"]
    engines = {name: entry["sha256"] for name, entry in files.items() if name.startswith(f"{ENGINES}/")}
    return {
        "plan": _digest(dataclasses.replace(bundle.plan, report={}).to_json()),
        "weights": str(files[WEIGHTS]["sha256"]),
        "engines": _digest(json.dumps(sorted(engines.items()))),
        "backend": backend,
        "transport": transport,
        "districompile": __version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def difference(ranks: Sequence[Mapping[str, str]]) -> str | None:
    """One line for the first rank that differs from rank 0, the same whoever asks; None where all are equal."""
    for rank, found in enumerate(ranks):
        for key, (name, way_out) in _NAMES.items():
            here, there = found.get(key, "none"), ranks[0].get(key, "none")
            if here != there:
                long = max(len(here), len(there)) >= 64
                values = f"{here[:12]}, not {there[:12]}" if long else f"{here}, not {there}"
                return f"rank {rank} has {name} than rank 0 ({values}): {way_out}"
    return None


def compare(liveness: Liveness, bundle: Bundle, backend: str, transport: str, verified: bool | None) -> None:
    """Raise the same :class:`LaunchError` on all ranks where they differ.

    ``verified``: whether this rank has checked the bundle's hashes; None where nobody is to. A rank that has not, and
    whose folder no other rank has checked, does it now.
    """
    place = [socket.gethostname(), str(bundle.path.resolve())]
    own = {"facts": facts(bundle, backend, transport), "place": place, "verified": verified}
    every = liveness.exchange("bundle", own)
    problem = difference([e["facts"] for e in every])
    if problem is not None:
        raise LaunchError(problem)
    if verified is False and not any(e["verified"] and e["place"] == place for e in every):
        check_hashes(bundle.path, {n: e["sha256"] for n, e in bundle.manifest["files"].items() if n != PLAN})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
