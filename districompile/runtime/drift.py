"""How fast the model still changes its mind about an image, measured on what every rank is given anyway.

A displaced step reads the last step's activations. While a model decides what an image will show, one such step can
lead to another image; once it has decided, the error stays small. So steps are exact until the image has settled, and
become exact again should it start to move (docs/decisions/0038).

The measure compares two directions, each with that of the call before:

- the *sample's*, which the sampler turns a little at every step, by an angle that depends on the step's length;
- the *idea's*: the output less its projection on the sample. Models predict noise, velocity or the clean image, and all
  these are sums of multiples of the clean image and the sample; so what is left is the same line for all of them.

Once the image is decided, the second turns with the first. ``rate`` is what it turns beyond that, as a multiple of the
first: it depends neither on what the model predicts nor on the length of the steps.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings

import torch
from torch import Tensor

from districompile.runtime.streams import Decision

LAG = 2  # calls: the host reads what the call before the last one measured, and leaves the device a call to work on
_CALM = 2  # calls in a row within the limit, before a displaced one
_RESTLESS = 2.0  # times the limit: an image that had settled is taken for moving again
_TINY = 1e-30
_JUMP = 0.5  # of a squared angle: 41 degrees, far more than a step of a sampler; it may be another image
_ROUNDING = 1e-6  # of a squared angle: float32, half precision of the tensors themselves is exact in it


def vectors(sample: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """A sample (B, C, ...) and its output as vectors (B, N), of the channels that both have.

    A mask or a learned variance is left out. Where the sizes of the image differ, the output has no part in the
    sample's direction; where the batches do, all of a call is one vector.
    """
    x, out = (torch.view_as_real(t) if t.is_complex() else t for t in (sample.detach(), output.detach()))
    if x.ndim == out.ndim > 2 and x.shape[0] == out.shape[0] and x.shape[2:] == out.shape[2:]:
        channels = min(x.shape[1], out.shape[1])
        x, out = x[:, :channels], out[:, :channels]
    batch = x.shape[0] if x.ndim and x.shape[:1] == out.shape[:1] else 1
    return x.reshape(batch, -1), out.reshape(batch, -1)


def products(now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> Tensor:
    """All that :func:`rate_of` needs of two calls, (B, 2, 4) in float32: the products of this call's sample and output
    with themselves, and with those of the call before. A few kernels on small tensors; no matrix product, which might
    round to half precision. Products of vectors of other lengths are zero."""
    rows = [t.float() for t in (*now, *before)]
    if len({r.shape for r in rows}) == 1:
        every = torch.stack(rows, 1)
        return (every[:, :2, None] * every[:, None]).sum(-1)
    zero = rows[0].new_zeros(rows[0].shape[0])
    table = [[(a * b).sum(1) if a.shape == b.shape else zero for b in rows] for a in rows[:2]]
    return torch.stack([torch.stack(line, 1) for line in table], 1)


def rate_of(table: Tensor, last: Tensor) -> float:
    """By how much more the idea turned than the sample, as a multiple of what the sample turned: the largest of the
    batch. ``table`` and ``last``: :func:`products` of this call and of the one before, on the host.

    Infinite where the sample stayed as it was and the idea did not, or where it jumped: neither is a sampler's step.
    """
    rates = []
    for p, q in zip(table.double().tolist(), last.double().tolist(), strict=True):
        (xx, xo, xx1, xo1), (_, oo, ox1, oo1) = p
        (yy, yo, _, _), (_, pp, _, _) = q  # y and p: the sample and the output before
        a, b = xo / max(xx, _TINY), yo / max(yy, _TINY)  # what of the output is the sample's
        idea = (oo1 - a * xo1 - b * ox1 + a * b * xx1) / max(
            math.sqrt(max(oo - a * xo, 0.0) * max(pp - b * yo, 0.0)), _TINY
        )
        sample = xx1 / max(math.sqrt(xx * yy), _TINY)
        turned, moved = (2 * max(0.0, 1 - c) if math.isfinite(c) else math.nan for c in (idea, sample))  # squared
        beyond = turned - moved
        rates.append(math.nan if math.isnan(beyond) else _ratio(max(0.0, beyond), moved))
    return math.nan if any(map(math.isnan, rates)) else max(rates)


def _ratio(beyond: float, moved: float) -> float:
    if moved > _JUMP:
        return math.inf
    if beyond <= _ROUNDING:
        return 0.0
    return math.inf if moved <= _ROUNDING else math.sqrt(beyond / moved)


@dataclasses.dataclass
class _Reading:
    """Products on their way to the host; None for the first call of an image."""

    table: Tensor
    done: torch.cuda.Event | None

    def get(self) -> Tensor:
        if self.done is not None:
            self.done.synchronize()
        return self.table


@dataclasses.dataclass
class _Stream:
    last: tuple[Tensor, Tensor] | None = None
    readings: collections.deque[_Reading] = dataclasses.field(default_factory=collections.deque)
    read: Tensor | None = None  # the last one taken from them
    known: list[float] = dataclasses.field(default_factory=list)
    settled: bool = False


class DriftMonitor:
    """Follows the rate of each stream of calls, and says which calls must be exact to keep it within ``limit``.

    ``limit`` 0 asks for nothing and measures nothing. The decision for a call knows the rates of all calls but the last
    one, so that no device waits for its host.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._streams: dict[int, _Stream] = {}

    def reset(self) -> None:
        """A new image: nothing is known."""
        self._streams.clear()

    def check(self, decision: Decision) -> Decision:
        """``decision``, or an exact call instead of a displaced one while the image has not settled."""
        if decision.reset:
            self.reset()
        if decision.phase == "steady" and self.must_be_exact(decision.stream):
            return dataclasses.replace(decision, phase="warmup")
        return decision

    def observe(self, stream: int, sample: Tensor, output: Tensor) -> None:
        """Take up a call's input and output, into which nobody may write later. Queues a few small kernels, and waits
        for nothing."""
        if self.limit <= 0:
            return
        found = self._streams.setdefault(stream, _Stream())
        now = vectors(sample, output)
        before = found.last or now
        found.last = now
        table, done = products(now, before), None
        if table.device.type == "cuda":
            host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            table = host.copy_(table, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        found.readings.append(_Reading(table, done))

    def must_be_exact(self, stream: int) -> bool:
        """Whether the next call of ``stream`` has to be exact."""
        if self.limit <= 0:
            return False
        known = self.rates(stream, LAG)
        found = self._streams.get(stream)
        if found is None or len(known) < _CALM:
            return True
        # Written so that a NaN is never calm
        if found.settled:
            found.settled = known[-1] <= _RESTLESS * self.limit
            if known[-1] == math.inf:
                warnings.warn(
                    "a sample jumped within an image: where another image began there, its first two calls read the "
                    "state of the one before; put the calls of each image inside `with dc.image(unet):`",
                    stacklevel=2,
                )
        else:
            found.settled = all(r <= self.limit for r in known[-_CALM:])
        return not found.settled

    def rates(self, stream: int, lag: int = 1) -> list[float]:
        """The rates of the calls of ``stream`` so far, from its second one on, but for the last ``lag - 1`` calls."""
        found = self._streams.get(stream)
        if found is None:
            return []
        while len(found.readings) >= lag:
            table = found.readings.popleft().get()
            if found.read is not None:
                same = table.shape == found.read.shape
                found.known.append(rate_of(table, found.read) if same else math.inf)
            found.read = table
        return found.known
