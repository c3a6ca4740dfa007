# SPDX-License-Identifier: Apache-2.0
"""Check weights and engines against the plan when they are loaded, before any memory is allocated for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from districompile.backends.base import Backend, Engine
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError
from districompile.ir.spec import TensorSpec, dtype_name
from districompile.plan.plan import ExecutionPlan, SegmentInterface


def check_weights(plan: ExecutionPlan, weights: WeightFile) -> None:
    """Check that the file has every weight of the plan, in its shape and dtype. Raises :class:`BundleError`."""
    for name, spec in plan.weights.items():
        if name not in weights:
            raise BundleError(f"{weights.path} lacks the weight {name} of the plan: convert again")
        if weights.spec(name) != spec:
            raise BundleError(
                f"{weights.path} has the weight {name} as {_text(weights.spec(name))}, the plan as {_text(spec)}: "
                "convert again"
            )


def check_engine(path: Path, segment: SegmentInterface, specs: Mapping[str, TensorSpec], engine: Engine) -> None:
    """Check that the inputs and outputs of ``engine`` are those of ``segment`` on its rank, whose values are ``specs``.

    Raises :class:`BundleError`.
    """
    taken, given = engine.input_specs, engine.output_specs
    if taken is not None and taken.keys() != set(segment.inputs):
        odd = min(taken.keys() ^ set(segment.inputs))
        raise BundleError(f"{path} takes other inputs than the segment {segment.name} reads: {odd}: convert again")
    for name, spec in {**(taken or {}), **(given or {})}.items():
        if name not in specs or specs[name] != spec:
            raise BundleError(
                f"{path} has {name} as {_text(spec)}, the plan as {_text(specs.get(name))}: convert again"
            )


def check_content(path: Path, backend: Backend) -> None:
    """Check that the name of an engine is that of its content, if the backend can compute it.

    Raises :class:`BundleError`.
    """
    name = backend.content_name(path)
    if name is not None and path.name != f"{name}{backend.suffix}":
        raise BundleError(f"{path} holds another segment than its name says: copy the bundle again, or convert again")


def _text(spec: TensorSpec | None) -> str:
    return "nothing" if spec is None else f"{dtype_name(spec.dtype)} {list(spec.shape)}"
