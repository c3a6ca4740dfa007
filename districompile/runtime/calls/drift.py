# SPDX-License-Identifier: Apache-2.0
"""Measure how fast an image still changes, and choose exact calls until it has settled.

A displaced call reads the activations of the last step. While a model decides what an image will show, such an error
can lead to another image. After the decision the error stays small. So calls are exact until the image has settled,
and become exact again where it starts to change (docs/decisions/0038).

The measure compares two directions with those of the call before:

- The direction of the *sample*. The sampler turns it by a small angle, which depends on the length of the step.
- The direction of the *estimate*: the output minus its projection on the sample. Models predict noise, velocity or the
  clean image. All these are sums of multiples of the clean image and the sample, so the estimate is one line for all.

Once the image is decided, the estimate turns with the sample. The *rate* of a call is the additional turn of the
estimate, as a multiple of the sample's turn. It depends neither on what the model predicts nor on the step's length.

The *block rate* is the same for the block of the image that turns most. It shows one object that still changes while
the rest of the image has settled.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from districompile.runtime.calls.call_tracker import Decision

RULE = 2  # the version of the rule of Settling: measurements with different rules are kept apart
LAG = 2  # calls: the host reads the rate of the call before the last one, so that the device always has work
_SETTLED_CALLS = 2  # consecutive rates within the limit before the first displaced call
_UNSETTLED = 2.0  # times the limit: the rate at which a settled image counts as changing again
_LATE = 1.5  # times the limit: from this rate on, a block that changes more than before changes late
_RISE = 1.2  # times the lowest block rate so far: a larger factor is a change, a smaller one is noise
_GRID = 4  # blocks a dimension of the image
_TINY = 1e-30
_JUMP = 0.5  # of a squared angle: 41 degrees, far more than a step of a sampler; it may be another image
_ROUNDING = 1e-6  # of a squared angle: float32 rounding; the tensors' half precision is exact in float32


class Rate(NamedTuple):
    """The rate of a call for the whole image, and for the block that turns most."""

    image: float
    block: float


def vectors(sample: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten a sample (B, C, ...) and its output to vectors (B, K, N) of the channels that both have.

    K is the number of blocks of the image, 4 by 4 where its sizes divide by 4. Channels of one side alone (a mask, a
    learned variance) are left out. Where the sizes of the image differ, the vectors have one block each, and different
    lengths. Where the batch sizes differ, each tensor becomes one vector.
    """
    x, out = (torch.view_as_real(t) if t.is_complex() else t for t in (sample.detach(), output.detach()))
    if x.ndim == out.ndim > 2 and x.shape[0] == out.shape[0] and x.shape[2:] == out.shape[2:]:
        channels = min(x.shape[1], out.shape[1])
        return _blocks(x[:, :channels]), _blocks(out[:, :channels])
    batch = x.shape[0] if x.ndim and x.shape[:1] == out.shape[:1] else 1
    return x.reshape(batch, 1, -1), out.reshape(batch, 1, -1)


def _blocks(x: Tensor) -> Tensor:
    """Split the first two dims of images (B, C, H, W, ...) into blocks: (B, K, N)."""
    if x.ndim < 4:
        return x.flatten(1).unsqueeze(1)
    height, width = x.shape[2:4]
    rows, columns = (max(k for k in range(1, _GRID + 1) if size % k == 0) for size in (height, width))
    parts = x.reshape(*x.shape[:2], rows, height // rows, columns, width // columns, *x.shape[4:])
    return parts.movedim((2, 4), (1, 2)).flatten(1, 2).flatten(2)


def products(now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the inner products that :func:`rate_of` needs of two calls, by block: (B, K, 2, 4) in float32.

    Rows: this call's sample and output. Columns: this call's sample and output, and those of the call before. Products
    of vectors of different lengths are zero, and the image is one block then. Matrix products are avoided, because they
    may round to half precision.
    """
    rows = [t.float() for t in (*now, *before)]
    if len({r.shape for r in rows}) == 1:
        every = torch.stack(rows, 2)
        return (every[:, :, :2, None] * every[:, :, None]).sum(-1)
    rows = [r.flatten(1) for r in rows]
    zero = rows[0].new_zeros(rows[0].shape[0])
    table = [[(a * b).sum(1) if a.shape == b.shape else zero for b in rows] for a in rows[:2]]
    return torch.stack([torch.stack(line, 1) for line in table], 1).unsqueeze(1)


def rate_of(table: Tensor, last: Tensor) -> Rate:
    """Compute the rates of a call: the additional turn of the estimate, as a multiple of the sample's turn.

    ``table`` and ``last`` are the :func:`products` of this call and of the one before, on the host. The result is the
    largest of the batch. It is infinite where the sample stayed and the estimate did not, or where the sample jumped:
    neither is a step of a sampler. It is NaN where a product is not finite.

    A block's turn is its part of the squared distance of the two directions, times the number of blocks. So the mean of
    all blocks is the turn of the image.
    """
    rates = [_rate(p, q) for p, q in zip(table.double(), last.double(), strict=True)]
    image, block = zip(*rates, strict=True)
    return Rate(*(math.nan if any(map(math.isnan, values)) else max(values) for values in (image, block)))


def _rate(now: Tensor, last: Tensor) -> Rate:
    """Compute the rates of one image from its products (K, 2, 4) of two calls, in float64."""
    (xx, xo, xx1, xo1), (_, oo, ox1, oo1) = now.sum(0).tolist()
    (yy, yo, _, _), (_, pp, _, _) = last.sum(0).tolist()  # y and p: the sample and the output before
    a, b = xo / max(xx, _TINY), yo / max(yy, _TINY)  # the coefficients of the projections on the samples
    length = max(math.sqrt(max(oo - a * xo, 0.0) * max(pp - b * yo, 0.0)), _TINY)
    estimate = (oo1 - a * xo1 - b * ox1 + a * b * xx1) / length
    sample = xx1 / max(math.sqrt(xx * yy), _TINY)
    turned, moved = (2 * max(0.0, 1 - c) if math.isfinite(c) else math.nan for c in (estimate, sample))  # squared
    if math.isnan(turned) or math.isnan(moved):
        return Rate(math.nan, math.nan)
    image = _ratio(max(0.0, turned - moved), moved)
    if len(now) == 1 or now.shape != last.shape:
        return Rate(image, image)
    own = now[:, 1, 1] - 2 * a * now[:, 0, 1] + a * a * now[:, 0, 0]
    before = last[:, 1, 1] - 2 * b * last[:, 0, 1] + b * b * last[:, 0, 0]
    both = now[:, 1, 3] - a * now[:, 0, 3] - b * now[:, 1, 2] + a * b * now[:, 0, 2]
    parts = own / max(oo - a * xo, _TINY) + before / max(pp - b * yo, _TINY) - 2 * both / length
    most = float(parts.amax()) * len(now)
    return Rate(image, max(image, _ratio(max(0.0, most - moved), moved)))


def _ratio(beyond: float, moved: float) -> float:
    """Divide two squared angles and take the root; infinite for steps that no sampler makes."""
    if moved > _JUMP:
        return math.inf
    if beyond <= _ROUNDING:
        return 0.0
    return math.inf if moved <= _ROUNDING else math.sqrt(beyond / moved)


class Settling:
    """Follow the rates of one image, and decide whether the image has settled.

    An image has settled after two rates in a row within ``limit``. A rate above twice the limit shows that it changes
    again.

    The rates of an image's blocks fall with its own. Where the largest of them rises late, shortly before the image
    would settle, one object is undecided: the sampler passes slowly between two outcomes, and small errors grow a
    hundredfold. Then no block may be above the limit either. This uses exact calls alone, so that it does not depend on
    the number of ranks.

    Comparisons are written so that a NaN never settles an image.
    """

    def __init__(self, limit: float) -> None:
        self.settled = False
        self._limit = limit
        self._restart()

    def _restart(self) -> None:
        self._within = 0  # consecutive calls within the limit
        self._lowest = math.inf  # block rate of the late calls
        self._late_change = False

    def advance(self, rate: Rate) -> None:
        """Take the rate of the next call into account."""
        if self.settled:
            if not rate.image <= _UNSETTLED * self._limit:
                self.settled = False
                self._restart()
            return
        if rate.image <= _LATE * self._limit:
            self._late_change |= rate.block > _RISE * self._lowest
            self._lowest = min(self._lowest, rate.block)
        within = rate.block if self._late_change else rate.image
        self._within = self._within + 1 if within <= self._limit else 0
        self.settled = self._within >= _SETTLED_CALLS


@dataclasses.dataclass
class _Reading:
    """The inner products of a call, which may still be on their way to the host."""

    table: Tensor
    done: torch.cuda.Event | None

    def get(self) -> Tensor:
        if self.done is not None:
            self.done.synchronize()
        return self.table


@dataclasses.dataclass
class _Stream:
    """The measurements of one stream of calls."""

    settling: Settling
    last: tuple[Tensor, Tensor] | None = None
    calls: int = 0
    readings: collections.deque[_Reading] = dataclasses.field(default_factory=collections.deque)
    read: Tensor | None = None  # the last one taken from the readings
    known: list[Rate] = dataclasses.field(default_factory=list)
    used: int = 0  # how many known rates the decisions have taken into account


class DriftMonitor:
    """Measure the rate of each stream of calls, and decide which calls must be exact.

    ``limit`` is the bound of :class:`Settling`. With a limit of 0, nothing is measured and no call must be exact. The
    decision for a call uses the rates of all calls but the last one, so that the device never waits for its host. Rank
    0 decides for all ranks.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._streams: dict[int, _Stream] = {}

    def reset(self) -> None:
        """Forget all measurements: a new image begins."""
        self._streams.clear()

    def check(self, decision: Decision) -> Decision:
        """Return ``decision``, with the exact phase instead of the displaced one while the image has not settled."""
        if decision.reset:
            self.reset()
        if decision.phase == "displaced" and self.must_be_exact(decision.stream):
            return dataclasses.replace(decision, phase="exact")
        return decision

    def observe(self, stream: int, sample: Tensor, output: Tensor) -> None:
        """Measure a call by its input and its output. These tensors must not be written to later.

        A few small kernels are queued. The host does not wait.
        """
        if self.limit <= 0:
            return
        found = self._streams.setdefault(stream, _Stream(Settling(self.limit)))
        now = vectors(sample, output)
        before = found.last or now
        found.last = now
        found.calls += 1
        table, done = products(now, before), None
        if table.device.type == "cuda":
            host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            table = host.copy_(table, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        found.readings.append(_Reading(table, done))

    def must_be_exact(self, stream: int) -> bool:
        """Return whether the next call of ``stream`` has to be exact.

        Warns if a sample jumped after its image had settled: another image may have begun unnoticed.
        """
        if self.limit <= 0:
            return False
        found = self._streams.get(stream)
        if found is None:
            return True
        settled = found.settling.settled
        # Rates that a report read before they were LAG calls old must not change a decision.
        rates = self._known(found, LAG)[: max(0, found.calls - LAG)]
        for rate in rates[found.used :]:
            found.settling.advance(rate)
        if settled and any(rate.image == math.inf for rate in rates[found.used :]):
            warnings.warn(
                "a sample jumped within an image: where another image began there, its first two calls read the "
                "state of the one before; put the calls of each image inside `with dc.image(unet):`",
                stacklevel=2,
            )
        found.used = len(rates)
        return not found.settling.settled

    def must_be_full(self, stream: int) -> bool:
        """Return whether the next call of a settled ``stream`` has to compute everything.

        That is so while the image changes faster than the limit, but not so fast that it must be exact.
        """
        found = self._streams.get(stream)
        if self.limit <= 0 or found is None or not found.used:
            return False
        return not found.known[found.used - 1].image <= self.limit

    def rates(self, stream: int) -> list[float]:
        """Return the rates of the calls of ``stream``, from its second call on. Waits for the device."""
        found = self._streams.get(stream)
        return [] if found is None else [rate.image for rate in self._known(found, 1)]

    @staticmethod
    def _known(found: _Stream, lag: int) -> list[Rate]:
        """Return the rates of a stream so far, at least those without the last ``lag - 1`` calls."""
        while len(found.readings) >= lag:
            table = found.readings.popleft().get()
            if found.read is not None:
                same = table.shape[0] == found.read.shape[0]
                found.known.append(rate_of(table, found.read) if same else Rate(math.inf, math.inf))
            found.read = table
        return found.known
