# SPDX-License-Identifier: Apache-2.0
"""On a GPU: a module there is captured, simulated and compared where it is, with constants that it makes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import districompile as dc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


class Net(nn.Module):
    """Constants of all kinds: ranges, an attribute that is no buffer, a number in a tensor, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.scale = torch.linspace(0.5, 1.5, 8)
        self.register_buffer("table", torch.randn(8))

    def forward(self, sample: Tensor) -> Tensor:
        waves = (100 ** (torch.arange(8) / 8)).to(device=sample.device, dtype=sample.dtype)
        x = self.first(sample) * waves[:, None, None] + self.scale.to(sample.device)[:, None, None]
        out: Tensor = self.last(torch.relu(x + self.table[:, None, None]) * torch.tensor(0.25))
        return out


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_a_module_on_a_gpu(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net, sample = Net().eval().cuda(), torch.randn(1, 3, 20, 12, device="cuda")
    with torch.no_grad():
        want = net(sample)
    captured = dc.capture(net, (sample.cpu(),))  # examples may be anywhere
    assert captured.device.type == "cuda"
    program = dc.convert(captured, ranks=3, optimise="all")
    for given in (sample, sample.cpu()):
        got = program.simulate(given)
        assert got.device.type == "cuda" and error(got, want) <= 1e-5
    assert error(program.simulate(sample, phase="displaced"), want) <= 1e-5
    assert max(e.error for e in program.compare_nodes(sample)) <= 1e-5
    for backend in ("eager", "inductor"):
        program.save(tmp_path / backend, backend=backend)
        loaded = dc.load(tmp_path / backend, lockstep=True, device="cuda")
        assert error(loaded(sample), want) <= 1e-5


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_calls_of_one_rank_are_replayed(tmp_path: Path, backend: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net, sample = Net().eval().cuda(), torch.randn(1, 3, 20, 12, device="cuda")
    dc.convert(net, (sample,), ranks=1).save(tmp_path / "b", backend=backend)
    for graphs in (True, False):
        loaded = dc.load(tmp_path / "b", device="cuda", cuda_graph=graphs)
        for i in range(4):
            with torch.no_grad():
                want = net(sample + i)
            assert error(loaded(sample + i), want) <= 1e-5
        executor = loaded._runner._executors[0][0][0]  # type: ignore[attr-defined]
        assert bool(executor._captured) == graphs
