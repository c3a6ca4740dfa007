# SPDX-License-Identifier: Apache-2.0
"""Evidence that two calls of a denoiser belong to one image: their conditioning, and how the sample moved.

Timesteps alone are no evidence. A falling timestep may continue an image or start another one: after an interruption,
after an image of a single step, or in an evaluation that goes through noise levels in order. State of another image
gives a wrong result, so a call continues an image only if the evidence shows it (docs/decisions/0039).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

HISTORY = 4  # calls: multistep samplers build a sample from up to this many outputs
_Array = np.ndarray[Any, Any]
_SINGULAR = 1e-9  # of the largest eigenvalue: directions below it depend on others


class Change(enum.IntEnum):
    """How the conditioning of a call compares with that of an earlier one."""

    NONE = 0  # the same memory, not written to since, or equal values
    OTHER = 1  # other values
    FIRST = 2  # there is no earlier conditioning


@dataclasses.dataclass
class Seen:
    """A tensor of an earlier call, with a copy that does not change when the caller writes to it."""

    tensor: Tensor
    version: int | None
    copy: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        return Seen(tensor, _version(tensor), tensor.detach().clone())

    def is_still(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` has the values of the earlier call.

        Waits for the device only if it is other memory, or may have been written to. Another tensor object on the same
        memory is usual, because inputs are detached at every call. This object holds the memory, so it was not freed in
        between.
        """
        if self.version is not None and _version(tensor) == self.version and _memory(tensor) == _memory(self.tensor):
            return True
        if tensor.shape != self.copy.shape or not torch.equal(tensor.to(self.copy), self.copy):
            return False
        self.tensor, self.version = tensor, _version(tensor)
        return True


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return which memory a tensor reads, and how.

    It identifies the storage, not the address: a compiled encoder may return another result at the same address.
    """
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None for inference tensors, which have no such count."""
    return None if tensor.is_inference() else int(tensor._version)


class ConditioningHistory:
    """The inputs ``paths`` in earlier calls of a module. Each stream of calls has its own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._seen: dict[int, dict[str, Seen]] = {}

    def reset(self) -> None:
        """Forget earlier calls."""
        self._seen.clear()

    def compare(self, stream: int, given: Mapping[str, Tensor]) -> Change:
        """Compare with the last call of ``stream``, and store this one."""
        if not self.paths:
            return Change.NONE
        seen = self._seen.get(stream)
        if seen is not None and all(seen[p].is_still(given[p]) for p in self.paths):
            return Change.NONE
        self._seen[stream] = {p: Seen.of(given[p]) for p in self.paths}
        return Change.FIRST if seen is None else Change.OTHER


class TimestepSchedule:
    """Check whether timesteps are elements of one tensor in a regular order, as of a sampler that iterates over it."""

    def __init__(self) -> None:
        self._last: Tensor | None = None  # held, so that no other tensor gets its memory
        self._version: int | None = None
        self._stride: int | None = None

    def reset(self) -> None:
        """Forget the order but not the last timestep: the next one may be the second of an image."""
        self._stride = None

    def continues(self, value: Any) -> bool:
        """Return whether ``value`` is the element after the last call's, or the same one, and store it.

        In inference mode, timesteps that are written over those of an image are not detected.
        """
        last, version = self._last, self._version
        one = isinstance(value, Tensor) and all(s == 0 for s in value.stride())
        self._last, self._version = (value, _version(value)) if one else (None, None)
        if last is None or self._last is None:
            return False
        now = self._last
        if _memory(now)[0] != _memory(last)[0] or now.dtype != last.dtype or self._version != version:
            return False
        step = now.storage_offset() - last.storage_offset()
        if step == 0:
            return True
        known, self._stride = self._stride, step
        return known is None or known == step


@dataclasses.dataclass
class _Remembered:
    """A call: the channels of its sample and its output that belong to the image."""

    sample: Tensor
    output: Tensor | None

    @functools.cached_property
    def vectors(self) -> list[Tensor]:
        """The sample, and the outputs of all guidance parts of a picture, as (B, N) each.

        Guidance combines two or three outputs. They are in one batch, all of the first part before all of the second.
        """
        found = [_centred(self.sample)]
        if self.output is not None:
            y, batch = _centred(self.output), self.output.shape[0]
            parts = [n for n in (2, 3) if batch % n == 0]
            found += [y.roll(s, 0) for s in sorted({0, *(batch // n * k for n in parts for k in range(1, n))})]
        return found


class Trajectory:
    """The samples and outputs of the last calls, and the distance of a new sample from their linear combinations."""

    def __init__(self) -> None:
        self._calls: collections.deque[_Remembered] = collections.deque(maxlen=HISTORY)

    def reset(self) -> None:
        """Forget earlier calls."""
        self._calls.clear()

    def add(self, sample: Tensor, output: Tensor) -> None:
        """Store a call. Its tensors must not be written to later."""
        self._calls.append(_Remembered(*_image_channels(sample, output)))

    def departure(self, sample: Tensor) -> float:
        """Return the part of ``sample`` that is no linear combination of earlier samples and outputs.

        The part is relative to the norm of ``sample``, and the largest of the batch. Each channel's mean is left out,
        because images share it. The result is infinite if nothing can be computed. Waits for the device.

        The samplers in use take linear combinations (DDIM, Euler, Heun, multistep ones of up to four outputs), so that
        the departure is rounding alone. A stochastic sampler adds its own noise, so that it is between 0.1 and 0.8.
        For the noise of another image it is close to 1.
        """
        if not self._calls:
            return math.inf
        last = self._calls[-1].sample
        if sample.ndim > 1 and last.ndim == sample.ndim:
            sample = sample[:, : last.shape[1]]
        if sample.shape != last.shape or sample.ndim == 0 or sample.numel() == 0:
            return math.inf
        x, batch = _centred(sample), sample.shape[0]
        basis = torch.stack(
            [v for c in self._calls if c.sample.shape == sample.shape for v in c.vectors], 1
        )  # (B, m, N)
        table = torch.cat([basis @ basis.mT, basis @ x.unsqueeze(2)], 2)
        flat = torch.cat([table.flatten(), (x * x).sum(1)]).cpu().numpy()
        tables, squares = flat[:-batch].reshape(table.shape), flat[-batch:]
        return max(_unexplained(t[:, :-1], t[:, -1], float(s)) for t, s in zip(tables, squares, strict=True))


def _unexplained(gram: _Array, product: _Array, square: float) -> float:
    """Return the relative distance of a vector from the span of others, computed from the products of all."""
    if not (np.isfinite(gram).all() and np.isfinite(product).all() and math.isfinite(square)) or square <= 0:
        return math.inf
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))  # scales all to one length, so that no small vector is dropped
    values, vectors = np.linalg.eigh(gram / scale[:, None] / scale[None])
    parts = vectors.T @ (product / scale)
    kept = values > _SINGULAR * max(float(values[-1]), 1e-300)
    return math.sqrt(max(0.0, 1 - float((parts[kept] ** 2 / values[kept]).sum()) / square))


def _image_channels(sample: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the channels of a call that belong to the image on both sides.

    A mask beside the image, or a learned variance, is left out. The output is None if it is of another size.
    """
    if not (output.ndim == sample.ndim > 1 and output.shape[:1] == sample.shape[:1]):
        return sample, None
    if output.shape[2:] != sample.shape[2:]:
        return sample, None
    channels = min(sample.shape[1], output.shape[1])
    return sample[:, :channels], output[:, :channels]


def _centred(x: Tensor) -> Tensor:
    """Return ``x`` as (B, N) in float64, without the mean of each channel."""
    wide = (torch.view_as_real(x) if x.is_complex() else x).detach().double()
    channels = wide.shape[1] if wide.ndim > 2 else 1
    rows = wide.reshape(wide.shape[0], channels, -1)
    return (rows - rows.mean(2, keepdim=True)).flatten(1)
