"""Test that layers with adapters count as what PEFT computes with them: active, merged, disabled, and with a factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from districompile.live.adapters import base_of, merged_weights, unmerge_disabled
from districompile.live.state import adapted_layers

peft = pytest.importorskip("peft")
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net() -> Any:
    """A linear layer with the adapters ``one`` and ``two``."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(4, 4))
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, found, name)
    return found


def check(net: Any, *, moved: bool) -> None:
    """Compare with the layer's own output. ``moved``: adapters change it."""
    layers = adapted_layers(net)
    unmerge_disabled(layers.values())
    weights = {**dict(base_of(net[0]).named_parameters()), **{k[2:]: v for k, v in merged_weights(layers).items()}}
    with torch.no_grad():
        ours, own = nn.functional.linear(X, weights["weight"], weights["bias"]), net(X)
    torch.manual_seed(0)
    plain = nn.Linear(4, 4)
    assert torch.allclose(ours, own, atol=1e-6)
    assert torch.allclose(ours, plain(X), atol=1e-6) != moved


def test_active_adapters(net: Any) -> None:
    for names in (["one"], ["two"], ["one", "two"]):
        net[0].set_adapter(names)
        check(net, moved=True)
    net[0].enable_adapters(False)
    check(net, moved=False)


def test_a_merged_adapter_hides_the_others(net: Any) -> None:
    net[0].set_adapter(["one", "two"])
    net[0].merge(adapter_names=["one"])
    check(net, moved=True)
    net[0].unmerge()
    check(net, moved=True)


def test_disabling_takes_merged_adapters_out(net: Any) -> None:
    net[0].set_adapter(["one"])
    net[0].merge()
    net[0].enable_adapters(False)
    check(net, moved=False)
    assert not net[0].merged
