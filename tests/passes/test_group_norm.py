"""Group norm never returns NaN or black images, whatever the statistics, in every mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import districompile as dc
from districompile.ir.ops import ops
from districompile.ir.unit import GROUPNORM_MODES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, sample: Tensor) -> Tensor:
        return self.norm(sample)


def large_mean(x: Tensor) -> Tensor:
    return x * 1e-2 + 1000


def tiny_variance(x: Tensor) -> Tensor:
    return x * 1e-5


def one_constant_patch(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 4:8] = 3.0
    return y


def all_constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 7.0)


def half_range(x: Tensor) -> Tensor:
    """Squares overflow float16 long before the values do."""
    return x * 8000


ADVERSARIES = (large_mean, tiny_variance, one_constant_patch, all_constant, half_range)


def data(seed: int) -> Tensor:
    return torch.randn(2, 4, 12, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spoil", ADVERSARIES, ids=lambda f: f.__name__)
def test_all_modes_stay_finite_and_the_exact_phase_exact(spoil: object, dtype: torch.dtype) -> None:
    assert callable(spoil)
    torch.manual_seed(0)
    module = Net().to(dtype).eval()
    captured = dc.capture(module, (data(0).to(dtype),))
    steps = [spoil(data(i)).to(dtype) for i in range(3)]
    for mode in GROUPNORM_MODES:
        program = dc.convert(captured, ranks=3, groupnorm=mode)
        with torch.no_grad():
            want = module.double()(steps[0].double())
            module.to(dtype)
        got = program.simulate(steps[0])
        # float32 rounds a mean of 1000 at 6e-5, two hundredths of the spread there is
        scale = want.abs().max()
        tolerance = 2e-2 if dtype == torch.float16 else 2e-3 if spoil is large_mean else 1e-5
        assert float((got.double() - want).abs().max() / scale) <= tolerance, mode
        for x in steps[1:]:
            assert program.simulate(x, phase="displaced").isfinite().all(), mode


def test_corrected_moments_are_the_papers() -> None:
    """E[x] and E[x^2] of the previous step plus the rank's own change, in float64, where nothing cancels."""
    generator = torch.Generator().manual_seed(0)
    old = [torch.randn(1, 4, 30, generator=generator, dtype=torch.float64) * (r + 1) + r for r in range(3)]
    new = torch.randn(1, 4, 30, generator=generator, dtype=torch.float64) * 1.3 + 0.2
    parts = torch.cat([ops.moments(x, 2) for x in old])
    merged = ops.merge_moments(parts, [60.0] * 3)
    stats = ops.correct_moments(merged, parts[:1], ops.moments(new, 2))

    def powers(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.reshape(1, 2, -1)
        return y.mean(-1), y.square().mean(-1)

    whole = powers(torch.cat([x.reshape(1, 2, -1) for x in old], -1).reshape(1, 2, -1))
    mean, square = (w + f - s for w, f, s in zip(whole, powers(new), powers(old[0]), strict=True))
    torch.testing.assert_close(stats[0], mean)
    torch.testing.assert_close(stats[1], square - mean.square())


def test_negative_variance_falls_back_to_the_ranks_own() -> None:
    one = torch.ones(1, 1)
    merged = torch.stack([one * 0, one * 0.1])
    stale, fresh = torch.stack([one * 0, one * 5]).unsqueeze(0), torch.stack([one * 0, one * 0.5]).unsqueeze(0)
    assert float(ops.correct_moments(merged, stale, fresh)[1]) == 0.5


def test_uneven_moments_merge_exactly() -> None:
    x = torch.randn(2, 4, 11, 3, dtype=torch.float64) * 2 + 100
    parts = torch.cat([ops.moments(p, 2) for p in x.split([2, 4, 5], 2)])
    mean, var = ops.merge_moments(parts, [12.0, 24.0, 30.0])
    grouped = x.reshape(2, 2, -1)
    torch.testing.assert_close(mean, grouped.mean(-1))
    torch.testing.assert_close(var, grouped.var(-1, correction=0))


def announced(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What a rank sends after a step from ``old`` to ``new`` moments, (1, 4, B, G)."""
    return ops.forecast_moments(new, torch.cat([old, old], 1))


def moments_of(mean: float, var: float) -> torch.Tensor:
    return torch.tensor([mean, var]).reshape(1, 2, 1, 1)


def test_statistics_that_move_evenly_are_forecast() -> None:
    """Means that move by the same amount, variances that grow by the same factor: the merged statistics are those of
    this step, without a value of it from the other ranks."""
    at = [[moments_of(m + 0.1 * d * t, v * g**t) for t in range(3)] for m, d, v, g in ((0, 1, 2, 1.1), (3, -2, 1, 0.9))]
    parts = torch.cat([announced(a[0], a[1]) for a in at])
    merged = ops.merge_forecasts(parts, at[0][2], [8.0, 24.0])
    want = ops.merge_moments(torch.cat([a[2] for a in at]), [8.0, 24.0])
    torch.testing.assert_close(merged, want)


def test_half_of_a_common_surprise_reaches_the_others() -> None:
    still = [moments_of(0, 1), moments_of(0, 1)]
    parts = torch.cat([announced(m, m) for m in still])
    mean, var = ops.merge_forecasts(parts, moments_of(0.4, 4), [1.0, 1.0]).reshape(2).tolist()
    assert mean == pytest.approx((0.4 + 0.2) / 2)
    assert var == pytest.approx((4 + 2) / 2 + 0.1**2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2, *[st.floats(0, 1e4)] * 2), min_size=2, max_size=8),
    st.floats(-1e3, 1e3),
    st.floats(0, 1e4),
)
def test_the_variance_is_never_less_than_the_ranks_own(
    ranks: list[tuple[float, float, float, float]], mean: float, var: float
) -> None:
    """The paper's estimate may come out tiny or negative, and 1 / sqrt of it explodes; this one cannot."""
    parts = torch.cat([announced(moments_of(a, v), moments_of(b, w)) for a, b, v, w in ranks])
    share = 1 / len(ranks)
    merged = ops.merge_forecasts(parts, moments_of(mean, var), [1.0] * len(ranks))
    least = share * (
        var + sum(w for _, _, _, w in ranks[1:]) / 8
    )  # forecast: a quarter at least, corrected: half of it
    assert merged.isfinite().all()
    assert float(merged[1]) >= least * (1 - 1e-5) - 1e-30  # what float32 holds


def test_modes_agree_where_nothing_changes() -> None:
    """The same call again: each mode's displaced step is the exact one, but for local statistics."""
    module = Net().eval()
    captured = dc.capture(module, (data(0),))
    for mode in GROUPNORM_MODES:
        program = dc.convert(captured, ranks=3, groupnorm=mode)
        want = program.simulate(data(0))
        for _ in range(3):
            got = program.simulate(data(0), phase="displaced")
        assert (mode == "local") != torch.allclose(got, want, rtol=1e-5, atol=1e-5), mode


def test_statistics_of_all_ranks_are_read_where_they_are() -> None:
    """As rows of one tensor each pair would be a choice between two places, which Triton 3.6 does not compile."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from districompile.backends.inductor import lowerings as forms

    def merged(received: Tensor, previous: Tensor, x: Tensor) -> Tensor:
        fresh = forms.moments(x, 4)
        parts = forms.assemble(received, previous, 0, 1, 2, 0, 1)
        return forms.merge_forecasts(parts, fresh, [32.0, 32.0, 64.0, 32.0])

    args = (torch.rand(3, 4, 1, 4), torch.rand(1, 4, 1, 4), torch.randn(1, 8, 8, 8))
    traced = make_fx(merged)(*args)
    assert isinstance(traced, fx.GraphModule)
    traced.graph.eliminate_dead_code()
    assert not [n for n in traced.graph.nodes if n.target is torch.ops.aten.cat.default]
    parts = ops.assemble(args[0], args[1], 0, 1, 2, 0, 1)
    torch.testing.assert_close(
        traced(*args), ops.merge_forecasts(parts, ops.moments(args[2], 4), [32.0, 32.0, 64.0, 32.0])
    )
