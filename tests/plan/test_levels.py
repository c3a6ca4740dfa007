# SPDX-License-Identifier: Apache-2.0
"""An exact phase waits as often as its longest chain of transfers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import districompile as dc
from districompile.plan.plan import Run, Wait


class Attention(nn.Module):
    """Keys and values of projections that cannot be fused, as the keys have a norm of their own; text of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.text = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        x = sample.flatten(2).transpose(1, 2)
        keys = self.norm(self.k(x)).unflatten(-1, (2, 4)).transpose(1, 2)
        values = self.v(x).unflatten(-1, (2, 4)).transpose(1, 2)
        queries = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        out = F.scaled_dot_product_attention(out, self.text(text), text)
        return out.transpose(1, 2).reshape(sample.shape)


def test_keys_and_values_are_waited_for_once() -> None:
    module = Attention().eval()
    inputs = {"sample": torch.randn(1, 8, 6, 4), "text": torch.randn(1, 3, 8)}
    for optimise in ("", "hoist-fetches"):
        program = dc.convert(module, kwargs=inputs, ranks=2, optimise=optimise)
        waits = [step for step in program.plan.phases["exact"].steps if isinstance(step, Wait)]
        assert [len(w.collectives) for w in waits] == [2, 1], optimise  # keys and values; the output
        assert torch.allclose(program.simulate(**inputs), module(**inputs), atol=1e-6)


def test_what_waits_for_nothing_is_computed_where_it_is_read() -> None:
    """The text's projection is read behind the transfers, so that it is not kept from the start of a call on."""
    inputs = {"sample": torch.randn(1, 8, 6, 4), "text": torch.randn(1, 3, 8)}
    plan = dc.convert(Attention().eval(), kwargs=inputs, ranks=2).plan.phases["exact"]
    first, last = [plan.segments[step.segment] for step in plan.steps if isinstance(step, Run)]
    assert "text.weight" not in first.weights and "text.weight" in last.weights


class Parts(nn.Module):
    """Parts of one value, of which the second is read behind a transfer, and the first before it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.conv = nn.Linear(8, 16), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.project(text).tensor_split(2, -1)
        return self.conv(sample * scale[:, :, None, None]) + shift[:, :, None, None]


def test_no_operator_of_several_results_is_parted_from_them() -> None:
    module = Parts().eval()
    inputs = {"sample": torch.randn(1, 8, 6, 4), "text": torch.randn(1, 8)}
    program = dc.convert(module, kwargs=inputs, ranks=2)
    assert torch.allclose(program.simulate(**inputs), module(**inputs), atol=1e-6)
