# SPDX-License-Identifier: Apache-2.0
"""The shapes that a bundle is made for: one plan each, which differ in the sizes of their inputs alone.

A shape has a name for people and files. It is the picture's size, with what else may differ: ``832x1216-b2-t154`` is
832 pixels wide, 1216 high, a batch of two pictures, 154 text tokens. Without a picture's size it is the sizes of the
inputs: ``1x4x48x32-1x77x16``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from districompile.errors import BundleError, InputError
from districompile.plan.plan import ExecutionPlan

_LONGEST = 80  # characters of a name: it is part of a file's name
Shapes = Mapping[str, tuple[int, ...]]


def input_shapes(plan: ExecutionPlan) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor input by path, as callers pass it."""
    return {i.path: plan.called_spec(i).shape for i in plan.inputs}


def shape_key(shapes: Shapes) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return what tells the shapes of one bundle apart: those of inputs with more than one dim, by path.

    A timestep or a label may be one number, or one for each element of the batch.
    """
    return tuple(sorted((path, tuple(shape)) for path, shape in shapes.items() if len(shape) > 1))


def shape_name(plan: ExecutionPlan, taken: Collection[str] = ()) -> str:
    """Return the name of a plan's shape, other than those that are ``taken``."""
    options, specs = plan.options, {i.path: plan.called_spec(i) for i in plan.inputs}
    rows = {i.path for i in plan.inputs if i.rows is not None}
    if options.height and options.width:
        tokens = dict.fromkeys(
            s.shape[1] for p, s in specs.items() if p not in rows and len(s.shape) == 3 and s.dtype.is_floating_point
        )
        name = "-".join([f"{options.width}x{options.height}", f"b{options.images}", *(f"t{t}" for t in tokens)])
    else:
        order = [*(p for p in specs if p in rows), *(p for p in specs if p not in rows)]
        name = "-".join("x".join(map(str, specs[p].shape)) for p in order if len(specs[p].shape) > 1)
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def shapes_text(plan: ExecutionPlan) -> str:
    """Return the shapes of the inputs as text: ``sample 2x4x64x64, encoder_hidden_states 2x77x768``."""
    return ", ".join(f"{p} {'x'.join(map(str, s))}" for p, s in input_shapes(plan).items() if len(s) > 1)


def find_shape(plans: Mapping[str, ExecutionPlan], wanted: str) -> str:
    """Return the name of the shape that ``wanted`` names: its whole name, or a beginning that only one shape has.

    Raises :class:`InputError`, which lists the names.
    """
    if wanted in plans:
        return wanted
    found = [name for name in plans if name.startswith(f"{wanted}-")]
    if len(found) == 1:
        return found[0]
    several = f"{len(found)} shapes begin with" if found else "there is no shape"
    raise InputError(f"{several} {wanted!r}: the shapes are {', '.join(found or plans)}")


def check_alike(plans: Mapping[str, ExecutionPlan]) -> None:
    """Check that plans are shapes of one model and one conversion. Raises :class:`BundleError`.

    They have the same inputs and options, and every weight in one shape. No two are for the same shapes of inputs.
    """
    (first_name, first), *others = plans.items()
    weights = dict(first.weights)
    joined = dict(first.report.joined)
    met = {shape_key(input_shapes(first)): first_name}
    for name, plan in others:
        for what, here, there in zip(_FACTS, _facts(plan), _facts(first), strict=True):
            if here != there:
                raise BundleError(f"the shapes {first_name} and {name} differ in {what}: a bundle holds one conversion")
        for weight, spec in plan.weights.items():
            if weights.setdefault(weight, spec) != spec:
                raise BundleError(f"the shapes {first_name} and {name} have the weight {weight} in different shapes")
        for weight, parts in plan.report.joined.items():
            if tuple(map(tuple, joined.setdefault(weight, parts))) != tuple(map(tuple, parts)):
                raise BundleError(f"the shapes {first_name} and {name} make the weight {weight} of different ones")
        key = shape_key(input_shapes(plan))
        if key in met:
            raise BundleError(f"the shapes {met[key]} and {name} are the same: {shapes_text(plan)}")
        met[key] = name


_FACTS = ("the number of processes", "guidance", "their inputs", "the arguments of forward", "their output",
          "the place of collectives", "the steps that are exact", "the drift limit",
          "the steps that are reused", "the bits of their layers")  # fmt: skip


def _facts(plan: ExecutionPlan) -> tuple[object, ...]:
    inputs = sorted((i.path, i.rows is not None, str(i.spec.dtype), len(i.spec.shape)) for i in plan.inputs)
    options = plan.options
    return (plan.ranks, options.cfg, inputs, plan.signature, plan.output, options.collectives, options.warmup_steps,
            options.drift_limit, options.reuse, options.quantise.partition(":")[0])  # fmt: skip
