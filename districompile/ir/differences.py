# SPDX-License-Identifier: Apache-2.0
"""Differences of 8 bits, as displaced steps send them: two composites of :mod:`districompile.ir.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENCE_BLOCK = 64  # elements that share an exponent: 1.6 % more bytes
_LARGEST = 127  # of 8 bits, with a sign
_EXPONENTS = 120  # powers of two within float32, and within 8 bits


def encode_difference(x: Tensor, reference: Tensor) -> Tensor:
    """Encode ``x - reference``, both (R, ...) with n elements a row, in 8 bits: (R, n + ceil(n / 64)) of uint8.

    A row holds the rounded quotients of its elements, then the exponents of their blocks. The divisor of a block is the
    least power of two with which its largest element fits 8 bits. Multiples of powers of two are exact, so every rank
    reconstructs the same bits, whichever way its compiler fuses the sum. Numbers below 0 are stored plus 256: compilers
    know bytes without a sign at the border of an engine. A row of zeros is no difference.
    """
    n = x[0].numel()
    difference = _blocks(_precise(x) - _precise(reference))
    largest = difference.abs().amax(-1, keepdim=True)
    exponent = torch.ceil(torch.log2((largest / _LARGEST).clamp(min=2.0**-_EXPONENTS))).clamp(max=float(_EXPONENTS))
    quotient = torch.round(difference * torch.exp2(-exponent)).clamp(-_LARGEST, _LARGEST)
    code = torch.cat([quotient.flatten(1)[:, :n], exponent.flatten(1)], 1)
    return torch.where(code < 0, code + 256, code).to(torch.uint8)


def add_difference(reference: Tensor, code: Tensor) -> Tensor:
    """Add what :func:`encode_difference` has encoded to ``reference``. The result has its shape and dtype."""
    n = reference[0].numel()
    precise = _precise(reference)
    numbers = code.to(precise.dtype)
    numbers = torch.where(numbers > _LARGEST, numbers - 256, numbers)
    quotient, exponent = _blocks(numbers[:, :n]), numbers[:, n:].unsqueeze(-1)
    difference = (quotient * torch.exp2(exponent)).flatten(1)[:, :n]
    return (precise + difference.reshape(reference.shape)).to(reference.dtype)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _blocks(x: Tensor) -> Tensor:
    """Return the rows of ``x`` (R, ...) in blocks, filled up with zeros: (R, blocks, 64)."""
    rows = x.reshape(x.shape[0], -1)
    rest = -rows.shape[1] % DIFFERENCE_BLOCK
    if rest:
        rows = torch.nn.functional.pad(rows, (0, rest))
    return rows.reshape(x.shape[0], -1, DIFFERENCE_BLOCK)
