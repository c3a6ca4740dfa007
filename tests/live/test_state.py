"""Test that changes of a module are noticed, and distinguished: of its structure, and of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from districompile.live.state import Describer, Watch


class Processor:
    """An object that is called, with settings of its own."""

    def __init__(self) -> None:
        self.scale = [1.0]

    def __call__(self, x: Any) -> Any:
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.processor = Processor()
        self.factor, self.listed = 2.0, {"a": [1, 2]}


def _processor_scale(net: Any) -> None:
    net.processor.scale[0] = 0.5


STRUCTURE: list[Callable[[Any], Any]] = [
    lambda n: setattr(n, "factor", 3.0),
    lambda n: setattr(n.inner, "extra", "x"),
    lambda n: setattr(n, "processor", nn.Identity()),
    lambda n: n.listed["a"].append(3),
    lambda n: setattr(n, "inner", nn.Linear(3, 3, bias=False)),
    _processor_scale,
]
WEIGHTS: list[Callable[[Any], Any]] = [
    lambda n: n.inner.weight.detach().mul_(2),
    lambda n: setattr(n.inner, "weight", nn.Parameter(torch.ones(3, 3))),
    lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
]


@pytest.mark.parametrize("change", STRUCTURE)
def test_structure(change: Callable[[Any], Any]) -> None:
    net, describer = Net(), Describer()
    before, watch = describer.state(net), Watch(net)
    assert not watch.changed()
    change(net)
    assert watch.changed()
    assert describer.state(net).structure != before.structure


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights(change: Callable[[Any], Any]) -> None:
    net, describer = Net(), Describer()
    before, watch = describer.state(net), Watch(net)
    change(net)
    after = describer.state(net)
    assert watch.changed() and after.structure == before.structure
    assert after.weights != before.weights and after.tensors["inner.weight"] != before.tensors["inner.weight"]


def test_hooks_are_noticed_but_are_no_structure() -> None:
    net, describer = Net(), Describer()
    before, watch = describer.state(net), Watch(net)
    hook = net.register_forward_hook(lambda *_: None)
    assert watch.changed() and describer.state(net) == before
    hook.remove()
    assert not watch.changed()


def test_equal_modules_have_equal_states_in_every_process() -> None:
    torch.manual_seed(0)
    first = Net()
    torch.manual_seed(0)
    second = Net()
    assert Describer().state(first) == Describer().state(second)


def test_the_number_of_a_gpu_is_no_part_of_a_state() -> None:
    """Each rank has another one. What PEFT keeps in its layers names the device."""
    one, two = Net(), Net()
    two.load_state_dict(one.state_dict())
    one.place, two.place = torch.device("cuda:0"), torch.device("cuda:1")  # type: ignore[assignment]
    assert Describer().state(one) == Describer().state(two)
    two.place = torch.device("cpu")  # type: ignore[assignment]
    assert Describer().state(one) != Describer().state(two)
