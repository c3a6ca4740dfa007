# SPDX-License-Identifier: Apache-2.0
"""``districompile convert --add``: add shapes to a bundle, without its model's other shapes being converted again."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.bundle.bundle import Bundle
from districompile.bundle.own_vae import beside, copy_vae, own_vae, put_vae
from districompile.cli.backend_options import parse_options
from districompile.cli.commands.convert_vae import sizes_of
from districompile.cli.common import UsageError, chosen_dtype, console, print_json, quiet_libraries, source_of
from districompile.cli.convert import Settings
from districompile.cli.shapes import shapes_of, unexpected_options
from districompile.errors import Error
from districompile.frontend.call_tree import flatten_call
from districompile.models.autoencoder import autoencoder_of
from districompile.models.imports import add_current_folder
from districompile.models.inputs import Example
from districompile.models.origin import Origin
from districompile.models.sources import load_source
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes, shape_key
from districompile.progress import Progress, terminal_progress
from districompile.runtime.calls.shapes import wanted_shapes
from districompile.saving import add_programs
from districompile.shapes import convert_like

_REPEATED = ("passes", "rules", "skip")  # options with names to import, which a bundle's own word does not suffice for


def main(settings: Settings) -> int:
    """Convert the shapes that the bundle lacks, and print their names. Its VAE gets their sizes."""
    unexpected = unexpected_options(settings)
    if unexpected:
        raise UsageError(f"{', '.join(unexpected)}: not with --add, which has the options of the bundle")
    if not (settings.size or settings.input or settings.tokens or settings.height or settings.batch != "1"):
        raise UsageError("--add: say which shape, by --size, --batch, --tokens or --input")
    path = Path(settings.model).expanduser()
    bundle = Bundle.open(path)
    vae, reason = (None, None) if settings.vae is False else own_vae(bundle)
    if settings.vae and vae is None:
        raise UsageError(f"--vae: {reason or f'{path} has no VAE to add sizes to'}")
    quiet_libraries()
    progress = terminal_progress()
    started = time.perf_counter()
    added, plans = add_shapes(bundle, settings, progress)
    of_vae: dict[str, list[str]] = {}
    if vae is not None:
        of_vae = _add_to_vae(Bundle.open(path, verify=False), plans, settings, progress)
    elif reason is not None:
        print(f"note: no size is added to the VAE: {reason}", file=sys.stderr)
    seconds = round(time.perf_counter() - started, 2)
    if settings.as_json:
        shapes = list(Bundle.open(path, False).plans)
        print_json({"bundle": str(path), "added": added, "vae": of_vae, "shapes": shapes, "seconds": seconds})
        return 0
    text = f"added {', '.join(added)}" if added else "it has these shapes already"
    more = "".join(f"; to {path / place} {', '.join(names)}" for place, names in of_vae.items())
    console().print(f"{path}: {text}{more}, in {seconds} s", markup=False, highlight=False)
    return 0


def add_shapes(bundle: Bundle, settings: Settings, progress: Progress) -> tuple[list[str], list[ExecutionPlan]]:
    """Convert the shapes of ``settings`` that ``bundle`` lacks, into its folder.

    Return the names of the new shapes, and the plans of all shapes that were asked for.
    """
    path = bundle.path
    made: Mapping[str, Any] = bundle.manifest.get("made_with") or {}
    for name in _REPEATED:
        recorded = tuple(map(str, made.get(name) or ()))
        if recorded != getattr(settings, name):
            flags = " ".join(f"--{name} {value}" for value in recorded) or f"no --{name}"
            raise UsageError(f"{path} was converted with {flags}: give the same with --add")
    source = source_of(bundle.manifest, settings.original)
    backend = _backend(bundle, settings, made)
    plan = bundle.plan
    with progress.task(f"loading {source}"):
        loaded = load_source(source, chosen_dtype(plan))
    cfg = plan.options.guidance or loaded.cfg
    there = {shape_key(input_shapes(p)) for p in bundle.plans.values()}
    wanted = {_key(plan, e): e for e in (shape.example(loaded, cfg) for shape in shapes_of(settings))}
    new = [example for key, example in wanted.items() if key not in there]
    add_current_folder()
    programs = []
    with progress.task("converting shapes", len(new)) as task:
        for example in new:
            program = convert_like(
                bundle, loaded.module, example.args, example.kwargs, passes=settings.passes, rules=settings.rules,
                skip=settings.skip, extensions=settings.extension, strict=settings.strict, progress=progress,
            )  # fmt: skip
            programs.append(program)
            task.advance()
    added = add_programs(path, programs, backend, progress) if programs else []
    plans = Bundle.open(path, verify=False).plans.values()
    return added, [p for p in plans if shape_key(input_shapes(p)) in wanted]


def _add_to_vae(
    bundle: Bundle, plans: Sequence[ExecutionPlan], settings: Settings, progress: Progress
) -> dict[str, list[str]]:
    """Add the sizes of ``plans`` to the VAE in the folder of ``bundle``. Return the new shapes by place.

    Where nobody asked for that, a VAE to which they cannot be added is a note.
    """
    added: dict[str, list[str]] = {}
    try:
        model = autoencoder_of(source_of(bundle.manifest, settings.original))
        sizes = sizes_of(plans)
        with beside(bundle.path) as folder:
            for part in copy_vae(bundle, folder):
                opened = Bundle.open(part)
                made: Mapping[str, Any] = opened.manifest.get("made_with") or {}
                own = dataclasses.replace(
                    settings, size=sizes, width=None, height=None, tokens=None, input=(), passes=(), skip=(),
                    rules=tuple(map(str, made.get("rules") or ())),
                    original=model and str(dataclasses.replace(Origin.of(model), part=_part(opened))),
                )  # fmt: skip
                names, _ = add_shapes(opened, own, progress)
                added |= {part.relative_to(folder).as_posix(): names} if names else {}
            if added:
                put_vae(bundle.path, folder)
    except Error as e:
        if settings.vae:
            raise
        print(f"note: no size is added to the VAE: {e}", file=sys.stderr)
        return {}
    return added


def _part(bundle: Bundle) -> str | None:
    """Return the part of a VAE that a bundle is of, as its model's text names it."""
    return Origin.of(str(bundle.manifest.get("source"))).part


def _key(plan: ExecutionPlan, example: Example) -> tuple[object, ...]:
    """Return what tells the shape of an example from the others of the bundle with ``plan``."""
    return shape_key(wanted_shapes(plan, flatten_call(plan.signature, example.args, example.kwargs)))


def _backend(bundle: Bundle, settings: Settings, made: Mapping[str, Any]) -> Backend:
    """Return the backend of the bundle, with its options as given or as recorded."""
    name = str(bundle.manifest["backend"])
    given = settings.backend_option or tuple(map(str, made.get("backend_option") or ()))
    return get_backend(name, **parse_options(name, given)) if given else get_backend(name)
