# SPDX-License-Identifier: Apache-2.0
"""The options of a plan, with the types and ranges that a bundle must keep to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from districompile.errors import BundleError
from districompile.ir.report_builder import Amount
from districompile.ir.spec import InputSpec

Names = tuple[str, ...]
Count = Annotated[int, Field(ge=1, le=1 << 40)]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options that a plan was made with, as the runtime and the commands read them.

    ``cfg_inputs`` are the paths of the inputs with both guidance halves; None: those with the batch of the image.
    ``conditioning`` are the inputs that only the exact phase reads. ``guidance``, ``images``, ``dtype``, ``height`` and
    ``width`` are what the pipeline around the module must know. ``reuse``: of so many steps behind the exact ones, all
    but one are reused. ``transfer_bits``: of what displaced steps send; None: as it is. The others are options of
    ``convert``.
    """

    ranks: Count | None = None
    cfg: Annotated[str, Field(pattern="^(none|split)$")] = "none"
    groupnorm: Annotated[str, Field(pattern="^(forecast|corrected_async|sync|stale|local)$")] = "forecast"
    displace: Names = ()
    warmup_steps: Count = 4
    segments: Count = 4
    strict: bool = False
    optimise: Names = ()
    drift_limit: Amount = 0.0
    quantise: Annotated[str, Field(pattern="^(none|fp8(:[1-9][0-9]?)?)$")] = "none"
    cfg_inputs: Names | None = None
    conditioning: Names = ()
    collectives: Annotated[str, Field(pattern="^(between|inside)$")] = "between"
    timestep: str | None = None
    guidance: Annotated[str, Field(pattern="^(none|batch|split)$")] | None = None
    images: Count = 1
    dtype: Annotated[str, Field(pattern="^(float32|float16|bfloat16|float64)$")] | None = None
    height: Count | None = None
    width: Count | None = None
    example_timestep: float | int | None = None
    reuse: Annotated[int, Field(ge=2, le=1 << 20)] | None = None
    reuse_level: Count | None = None
    transfer_bits: Literal[8] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the options that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def check_options(options: PlanOptions, ranks: int, inputs: Sequence[InputSpec]) -> None:
    """Raise :class:`BundleError` for an option of another type or range, or one that the plan contradicts."""
    try:
        TypeAdapter(PlanOptions).validate_json(json.dumps(dataclasses.asdict(options)), strict=True)
    except ValidationError as e:
        raise refusal(e, "options") from None
    if options.ranks not in (None, ranks):
        raise BundleError(f"the plan is for {ranks} ranks, and its options for {options.ranks}")
    paths = {i.path for i in inputs}
    for name in (*(options.cfg_inputs or ()), *options.conditioning):
        if name not in paths:
            raise BundleError(f"the plan's options name the input {name!r}, which it does not have")
    if options.cfg_inputs is not None:
        halved = [i.path for i in inputs if i.rows is not None and i.path in options.cfg_inputs]
        if (options.cfg == "split") != bool(halved):
            raise BundleError(f"the plan is for cfg {options.cfg}, and halves {', '.join(halved) or 'no image'}")


def refusal(error: ValidationError, what: str) -> BundleError:
    """Return the error for the first field of a plan's options or report that does not fit."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in (what, *first["loc"]))
    return BundleError(f"the plan's {where}: {first['msg']}")
