"""Small networks for constructs that no package covers: filters, resizing, norms, positions, writes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.base import Call, family, randn, randomise

GROUP = "constructs"


class _Net(nn.Module):
    """A convolution, the block under test, and a convolution, with a skip connection."""

    def __init__(self, middle: nn.Module, width: int = 8, last: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(last or width, 3, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(sample)))
        return out


def around(middle: nn.Module, h: int, w: int, width: int = 8, last: int | None = None) -> Call:
    """Build a network around a module, and a call of it."""
    torch.manual_seed(0)
    return Call(randomise(_Net(middle, width, last)), {"sample": randn(2, 3, h, w)})


class _Function(nn.Module):
    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(x, **dict(self.parts.items()))
        return out


def around_function(
    function: Any, h: int, w: int, width: int = 8, last: int | None = None, **modules: nn.Module
) -> Call:
    """Build a network around a function of an image and of ``modules``, and a call of it."""
    return around(_Function(function, **modules), h, w, width, last)


def to_tokens(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_image(t: Tensor, like: Tensor) -> Tensor:
    """Reshape (B, H W, C) to the shape of ``like``."""
    return t.transpose(1, 2).reshape(like.shape)


@family(GROUP)
def filters_upfirdn(h: int, w: int) -> Call:
    """StyleGAN's resampling: zeros interleaved, padded, cropped, channels in the batch, every other row."""

    def up(x: Tensor, kernel: Tensor) -> Tensor:
        b, c, rows, columns = x.shape
        y = F.pad(x.reshape(b, c, rows, 1, columns, 1), (0, 1, 0, 0, 0, 1)).reshape(b * c, 1, rows * 2, columns * 2)
        return F.conv2d(F.pad(y, (2, 1, 2, 1)), kernel).reshape(b, c, rows * 2, columns * 2)

    def down(x: Tensor, kernel: Tensor) -> Tensor:
        b, c, rows, columns = x.shape
        y = F.conv2d(F.pad(x.reshape(b * c, 1, rows, columns), (1, 1, 1, 1)), kernel)
        return y[:, :, ::2, ::2].reshape(b, c, rows // 2, columns // 2)

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device) / 8
        kernel = torch.outer(line, line)[None, None]
        return down(conv(up(x, kernel * 4)), kernel)

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def filters_depthwise(h: int, w: int) -> Call:
    """Filters assembled in the graph by new_zeros and index_put, reflected borders, a transposed convolution."""

    def kernel(x: Tensor) -> Tensor:
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device) / 8
        out = x.new_zeros(8, 8, 4, 4)
        index = torch.arange(8, device=x.device)
        out[index, index] = torch.outer(line, line)
        return out

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel(x), stride=2)
        y = conv(y)
        return x + F.conv_transpose2d(F.pad(y, (1, 1, 1, 1), "reflect"), kernel(x) * 4, stride=2, padding=3)

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def convolutions(h: int, w: int) -> Call:
    """Convolutions: grouped, depthwise, dilated, large, asymmetric, transposed."""
    return around(
        nn.Sequential(
            nn.Conv2d(8, 8, 7, padding=3, groups=8),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
            nn.SiLU(),
            nn.Conv2d(8, 8, (5, 1), padding=(2, 0)),
            nn.Conv2d(8, 8, 3, padding=4, dilation=4),
            nn.Conv2d(8, 8, 3, padding=2),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, (1, 3), padding=(0, 1), padding_mode="circular"),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.Conv2d(8, 8, 4, 2, 1),
            nn.ConvTranspose2d(8, 8, 4, 2, 1),
            nn.ReflectionPad2d(2),
            nn.Conv2d(8, 8, 5),
            nn.ReplicationPad2d((0, 1, 0, 1)),
            nn.Conv2d(8, 8, 3, 2),
            nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2),
        ),
        h,
        w,
    )


@family(GROUP)
def resizing(h: int, w: int) -> Call:
    """Resizing by fractions, with and without aligned corners, antialiased, and back by explicit sizes."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        size = x.shape[-2:]
        out = x
        for mode, options in (
            ("nearest", {}),
            ("nearest-exact", {}),
            ("bilinear", {}),
            ("bilinear", {"align_corners": True}),
            ("bicubic", {}),
            ("bilinear", {"antialias": True}),
            ("bicubic", {"antialias": True}),
        ):
            y = F.interpolate(x, scale_factor=0.75, mode=mode, **options)
            out = out + F.interpolate(conv(y), size=size, mode=mode, **options)
        return out

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def pooling(h: int, w: int) -> Call:
    """Average, maximum and adaptive pooling, squeeze and excitation, softmax pooling, pixel shuffle, space to depth."""

    def f(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        size = x.shape[-2:]
        out = x * a(F.adaptive_avg_pool2d(x, 1)).sigmoid() + x.amax((2, 3), keepdim=True) + x.std((2, 3), keepdim=True)
        weights = b(x).flatten(2).softmax(-1)
        out = out + torch.einsum("bin,bcn->bci", weights, x.flatten(2)).unsqueeze(-1)
        out = out + F.interpolate(F.avg_pool2d(x, 3, 2, 1), size) + F.interpolate(F.max_pool2d(x, 2), size)
        out = out + F.interpolate(F.adaptive_avg_pool2d(x, (5, 3)), size, mode="bilinear")
        out = out + F.interpolate(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), size)
        y = F.pixel_unshuffle(out, 2)
        b_, c_, rows, columns = out.shape
        z = out.reshape(b_, c_, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(y.shape)
        return F.pixel_shuffle(c(y) + d(z), 2)

    return around_function(
        f, h, w, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 1, 1), c=nn.Conv2d(32, 32, 1), d=nn.Conv2d(32, 32, 3, padding=1)
    )


@family(GROUP)
def norms(h: int, w: int) -> Call:
    """Instance, layer (channels first), RMS, group over flattened pixels, weight standardisation, adaptive instance."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.instance, self.group, self.batch = (
                nn.InstanceNorm2d(8, affine=True),
                nn.GroupNorm(2, 8),
                nn.BatchNorm2d(8),
            )
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.batch(self.instance(x))
            x = (x - x.mean(1, keepdim=True)) * (x.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt() * self.scale
            weight = self.conv.weight
            mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), unbiased=False, keepdim=True)
            x = F.conv2d(x, (weight - mean) * (var + 1e-5).rsqrt(), self.conv.bias, padding=1)
            x = self.group(x.flatten(2)).reshape(x.shape)
            x = F.normalize(x, dim=1) * math.sqrt(8) * self.scale
            style_mean, style_std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
            x = (x - style_mean) / (style_std + 1e-5) * self.scale
            y = x.permute(0, 2, 3, 1)
            gx = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
            return (y * (gx / (gx.mean(-1, keepdim=True) + 1e-6)) + y).permute(0, 3, 1, 2)

    call = around(Block(), h, w)
    for m in call.module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = randn(8)
            m.running_var = randn(8).abs() + 0.5
    return call


@family(GROUP)
def positions(h: int, w: int) -> Call:
    """Learned, cropped and sinusoidal tables, coordinate channels, rotary positions computed in the graph."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 8, h + 4, w + 4))
            self.rows = nn.Embedding(h, 8)
            self.coordinates = nn.Conv2d(10, 8, 1)
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            on = x.device
            x = x + self.table[:, :, 2 : 2 + h, 2 : 2 + w] + self.rows(torch.arange(h, device=on)).t()[None, :, :, None]
            lines = (torch.linspace(-1, 1, n, device=on) for n in (h, w))
            y, z = torch.meshgrid(*lines, indexing="ij")
            grid = torch.stack([y, z])[None].expand(x.shape[0], -1, -1, -1)
            x = self.coordinates(torch.cat([x, grid], 1))
            q, k, v = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in self.qkv(to_tokens(x)).chunk(3, -1))
            places, rates = torch.arange(h * w, device=on).float(), 10 ** -torch.arange(2, device=on).float()
            angle = torch.outer(places, rates).repeat_interleave(2, -1)

            def rotate(t: Tensor) -> Tensor:
                a, b = t.unflatten(-1, (2, 2)).unbind(-1)
                return t * angle.cos() + torch.stack([-b, a], -1).flatten(-2) * angle.sin()

            t = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
            return x + to_image(t.transpose(1, 2).flatten(2), x)

    return around(Block(), h, w)


@family(GROUP)
def writes(h: int, w: int) -> Call:
    """In-place operators: into slices of rows, columns and channels; flips and rolls; a border written over."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        y = x.clone()
        y[:, :2] = conv(x)[:, :2]
        y[:, :, 3:9] += 1.5
        y[:, :, 0] = 0.25
        y[:, :, -1:, 1:3] = x[:, :, :1, 2:4]
        y.mul_(0.5).add_(x.flip(2).roll(3, 2))
        z = torch.zeros_like(x)
        z[:, :, 1:-1, 1:-1] = y[:, :, 1:-1, 1:-1]
        shifted = torch.cat([x[:, :, 1:], x[:, :, :1]], 2)
        padded = torch.cat([x[:, :, -2:], x, x[:, :, :2]], 2)
        return z + shifted + F.conv2d(padded, x.new_ones(8, 1, 5, 1) / 5, groups=8)

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def frequencies(h: int, w: int) -> Call:
    """A filter in the frequency domain, and a global filter layer."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        y = torch.fft.irfft2(spectrum * 0.5, s=x.shape[-2:])
        z = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
        mask = torch.ones_like(x)
        mask[..., h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1] = 0.2
        z = torch.fft.ifftn(torch.fft.ifftshift(z * mask, dim=(-2, -1)), dim=(-2, -1)).real
        return conv(x + y + z)

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def unforeseen(h: int, w: int) -> Call:
    """Operators without a rule, and operators that need all rows in order."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        return conv(x.cummax(2).values + x.sort(2).values + x.median(2, keepdim=True).values + x.median())

    return around_function(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def mamba_scan(h: int, w: int) -> Call:
    """Tokens in four orders (rows, columns, and both backwards), mixed by a 1-D convolution."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        a = x.flatten(2)
        b = x.transpose(2, 3).flatten(2)
        orders = torch.stack([a, b, a.flip(-1), b.flip(-1)], 1)
        out = conv(orders.flatten(0, 1)).unflatten(0, (x.shape[0], 4))
        back = out[:, 0] + out[:, 2].flip(-1)
        turned = (out[:, 1] + out[:, 3].flip(-1)).reshape(x.shape[0], 8, w, h).transpose(2, 3)
        return back.reshape(x.shape) + turned

    return around_function(f, h, w, conv=nn.Conv1d(8, 8, 5, padding=2, groups=8))


@family(GROUP)
def patches(h: int, w: int) -> Call:
    """A vision transformer between patchify and unpatchify, with pooled queries and averages of tokens."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.out = nn.Conv2d(8, 16, 2, 2), nn.Linear(16, 48), nn.Linear(16, 32)
            self.norm = nn.LayerNorm(16)
            self.latents = nn.Parameter(torch.zeros(1, 4, 16))

        def forward(self, x: Tensor) -> Tensor:
            t = to_tokens(self.embed(x))
            q, k, v = self.qkv(self.norm(t)).chunk(3, -1)
            t = t + F.scaled_dot_product_attention(q, k, v) + t.mean(1, keepdim=True)
            pooled = F.scaled_dot_product_attention(self.latents.expand(2, -1, -1), k, v)
            t = t + F.scaled_dot_product_attention(q, torch.cat([pooled, k], 1), torch.cat([pooled, v], 1))
            y = self.out(t).reshape(2, h // 2, w // 2, 2, 2, 8)
            return torch.einsum("nhwpqc->nchpwq", y).reshape(2, 8, h, w)

    return around(Block(), h, w)
