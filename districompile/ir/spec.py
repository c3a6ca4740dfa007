# SPDX-License-Identifier: Apache-2.0
"""Specs of tensors and of a module's inputs as plain data, and the phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import PlainValidator

from districompile.errors import BundleError

Phase = Literal["exact", "displaced", "reused"]


PHASE_CHOICES = ("auto", "both", "exact")
BOTH_PHASES = "convert again with --phases both, in Python with phases='both'"  # part of error messages
PHASES: tuple[Phase, ...] = ("exact", "displaced", "reused")


_DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


_TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t", "time", "sigma", "sigmas", "noise_labels", "noise_level",
              "noise_levels", "c_noise", "log_snr")  # fmt: skip


def names_timestep(path: str, chosen: str | None = None) -> bool:
    """Return whether an input is the time of a step: the ``chosen`` one, or one with a name that samplers use."""
    return path in _TIMESTEPS if chosen is None else path == chosen


def usual_timestep(paths: Iterable[str]) -> str | None:
    """Return the input that is the time of a step by its name: of several, the one with the most usual name."""
    return min(filter(names_timestep, paths), key=_TIMESTEPS.index, default=None)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name: ``"float16"`` -> ``torch.float16``. Raise :class:`BundleError` for an unknown one."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise BundleError(f"unknown dtype {name!r} in the plan") from None


def _read_dtype(x: object) -> torch.dtype:
    if isinstance(x, torch.dtype):
        return x
    name = x.get("@dtype") if isinstance(x, dict) else None
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{name!r} is no dtype")
    return _DTYPES[name]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Annotated[torch.dtype, PlainValidator(_read_dtype)]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for s in self.shape:
            n *= s
        return n


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One tensor of the module's signature. Every rank takes the global tensor.

    ``path`` is the place in the call ("sample", "added_cond_kwargs.time_ids", "residuals.0"). ``value`` is the name of
    its placeholder. ``rows`` is the sharded dim, if any.
    """

    path: str
    value: str
    spec: TensorSpec
    rows: int | None = None
