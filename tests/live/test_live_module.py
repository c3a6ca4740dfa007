"""Test live modules with small networks of no library: numbers as inputs, streams of calls, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.errors import ConvertError


class Store:
    """An attention processor that keeps what it saw, as self-attention guidance does."""

    seen: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


class Net(nn.Module):
    """A convolution whose result is scaled, with a group norm over the whole map."""

    def __init__(self, processor: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.processor = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), processor
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.norm(self.conv(sample)) * scale + timestep / 1000
        if states is not None:
            x = x + states.mean()
        if self.processor is not None:
            x = self.processor(x)
        return self.last(x)  # type: ignore[no-any-return]


class Branching(Net):
    """A network with a branch on a number, which cannot be an input."""

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward(sample, timestep, states, 2.0) if scale > 0.5 else sample


@pytest.fixture
def enable(tmp_path: Path) -> Callable[..., Any]:
    def start(net: nn.Module, **options: Any) -> Any:
        given = {"backend": "eager", "warmup_steps": 1, "drift_limit": 0.0, **options}
        return dc.enable(net, 2, lockstep=True, cache=tmp_path / "cache", **given)

    return start


SAMPLE = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))


def want(net: Any, *args: Any, **kwargs: Any) -> Tensor:
    return type(net).forward(net, *args, **kwargs)  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_scale_is_an_input(enable: Any, tmp_path: Path) -> None:
    net = Net().eval()
    with enable(net):
        for scale in (1.0, 0.25):
            torch.testing.assert_close(net(SAMPLE, 5, scale=scale), want(net, SAMPLE, 5, scale=scale))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@torch.no_grad()
def test_a_number_that_decides_is_a_constant(enable: Any, tmp_path: Path) -> None:
    net = Branching().eval()
    with enable(net):
        for scale in (1.0, 0.75, 0.75):
            torch.testing.assert_close(net(SAMPLE, 5, scale=scale), want(net, SAMPLE, 5, scale=scale))
    assert len(list((tmp_path / "cache").iterdir())) == 2


@torch.no_grad()
def test_two_calls_a_step_are_two_streams(enable: Any) -> None:
    """Guidance in two calls: each half goes on with its own state."""
    net, halves = Net().eval(), [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)]
    with enable(net, displace="all") as enabled:
        for i, t in enumerate((900.0, 800.0, 700.0, 600.0)):
            sample = SAMPLE * (1 - 0.05 * i)
            for states in halves:
                got = net(sample, torch.tensor(t), states)
                if i == 0:
                    torch.testing.assert_close(got, want(net, sample, torch.tensor(t), states))
        (module,) = enabled.components["net"].modules
        assert module.image_calls == {"exact": 2, "displaced": 6}


@torch.no_grad()
def test_a_conversion_that_missed_a_step_starts_again(enable: Any) -> None:
    net, times = Net().eval(), [900.0, 800.0, 700.0, 600.0, 500.0]
    with enable(net) as enabled:
        for i, t in enumerate(times):
            sample = SAMPLE.repeat(2 if i == 2 else 1, 1, 1, 1) * (1 - 0.05 * i)
            got = net(sample, torch.tensor(t))
            if i in (2, 3):  # another conversion, and the first one after a step that it missed: both exact
                torch.testing.assert_close(got, want(net, sample, torch.tensor(t)))
        second, first = enabled.components["net"].modules
        assert second.image_calls == {"exact": 1, "displaced": 0} and first.image_calls == {"exact": 1, "displaced": 1}


@torch.no_grad()
def test_an_image_is_stated_for_conversions_that_come_later_too(enable: Any) -> None:
    net = Net().eval()
    with enable(net) as enabled:
        with dc.image(net):
            for i, t in enumerate((900.0, 800.0)):  # samples of two images, by what is measured
                net(torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(i)), torch.tensor(t))
            (module,) = enabled.components["net"].modules
            assert module.image_calls == {"exact": 1, "displaced": 1}
        net(SAMPLE, torch.tensor(700.0))
        assert module.image_calls == {"exact": 1, "displaced": 0}


@torch.no_grad()
def test_a_module_that_stores_values_is_refused(enable: Any) -> None:
    net = Net(Store()).eval()
    with enable(net), pytest.raises(ConvertError, match="net stores processor.seen as it runs"):
        net(SAMPLE, 5)
    assert torch.equal(net(SAMPLE, 5), want(net, SAMPLE, 5)) and net.processor.seen.shape == (1, 8, 8, 6)


@torch.no_grad()
def test_weights_are_followed(enable: Any, tmp_path: Path) -> None:
    net = Net().eval()
    with enable(net):
        net(SAMPLE, 5)
        net.conv.weight.mul_(2)
        torch.testing.assert_close(net(SAMPLE, 5), want(net, SAMPLE, 5))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@torch.no_grad()
def test_what_has_no_image_is_computed_by_each_rank(enable: Any) -> None:
    class Prior(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return hidden_states * timestep

    net = Prior()
    with enable(net), pytest.warns(UserWarning, match="prior is not divided, each rank computes all of it: its first"):
        assert torch.equal(net(torch.ones(2, 3), 5), torch.full((2, 3), 5))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "onnxruntime"])
def test_weights_are_followed_by_compiled_engines(backend: str, enable: Any, tmp_path: Path) -> None:
    net = Net().eval()
    with enable(net, backend=backend) as enabled:
        net(SAMPLE, 5)
        (module,) = enabled.components["net"].modules
        for _ in range(2):
            net.conv.weight.mul_(2)
            net.last.bias.add_(1)
            torch.testing.assert_close(net(SAMPLE, 5), want(net, SAMPLE, 5), rtol=1e-4, atol=1e-4)
        assert (enabled.components["net"].modules[0] is module) == (backend == "inductor")
    assert len(list((tmp_path / "cache").iterdir())) == 1
