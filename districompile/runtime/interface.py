"""Check that weights and engines are what the plan says, when they are loaded: before any memory is taken for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from districompile.backends.base import Backend, Engine
from districompile.errors import BundleError
from districompile.ir.plan import Plan, SegmentPlan, TensorSpec, dtype_name
from districompile.weights import WeightFile


def check_weights(plan: Plan, weights: WeightFile) -> None:
    """Raise :class:`BundleError` for a weight of the plan that the file lacks or has in another shape or dtype."""
    for name, spec in plan.weights.items():
        if name not in weights:
            raise BundleError(f"{weights.path} lacks the weight {name} of the plan: convert again")
        if weights.spec(name) != spec:
            raise BundleError(
                f"{weights.path} has the weight {name} as {_text(weights.spec(name))}, the plan as {_text(spec)}: "
                "convert again"
            )


def check_engine(path: Path, segment: SegmentPlan, specs: Mapping[str, TensorSpec], engine: Engine) -> None:
    """Raise :class:`BundleError` unless ``engine`` takes and gives what ``segment`` reads and makes on its rank, whose
    values are ``specs``."""
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
    """Raise :class:`BundleError` for an engine whose name is not that of its content, where the backend knows it."""
    content_name = getattr(backend, "content_name", None)
    if content_name is not None and path.name != f"{content_name(path)}{backend.suffix}":
        raise BundleError(f"{path} holds another segment than its name says: copy the bundle again, or convert again")


def _text(spec: TensorSpec | None) -> str:
    return "nothing" if spec is None else f"{dtype_name(spec.dtype)} {list(spec.shape)}"
