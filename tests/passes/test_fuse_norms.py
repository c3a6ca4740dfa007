"""Norms that are made of a mean and a variance become one norm, in any spelling; what is no such norm stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import districompile as dc

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]
ALL, PLANE = (1, 2, 3), (2, 3)


def biased(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) / torch.sqrt(x.var(dims, unbiased=False, keepdim=True) + 1e-3)


def unbiased(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.rsqrt(1e-3 + x.var(dims, keepdim=True)) * (x - x.mean(dims, keepdim=True))


def pair(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    var, mean = torch.var_mean(x, dims, correction=2, keepdim=True)
    return (x - mean) * (var + 1e-3).rsqrt()


def squares(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * ((centred**2).mean(dims, keepdim=True) + 1e-3).pow(-0.5)


def products(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return (x - mean) * torch.reciprocal(torch.sqrt((centred * centred).mean(dims, keepdim=True) + 1e-3))


SPELLINGS = [biased, unbiased, pair, squares, products]


def grouped(norm: Callable[[Tensor, tuple[int, ...]], Tensor], *shape: int) -> Function:
    """Normalise by groups of channels, in a view of ``shape`` behind the batch."""
    return lambda x: norm(x.view(x.shape[0], *shape), tuple(range(2, len(shape) + 1))).view(x.shape)


class Net(nn.Module):
    """A norm between convolutions, whose biases shift its statistics."""

    def __init__(self, norm: Function) -> None:
        super().__init__()
        self.norm, self.first, self.last = norm, nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.norm(self.first(sample * timestep) * 3 + 5))  # type: ignore[no-any-return]


def converted(norm: Function, skip: tuple[str, ...] = (), rows: int = 13) -> tuple[dc.Program, float]:
    """Return the program, and the error of its exact phase on three ranks."""
    torch.manual_seed(0)
    module, call = Net(norm).eval(), (torch.randn(2, 4, rows, 8), torch.tensor(0.7))
    with torch.no_grad():
        want = module(*call)
    program = dc.convert(module, call, ranks=3, skip=skip)
    return program, float((program.simulate(*call) - want).norm() / want.norm())


def purposes(program: dc.Program) -> dict[str, int]:
    found = [c.purpose for c in program.plan.collectives.values()]
    return {p: found.count(p) for p in ("norm", "other")}


@pytest.mark.parametrize("norm", SPELLINGS)
def test_groups_of_channels(norm: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
    program, error = converted(grouped(norm, 3, 2, 13, 8))
    apart, other = converted(grouped(norm, 3, 2, 13, 8), skip=("fuse-norms",))
    assert error < 1e-6 and other < 1e-6
    assert purposes(program) == {"norm": 1, "other": 0}
    assert purposes(apart)["norm"] == 0 and purposes(apart)["other"] > 1


@pytest.mark.parametrize(
    "norm",
    [grouped(unbiased, 3, 2 * 13 * 8), grouped(pair, 2, 3, 13 * 8), lambda x: unbiased(x, PLANE),
     lambda x: biased(x, ALL), lambda x: pair(x, ALL)],
    ids=["one dim of a group", "rows and columns in one dim", "each channel", "all", "all, a pair"],
)  # fmt: skip
def test_other_views_and_dims(norm: Function) -> None:
    program, error = converted(norm)
    assert error < 1e-6 and purposes(program) == {"norm": 1, "other": 0}


def test_users_of_both_shapes() -> None:
    """The normalised view is read as it is, too."""

    def norm(x: Tensor) -> Tensor:
        y = pair(x.view(2, 3, 2, 13, 8), (2, 3, 4))
        return y.view(x.shape) + y.amax(2, keepdim=True).expand(2, 3, 2, 13, 8).reshape(x.shape)

    program, error = converted(norm)
    assert error < 1e-6 and purposes(program) == {"norm": 1, "other": 0}


def by(numerator: Tensor, x: Tensor) -> Tensor:
    return numerator * (x.var(PLANE, keepdim=True) + 1e-3).rsqrt()


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: by(x - x[:, :, :1, :1], x),
        lambda x: by(x - x.mean((1, 2, 3), keepdim=True), x),
        lambda x: by(x - (2 * x).mean(PLANE, keepdim=True), x),
        lambda x: by(torch.sub(x, x.mean(PLANE, keepdim=True), alpha=2), x),
        lambda x: (x - x.mean(PLANE, keepdim=True)) * (torch.add(x.var(PLANE, keepdim=True), 1e-3, alpha=2)).rsqrt(),
        lambda x: (x - x.mean(PLANE, keepdim=True)) * (x.var(PLANE, keepdim=True) + 1e-3).sqrt(),
        lambda x: (x - x.mean(PLANE, keepdim=True)) / (x.var(PLANE, keepdim=True) + 1e-3).rsqrt(),
        lambda x: (x - x.mean(PLANE, keepdim=True)) / (x.std(PLANE, keepdim=True) + 1e-3),
        lambda x: (x - x.mean(PLANE, keepdim=True)) * ((x**2).mean(PLANE, keepdim=True) + 1e-3).rsqrt(),
        lambda x: (x - x.mean((1, 3), keepdim=True)) * (x.var((1, 3), keepdim=True) + 1e-3).rsqrt(),
        lambda x: (x - x.mean(1, keepdim=True)) * (x.var(1, keepdim=True) + 1e-3).rsqrt(),
        lambda x: (x - x.mean((0, 2, 3), keepdim=True)) * (x.var((0, 2, 3), keepdim=True) + 1e-3).rsqrt(),
    ],
)  # fmt: skip
def test_what_is_no_such_norm_stays(norm: Function) -> None:
    program, error = converted(norm)
    assert error < 1e-6 and purposes(program)["norm"] == 0


def test_a_norm_of_tokens_stays_local() -> None:
    """Over the last dim alone there is nothing to wait for, whichever dim has the rows."""

    def norm(x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        return biased(tokens, (3,)).permute(0, 3, 1, 2) + biased(tokens.flatten(1, 2), (2,)).transpose(1, 2).view(
            x.shape
        )

    program, error = converted(norm)
    assert error < 1e-6 and purposes(program) == {"norm": 0, "other": 0}


def test_later_steps_do_not_wait_for_it() -> None:
    program, _ = converted(grouped(unbiased, 3, 2, 13, 8))
    displaced = [c for c in program.plan.collectives.values() if c.purpose == "norm"]
    assert displaced and all(c.displaced for c in displaced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Net(grouped(unbiased, 3, 2, 12, 8)).eval().to(dtype)
    call = torch.randn(1, 4, 12, 8).to(dtype), torch.tensor(0.7, dtype=dtype)
    whole = Net(module.norm).double().eval()
    whole.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    with torch.no_grad():
        want, eager = whole(*(x.double() for x in call)), module(*call)
    got = dc.convert(module, call, ranks=2).simulate(*call)
    assert got.dtype == dtype
    error, usual = (float((y.double() - want).norm() / want.norm()) for y in (got, eager))
    assert error <= 1.5 * usual + 1e-12
