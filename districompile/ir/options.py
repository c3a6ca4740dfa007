"""The options and the report of a plan as a bundle holds them: what of them is read, its type and its range.

Keys that are not listed here are nobody's: they change nothing, and are not checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from districompile.errors import BundleError
from districompile.ir.plan import Plan

GroupNorm = Literal["forecast", "corrected_async", "sync", "stale", "local"]
Names = tuple[str, ...]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Options(_Strict):
    ranks: Count | None = None
    cfg: Literal["none", "split"] = "none"
    groupnorm: GroupNorm = "forecast"
    displace: Names = ()
    warmup_steps: Count = 4
    segments: Count = 4
    strict: bool = False
    optimise: Names = ()
    drift_limit: Amount = 0.0
    cfg_inputs: Names | None = None
    conditioning: Names = ()
    collectives: Literal["between", "inside"] = "between"
    timestep: str | None = None
    guidance: Literal["none", "batch", "split"] | None = None
    images: Count = 1
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    height: Count | None = None
    width: Count | None = None
    example_timestep: float | int | None = None


class _Flops(_Strict):
    cut: Amount
    whole: Amount


class _PassRecord(_Strict):
    name: str
    exact: bool


class _Fallback(_Strict):
    node: str | None = None
    op: str | None = None
    reason: str | None = None
    source: str | None = None
    bytes: Amount | None = None


class _Trial(_Strict):
    candidate: str
    worst_db: float
    mean_db: float
    worst: str
    exact_steps: float | None
    drift: float | None
    good: bool


class _Quality(_Strict):
    floor_db: float | str
    steps: int
    trials: tuple[_Trial, ...]


class _Report(_Strict):
    flops: _Flops | None = None
    passes: tuple[_PassRecord, ...] = ()
    fallbacks: tuple[_Fallback, ...] = ()
    notes: Names = ()
    quality: _Quality | None = None
    joined: dict[str, tuple[tuple[str, Count], ...]] = {}


def check_options(plan: Plan) -> None:
    """Raise :class:`BundleError` for an option of another type or range, or one that the plan contradicts."""
    options = _checked(_Options, plan.options, "options")
    if options.ranks not in (None, plan.ranks):
        raise BundleError(f"the plan is for {plan.ranks} ranks, and its options for {options.ranks}")
    paths = {i.path for i in plan.inputs}
    for name in (*(options.cfg_inputs or ()), *options.conditioning):
        if name not in paths:
            raise BundleError(f"the plan's options name the input {name!r}, which it does not have")
    if options.cfg_inputs is not None:
        halved = [i.path for i in plan.inputs if i.rows is not None and i.path in options.cfg_inputs]
        if (options.cfg == "split") != bool(halved):
            raise BundleError(f"the plan is for cfg {options.cfg}, and halves {', '.join(halved) or 'no image'}")


def check_report(plan: Plan) -> None:
    """Raise :class:`BundleError` for a figure of the report that could not be shown, or used for new weights."""
    joined = _checked(_Report, plan.report, "report").joined
    for name, parts in joined.items():
        spec = plan.weights.get(name)
        if spec is not None and spec.shape[:1] != (sum(rows for _, rows in parts),):
            raise BundleError(f"the plan's report joins {name} of other rows than it has")


def _checked(model: type[Any], value: Any, what: str) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in (what, *first["loc"]))
        raise BundleError(f"the plan's {where}: {first['msg']}") from None
