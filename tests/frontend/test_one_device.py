# SPDX-License-Identifier: Apache-2.0
"""A module on another device than the CPU, whose forward makes constants on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import districompile as dc
from districompile.frontend.one_device import device_of
from districompile.ir.serialize import graph_to_json
from districompile.ir.spec import Phase


class Boxes(nn.Module):
    """Constants that are copied as tensors, as parts of a list, and a number that is not copied at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        waves = 100 ** (torch.arange(8) / 8)
        x = self.conv(sample) * waves[None, :, None, None].to(device=sample.device, dtype=sample.dtype)
        x = x + torch.ones(8, 1, 1).split(4)[0].sum().to(sample.device)
        first, second = torch.linspace(0, 1, 12).to(sample.device).chunk(2)
        return self.last(torch.relu(x) + torch.cat([second, first])) + torch.tensor(0.25)


@pytest.mark.parametrize("optimise", ["", "all"])
def test_constants_are_where_the_module_is(optimise: str) -> None:
    """The meta device stands for a GPU: it differs from the CPU, on which the constants are made."""
    sample = torch.randn(1, 3, 12, 12)
    on_cpu, elsewhere = dc.capture(Boxes(), (sample,)), dc.capture(Boxes().to("meta"), (sample.to("meta"),))
    assert (on_cpu.device.type, elsewhere.device.type) == ("cpu", "meta")
    values = [v for n in elsewhere.graph.nodes for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
    assert {v.device for v in values} == {elsewhere.device}
    phases: tuple[Phase, ...] = ("exact", "displaced")
    for phase in phases:
        texts = [
            [graph_to_json(s.graph) for _, s in dc.convert(c, ranks=2, optimise=optimise).segments(phase)]
            for c in (on_cpu, elsewhere)
        ]
        assert texts[0] == texts[1]


def test_device_of_modules() -> None:
    holder = nn.Module()
    assert device_of(holder) == torch.device("cpu")
    holder.register_buffer("table", torch.empty(2, device="meta"))
    assert device_of(holder) == torch.device("meta")
    holder.weight = nn.Parameter(torch.empty(2))
    assert device_of(holder) == torch.device("cpu")
