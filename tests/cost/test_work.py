# SPDX-License-Identifier: Apache-2.0
"""Test the kernels that are counted from a graph: sizes, bytes, and what is fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.cost.work import KernelWork, kernels_of
from districompile.frontend.capture import capture


def kernels(module: nn.Module, *args: Tensor, epilogues: bool = False) -> list[KernelWork]:
    return kernels_of(capture(module, args).graph.nodes, epilogues=epilogues)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.nn.functional.silu(self.first(x)) * 2.0)
        return result


def test_products_have_their_sizes_and_bytes() -> None:
    linear = kernels(nn.Linear(16, 32), torch.randn(2, 5, 16))
    (work,) = linear
    assert (work.kind, work.m, work.n, work.k, work.batch) == ("matmul", 10, 32, 16, 1)
    assert work.flops == 2 * 10 * 32 * 16
    assert work.nbytes == 4 * (10 * 16 + 32 * 16 + 32 + 10 * 32)

    (conv,) = kernels(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8))
    assert (conv.kind, conv.m, conv.n, conv.k) == ("conv", 2 * 4 * 4, 8, 27)
    assert conv.flops == 2 * 2 * 4 * 4 * 8 * 27


def test_attention_counts_queries_keys_and_heads() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    (work,) = kernels(Attention(), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 7, 8))
    assert (work.kind, work.m, work.n, work.k, work.batch) == ("attention", 10, 7, 8, 6)
    assert work.flops == 2 * 2 * 3 * 10 * 7 * (8 + 8)


def test_elementwise_operators_in_a_row_are_one_kernel() -> None:
    found = kernels(Chain(), torch.randn(4, 16))
    assert [w.kind for w in found] == ["matmul", "memory", "matmul"]
    assert found[1].nbytes == 4 * (4 * 32 + 4 * 32)  # reads the first product, writes what the second reads

    first, second = kernels(Chain(), torch.randn(4, 16), epilogues=True)
    assert first.kind == second.kind == "matmul"
    assert first.nbytes == 4 * (4 * 16 + 32 * 16 + 32 + 4 * 32)  # only the result of the chain is written


def test_a_reduction_and_a_value_read_twice_are_kernels_of_their_own() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.linear(x)
            result: Tensor = x + self.linear(self.norm(x))
            return result

    found = kernels(Residual(), torch.randn(4, 8), epilogues=True)
    assert [w.kind for w in found] == ["matmul", "memory", "matmul"]  # both sums are epilogues, the norm is not
    assert found[1].name == "aten::layer_norm"


def test_slices_read_only_their_part() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x[:, :2])

    (work,) = kernels(Part(), torch.randn(4, 8))
    assert work.nbytes == 4 * (8 + 8)


def test_ranks_of_a_program_share_the_work() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    program = dc.convert(module, (torch.randn(1, 4, 12, 8),), ranks=3)
    whole = sum(w.flops for w in kernels(module, torch.randn(1, 4, 12, 8)))
    for phase in ("exact", "displaced"):
        ranks = [kernels_of(program.graph(phase).nodes, r) for r in range(3)]  # type: ignore[arg-type]
        assert sum(w.flops for rank in ranks for w in rank) == whole
        assert not any("exchange" in w.name for rank in ranks for w in rank)
