# SPDX-License-Identifier: Apache-2.0
"""The plans of a bundle, one for each shape: ``plan.json``, and those of further shapes in ``plans/``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from districompile.bundle.manifest import AGAIN, PLAN, PLANS
from districompile.errors import BundleError
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import check_alike, shape_name
from districompile.plan.validate import validate


def plan_file(name: str) -> str:
    """Return the file of a further shape's plan."""
    return f"{PLANS}/{name}.json"


def plan_files(files: Collection[str]) -> list[str]:
    """Return the files of plans among a bundle's files: that of the first shape, then the others by name."""
    return [PLAN, *sorted(n for n in files if n.startswith(f"{PLANS}/") and n.endswith(".json"))]


def read_plans(folder: Path, files: Collection[str]) -> dict[str, ExecutionPlan]:
    """Return the checked plans of a bundle by the names of their shapes.

    Raises :class:`BundleError` for a plan that cannot be read, and for plans that do not belong together.
    """
    found = {name: _read(folder, name) for name in plan_files(files)}
    others = {name.removeprefix(f"{PLANS}/").removesuffix(".json"): p for name, p in found.items() if name != PLAN}
    plans = {shape_name(found[PLAN], others): found[PLAN], **others}
    try:
        check_alike(plans)
    except BundleError as e:
        raise BundleError(f"{folder}: {e}{AGAIN}") from e
    return plans


def _read(folder: Path, name: str) -> ExecutionPlan:
    try:
        plan = ExecutionPlan.from_json((folder / name).read_text(encoding="utf-8"))
        validate(plan)
    except OSError as e:
        raise BundleError(f"{folder / name} cannot be read: {e.strerror}{AGAIN}") from e
    except UnicodeDecodeError as e:
        raise BundleError(f"{folder / name} cannot be read: {e}{AGAIN}") from e
    except BundleError as e:
        where = folder if name == PLAN else folder / name
        raise BundleError(f"{where}: {e}{AGAIN}") from e
    return plan
