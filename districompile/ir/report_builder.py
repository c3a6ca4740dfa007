# SPDX-License-Identifier: Apache-2.0
"""What passes find out about a model, for the report of its plan (:mod:`districompile.plan.plan_report`)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class Fallback:
    """An operator that is computed on gathered inputs: which, why, and the bytes that each rank receives for it."""

    node: str
    op: str
    reason: str
    bytes: Annotated[int, Field(ge=0)]
    source: str


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call: ``cut`` are divided among the ranks, ``whole`` are done on every rank."""

    cut: Amount
    whole: Amount


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Sequences beside the image's tokens, such as a text's: whether they are divided among the ranks, and why.

    ``sequences`` has the tokens of each by the value that is divided. ``flops`` is the work that the busiest rank
    saves in a call, ``bytes`` and ``transfers`` what it receives more, where they are divided.
    """

    divided: bool
    sequences: dict[str, Annotated[int, Field(ge=0)]]
    flops: float
    bytes: int
    transfers: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """A value that a reused step takes from the last full step: itself, or as its change since the value ``base``."""

    value: str
    base: str | None
    module_path: str


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What reused steps keep, and the share of a full step's FLOPs that they compute.

    ``kind`` is ``levels`` (of resolution) or ``blocks`` (of a stack, at either end), and ``level`` how many of them a
    reused step computes.
    """

    kind: str
    level: Annotated[int, Field(ge=1)]
    kept: tuple[Kept, ...]
    share: Amount


NOT_FASTER = "8 bits are not faster on the GPU that converted"
"""The reason of a layer that stays as it is, where its backend said so."""


@dataclasses.dataclass(frozen=True)
class QuantisedLayer:
    """A layer that has a form in 8 bits: the name of its weight, and the path of its module.

    ``reason``: why it stays as it is; None where it is computed in 8 bits. ``snr``: signal to noise of its result in
    dB, in 8 bits on the calls of the calibration; None where it was not measured. ``input_scale``: the scale of its
    input; None where each token has its own. ``transposed``: the weight of the module is the transposed one.
    """

    weight: str
    module: str
    reason: str | None
    snr: Annotated[float, Field(allow_inf_nan=False)] | None
    input_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    transposed: bool = False

    @property
    def values_name(self) -> str:
        """The name of the 8-bit weight in a bundle."""
        return f"{self.weight}:fp8"

    @property
    def scale_name(self) -> str:
        """The name of the weight's scales by output channel in a bundle."""
        return f"{self.weight}:scale"

    @property
    def input_scale_name(self) -> str:
        """The name of the input's scale in a bundle."""
        return f"{self.weight}:input_scale"


@dataclasses.dataclass
class ReportBuilder:
    """The report of a conversion under way, which passes fill in; see ``PlanReport`` for the fields.

    ``conditioning`` names the inputs that only the exact phase reads: it becomes an option of the plan.
    """

    flops: Flops | None = None
    tokens: Tokens | None = None
    fallbacks: list[Fallback] = dataclasses.field(default_factory=list)
    replicated: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    joined: dict[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)
    conditioning: tuple[str, ...] = ()
    reuse: Reuse | None = None
    differences: dict[str, str] = dataclasses.field(default_factory=dict)
    quantised: tuple[QuantisedLayer, ...] = ()
