"""Random small UNets: hypothesis draws blocks and their parameters, and N ranks have to compute what one does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.families.base import randomise
from tests.helpers_cut import Cutting

CHUNKS = 12  # pieces that workers share
ALWAYS = 1  # pieces of every run; the others are slow
C = 4  # channels everywhere


@dataclasses.dataclass(frozen=True)
class Spec:
    """A drawn block: its name in BLOCKS and a number that its parameters are read off."""

    kind: str
    dice: int

    def pick(self, *choices: Any) -> Any:
        """One of the choices, another one for each number of choices."""
        return choices[self.dice // 7 % len(choices)]


BLOCKS: dict[str, Callable[[Spec], Callable[[nn.Module, Tensor], Tensor]]] = {}


def block(make: Any) -> Any:
    BLOCKS[make.__name__] = make
    return make


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _image(t: Tensor, like: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(like.shape)


class Layers(nn.Module):
    """What blocks may use: every layer once, so that a block is a function."""

    def __init__(self, h: int, w: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.point = nn.Conv2d(C, C, 1)
        self.weight = nn.Parameter(torch.zeros(C, C, 5, 5))
        self.depth = nn.Parameter(torch.zeros(C, 1, 4, 4))
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.group, self.layer = nn.GroupNorm(2, C), nn.LayerNorm(C)
        self.text = nn.Parameter(torch.zeros(1, 3, C))
        self.table = nn.Parameter(torch.zeros(1, C, h + 2, w + 2))
        self.line = nn.Conv1d(C, C, 3, padding=1)


@block
def convolution(spec: Spec) -> Any:
    k, d, groups = spec.pick(1, 3, 5, 2, 4), spec.pick(1, 1, 2), spec.pick(1, 2, 4, 1)
    p, s = spec.pick(0, 1, 2, 3), spec.pick(1, 1, 1, 2)

    def run(m: Any, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) + 2 * p < (k - 1) * d + 4:
            return m.conv(x)
        weight = m.weight[:C, : C // groups, :k, :k]
        return F.conv2d(x, weight, None, s, p, d, groups)

    return run


@block
def transposed(spec: Spec) -> Any:
    k, s = spec.pick((2, 2), (4, 2), (3, 1), (3, 2), (4, 3))
    p = spec.pick(0, 1)

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, m.weight[:, :, :k, :k], None, s, p, output_padding=spec.dice % s)
        return y[:, :, : x.shape[2] + 2, : x.shape[3] + 1]

    return run


@block
def padded(spec: Spec) -> Any:
    mode = spec.pick("constant", "reflect", "replicate", "circular", "reflect")
    sides = spec.pick((1, 1, 1, 1), (0, 1, 0, 1), (2, 0, 2, 1), (0, 0, 1, 2))
    return lambda m, x: m.conv(F.pad(x, sides, mode if min(x.shape[2:]) > 2 else "replicate"))


@block
def norm(spec: Spec) -> Any:
    def rms(m: Any, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * m.text[:, 0, :, None, None]

    def layer(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def adaptive(m: Any, x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.1)

    return spec.pick(
        lambda m, x: m.group(x),
        lambda m, x: m.group(x.flatten(2)).reshape(x.shape),
        layer,
        rms,
        adaptive,
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x / (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) + 1),
    )


@block
def attention(spec: Spec) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.layer(_tokens(x))).chunk(3, -1)
        text = m.text.expand(x.shape[0], -1, -1)
        which = spec.dice % 9
        if which == 1:
            k, v = torch.cat([text, k], 1), torch.cat([text, v], 1)
        if which == 2:
            k, v = text, text * 2
        if which == 3:
            t = (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v
        elif which == 4:
            t = torch.einsum("bji,bjd->bid", torch.einsum("bjd,bid->bji", k, q).softmax(1), v)
        elif which == 5:
            t = q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)
        elif which == 6:
            a, b = F.normalize(q, dim=1), F.normalize(k, dim=1)
            t = v @ (a.transpose(1, 2) @ b).softmax(-1).transpose(1, 2)
        elif which == 7:
            q, k, v = (u.unflatten(-1, (2, 2)).transpose(1, 2) for u in (q, k, v))
            t = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        elif which == 8:
            scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=0.5)
            t = torch.bmm(scores.softmax(-1), v)
        else:
            t = F.scaled_dot_product_attention(q, k, v)
        return x + _image(m.out(t), x)

    return run


@block
def beside(spec: Spec) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        text = m.text.expand(x.shape[0], -1, -1)
        front, back = spec.pick((3, 0), (1, 2), (0, 3), (2, 1))
        t = torch.cat([text[:, :front], _tokens(x), text[:, front : front + back]], 1)
        for _ in range(1 + spec.dice % 2):
            q, k, v = m.qkv(m.layer(t)).chunk(3, -1)
            t = t + m.out(F.scaled_dot_product_attention(q, k, v))
        if spec.dice % 3 == 0:
            t = m.line(t.transpose(1, 2)).transpose(1, 2)
        if spec.dice % 5 == 0:
            t = t - t.mean(1, keepdim=True)
        tail = t[:, :front].sum(1, keepdim=True) if front else t[:, -back:].sum(1, keepdim=True)
        return x + _image(t[:, front : t.shape[1] - back] + tail, x)

    return run


@block
def windows(spec: Spec) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if h % 2 or w % 2:
            return m.conv(x)
        y = torch.roll(x, (-1, 1), (2, 3)) if spec.dice % 2 else x
        t = y.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        q, k, v = m.qkv(t).chunk(3, -1)
        t = F.scaled_dot_product_attention(q, k, v).reshape(b, h // 2, w // 2, 2, 2, c)
        return x + t.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    return run


@block
def unfolded(spec: Spec) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        k = F.unfold(x, 3, padding=1).reshape(b, c, 9, h, w)
        weights = (m.point(x).unsqueeze(2) * k).sum(1).softmax(1)
        return x + torch.einsum("bnhw,bcnhw->bchw", weights, k)

    return run


@block
def moved(spec: Spec) -> Any:
    def write(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 1:3] = m.conv(x)[:, :, -2:]
        y[:, 1:2] = x[:, :1]
        return y

    return spec.pick(
        lambda m, x: torch.roll(x, 3, 2),
        lambda m, x: x + x.flip(2),
        write,
        lambda m, x: m.conv(torch.cat([x[:, :, -1:], x, x[:, :, :1]], 2)),
        lambda m, x: torch.cat([x[:, :, 1:], x[:, :, :1]], 2),
        lambda m, x: torch.cat([x, x.flip(3)], 2),
        lambda m, x: torch.stack([x[:, :, ::2].mean(2), x[:, :, 1::2].mean(2)], 2).mean(2, keepdim=True) + x,
        lambda m, x: (
            x + m.table[:, :, 1 : 1 + x.shape[2], : x.shape[3]]
            if x.shape[2] < m.table.shape[2] and x.shape[3] <= m.table.shape[3]
            else x
        ),
        lambda m, x: torch.cat([c * 1.5 for c in x.chunk(3, 2)], 2),
        lambda m, x: x.cumsum(2) * 0.1,
    )


@block
def pooled(spec: Spec) -> Any:
    return spec.pick(
        lambda m, x: x * m.point(F.adaptive_avg_pool2d(x, 1)).sigmoid(),
        lambda m, x: x + x.amax((2, 3), keepdim=True),
        lambda m, x: x + torch.einsum("bn,bcn->bc", x[:, 0].flatten(1).softmax(-1), x.flatten(2))[:, :, None, None],
        lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda m, x: F.max_pool2d(x, 3, 1, 1),
        lambda m, x: x + F.interpolate(F.adaptive_avg_pool2d(x, (3, 2)), x.shape[2:], mode="bilinear"),
        lambda m, x: x + x.mean((0, 2, 3), keepdim=True),
    )


@block
def lines(spec: Spec) -> Any:
    return spec.pick(
        lambda m, x: x + m.line(x.flatten(2)).reshape(x.shape),
        lambda m, x: (
            x + m.line(x.transpose(2, 3).flatten(2)).reshape(*x.shape[:2], x.shape[3], x.shape[2]).transpose(2, 3)
        ),
        lambda m, x: (
            x + m.line(x.permute(0, 3, 1, 2).flatten(0, 1)).reshape(x.shape[0], x.shape[3], C, -1).permute(0, 2, 3, 1)
        ),
        lambda m, x: (
            x + m.line(x.permute(0, 2, 1, 3).flatten(0, 1)).reshape(x.shape[0], x.shape[2], C, -1).permute(0, 2, 1, 3)
        ),
    )


def down(spec: Spec, m: Any, x: Tensor) -> Tensor:
    if min(x.shape[2:]) < 4:
        return x
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    which = spec.dice % 8
    if which == 0:
        return F.conv2d(x, m.conv.weight, stride=2, padding=1)
    if which == 1:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), m.conv.weight, stride=2)
    if which == 2:
        return F.avg_pool2d(x, 2, ceil_mode=True)
    if which == 3 and even:
        return F.pixel_unshuffle(x, 2)[:, ::4]
    if which == 4:
        return x[:, :, ::2, ::2]
    if which == 5:
        return F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=bool(spec.dice % 16 > 7))
    if which == 6:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), m.depth, stride=2, groups=C)
    return F.max_pool2d(x, 3, 2, 1)


def up(spec: Spec, m: Any, x: Tensor, size: Any) -> Tensor:
    which = spec.dice % 6
    if which == 0:
        x = F.conv_transpose2d(x, m.weight[:, :, :4, :4], stride=2, padding=1)
    elif which == 1:
        x = F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)
    elif which == 2:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if tuple(x.shape[2:]) == tuple(size):
        return x
    mode = spec.pick("nearest", "bilinear", "bicubic", "nearest-exact", "bilinear")
    corners = {"align_corners": True} if mode.startswith("bi") and spec.dice % 3 == 0 else {}
    return F.interpolate(x, size=tuple(size), mode=mode, **corners)


class Net(nn.Module):
    def __init__(self, h: int, w: int, levels: list[tuple[list[Spec], Spec]], middle: list[Spec]) -> None:
        super().__init__()
        self.layers = Layers(h, w)
        self.levels, self.middle = levels, middle

    def run(self, specs: list[Spec], x: Tensor) -> Tensor:
        for s in specs:
            y = BLOCKS[s.kind](s)(self.layers, x)
            x = y.tanh() if s.dice % 2 else F.silu(y)
        return x

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for specs, resample in self.levels:
            x = self.run(specs, x)
            skips.append(x)
            x = down(resample, self.layers, x)
        x = self.run(self.middle, x)
        for (specs, resample), skip in zip(reversed(self.levels), reversed(skips), strict=True):
            x = up(resample, self.layers, x, skip.shape[2:])
            both = torch.cat([x, skip], 1)
            x = self.run(specs[:1], both[:, ::2] + both[:, 1::2])
        return self.layers.conv(x)


SPECS = st.builds(Spec, st.sampled_from(sorted(BLOCKS)), st.integers(0, 1000))


@st.composite
def networks(draw: st.DrawFn) -> tuple[Net, Tensor, list[float]]:
    h, w = draw(st.integers(8, 21)), draw(st.integers(4, 7))
    levels = draw(st.lists(st.tuples(st.lists(SPECS, min_size=1, max_size=1), SPECS), min_size=0, max_size=2))
    middle = draw(st.lists(SPECS, min_size=1, max_size=2))
    net = randomise(Net(h, w, levels, middle), draw(st.integers(0, 3)))
    assert isinstance(net, Net)
    x = torch.randn(draw(st.integers(1, 2)), C, h, w, generator=torch.Generator().manual_seed(h * w))
    ranks = draw(st.integers(2, 5))
    shares = draw(st.lists(st.integers(2, 4), min_size=ranks, max_size=ranks))
    return net, x, [0.0, *(s / sum(shares) for s in itertools.accumulate(shares))]


@pytest.mark.parametrize(
    "chunk",
    [pytest.param(chunk, marks=pytest.mark.always if chunk < ALWAYS else pytest.mark.slow) for chunk in range(CHUNKS)],
)
def test_random_networks(chunk: int, request: pytest.FixtureRequest, fresh_seed: int | None) -> None:
    @seed(chunk if fresh_seed is None else fresh_seed + chunk)
    @settings(
        max_examples=math.ceil(request.config.getoption("--networks") / CHUNKS),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def check(drawn: tuple[Net, Tensor, list[float]]) -> None:
        net, x, cut_points = drawn
        error, found = Cutting(net, {"x": x}, {"x": 2}).at(cut_points)
        described = f"{x.shape} {cut_points} {net.levels} {net.middle}"
        assert error <= 1e-5, described
        assert not [f for f in found.fallbacks if "the rule failed" in f.reason], (found.fallbacks, described)

    check()
