"""Networks written here, for constructs that the packages leave out: attention by hand, filters, windows, tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.base import Call, family, randn, randomise

GROUP = "constructs"


class _Net(nn.Module):
    """A convolution, a middle that is under test, and a convolution, around a skip."""

    def __init__(self, middle: nn.Module, width: int = 8, last: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(last or width, 3, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(sample)))
        return out


def _call(middle: nn.Module, h: int, w: int, width: int = 8, last: int | None = None) -> Call:
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


def _middle(function: Any, h: int, w: int, width: int = 8, last: int | None = None, **modules: nn.Module) -> Call:
    return _call(_Function(function, **modules), h, w, width, last)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _image(t: Tensor, like: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(like.shape)


@family(GROUP)
def attention_ldm(h: int, w: int) -> Call:
    """latent-diffusion's first AttnBlock: 1x1 convolutions, bmm over (b, c, hw), scores transposed in between."""

    def f(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Tensor:
        b, c, rows, columns = x.shape
        a, d, e = q(x), k(x), v(x)
        scores = torch.bmm(a.reshape(b, c, -1).permute(0, 2, 1), d.reshape(b, c, -1)) * c**-0.5
        weights = scores.softmax(2).permute(0, 2, 1)
        return x + torch.bmm(e.reshape(b, c, -1), weights).reshape(b, c, rows, columns)

    return _middle(f, h, w, q=nn.Conv2d(8, 8, 1), k=nn.Conv2d(8, 8, 1), v=nn.Conv2d(8, 8, 1))


@family(GROUP)
def attention_transposed(h: int, w: int) -> Call:
    """Scores with keys first, softmax over dim 1."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(x).flatten(2).chunk(3, 1)
        weights = torch.einsum("bcj,bci->bji", k, q).softmax(1)
        return x + torch.einsum("bji,bcj->bci", weights, v).reshape(x.shape)

    return _middle(f, h, w, qkv=nn.Conv2d(8, 24, 1))


@family(GROUP)
def attention_unflattened(h: int, w: int) -> Call:
    """einsum over rows and columns that were never flattened."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(x).chunk(3, 1)
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * 0.3
        weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
        return x + torch.einsum("bhwij,bcij->bchw", weights, v)

    return _middle(f, h, w, qkv=nn.Conv2d(8, 24, 1))


@family(GROUP)
def attention_module(h: int, w: int) -> Call:
    """nn.MultiheadAttention over tokens, sequence first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            t = self.norm(x.flatten(2).permute(2, 0, 1))
            return x + self.attention(t, t, t, need_weights=False)[0].permute(1, 2, 0).reshape(x.shape)

    return _call(Block(), h, w)


@family(GROUP)
def attention_relative(h: int, w: int) -> Call:
    """A table of relative positions, indexed in the graph, added to the scores."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), 2))
            self.qkv = nn.Linear(8, 24)
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            at = torch.stack([y.flatten(), x.flatten()])
            apart = at[:, :, None] - at[:, None]
            self.register_buffer("index", (apart[0] + h - 1) * (2 * w - 1) + apart[1] + w - 1)

        def forward(self, x: Tensor) -> Tensor:
            b, n = x.shape[0], h * w
            q, k, v = self.qkv(_tokens(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index.reshape(-1)].reshape(n, n, 2).permute(2, 0, 1)
            weights = ((q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
            return x + _image((weights @ v).transpose(1, 2).reshape(b, n, 8), x)

    return _call(Block(), h, w)


@family(GROUP)
def attention_windows(h: int, w: int) -> Call:
    """Swin: a roll by half a window, windows, a mask written by slices, and back."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)
            mask = torch.zeros(1, h, w, 1)
            count = 0
            for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                for columns in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                    mask[:, rows, columns] = count
                    count += 1
            windows = self.windows(mask).reshape(-1, 16)
            apart = windows[:, None] - windows[:, :, None]
            self.register_buffer("mask", apart.masked_fill(apart != 0, -100.0))

        def windows(self, x: Tensor) -> Tensor:
            b, rows, columns, c = x.shape
            return x.view(b, rows // 4, 4, columns // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.permute(0, 2, 3, 1))
            t = self.windows(torch.roll(y, (-2, -2), (1, 2)))
            b, n, c = t.shape
            q, k, v = self.qkv(t).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1) * 0.5
            count = self.mask.shape[0]
            scores = scores.view(b // count, count, 2, n, n) + self.mask[None, :, None]
            t = (scores.view(-1, 2, n, n).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
            t = t.view(-1, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
            return x + torch.roll(t, (2, 2), (1, 2)).permute(0, 3, 1, 2)

    return _call(Block(), h, w)


@family(GROUP)
def attention_neighbourhood(h: int, w: int) -> Call:
    """Each pixel attends to the 3x3 around it: unfold."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        b, c, rows, columns = x.shape
        q, k, v = qkv(x).chunk(3, 1)
        k = F.unfold(k, 3, padding=1).reshape(b, c, 9, rows, columns)
        v = F.pad(v, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)
        weights = (q.unsqueeze(2) * k).sum(1).softmax(1)
        return x + torch.einsum("bnhw,bchwn->bchw", weights, v)

    return _middle(f, h, w, qkv=nn.Conv2d(8, 24, 1))


@family(GROUP)
def attention_axial(h: int, w: int) -> Call:
    """Along rows, then along columns."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = nn.Linear(8, 24), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            for layer, order in ((self.rows, (0, 2, 3, 1)), (self.columns, (0, 3, 2, 1))):
                t = x.permute(order)
                q, k, v = layer(t).chunk(3, -1)
                t = t + F.scaled_dot_product_attention(q, k, v)
                x = t.permute(0, 3, 1, 2) if order[1] == 2 else t.permute(0, 3, 2, 1)
            return x

    return _call(Block(), h, w)


@family(GROUP)
def attention_channels(h: int, w: int) -> Call:
    """Restormer: cross-covariance of channels, L2 norm over pixels."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = (t.reshape(2, 2, 4, -1) for t in qkv(x).chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return x + ((q @ k.transpose(-2, -1)).softmax(-1) @ v).reshape(x.shape)

    return _middle(f, h, w, qkv=nn.Conv2d(8, 24, 1))


@family(GROUP)
def attention_linear(h: int, w: int) -> Call:
    """Softmax over tokens for keys, over channels for queries; memory keys in front; a row of ones gives the sum."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.memory = nn.Conv2d(8, 24, 1), nn.Parameter(torch.zeros(2, 2, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.reshape(2, 2, 4, -1) for t in self.qkv(x).chunk(3, 1))
            k = torch.cat([self.memory[0].expand(2, -1, -1, -1), k], -1).softmax(-1)
            v = torch.cat([self.memory[1].expand(2, -1, -1, -1), v], -1)
            v = F.pad(v, (0, 0, 0, 1), value=1.0)
            out = torch.einsum("bhdn,bhen->bhde", k, v)
            out = torch.einsum("bhde,bhdn->bhen", out, q.softmax(-2))
            return x + (out[:, :, :-1] / (out[:, :, -1:] + 1e-6)).reshape(x.shape)

    return _call(Block(), h, w)


@family(GROUP)
def tokens_beside(h: int, w: int) -> Call:
    """Class and text tokens in front, through norms, attention and linears, and cut off at the end."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(1, 5, 8))
            self.norm = nn.LayerNorm(8)
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.position = nn.Parameter(torch.zeros(1, 5 + h * w, 8))

        def forward(self, x: Tensor) -> Tensor:
            t = torch.cat([self.tokens.expand(x.shape[0], -1, -1), _tokens(x)], 1) + self.position
            for _ in range(2):
                q, k, v = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in self.qkv(self.norm(t)).chunk(3, -1))
                t = t + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            pooled = t[:, 0].unsqueeze(1)
            return x + _image(t[:, 5:] * pooled, x)

    return _call(Block(), h, w)


@family(GROUP)
def tokens_mixed(h: int, w: int) -> Call:
    """MLP-Mixer: linears over the tokens themselves."""
    n = h * w

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(n, 32), nn.Linear(32, n)

        def forward(self, x: Tensor) -> Tensor:
            t = self.norm(_tokens(x)).transpose(1, 2)
            return x + self.b(F.gelu(self.a(t))).reshape(x.shape)

    return _call(Block(), h, w)


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
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(line, line)[None, None]
        return down(conv(up(x, kernel * 4)), kernel)

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def filters_depthwise(h: int, w: int) -> Call:
    """Filters assembled in the graph by new_zeros and index_put, reflected borders, a transposed convolution."""

    def kernel(x: Tensor) -> Tensor:
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        out = x.new_zeros(8, 8, 4, 4)
        index = torch.arange(8)
        out[index, index] = torch.outer(line, line)
        return out

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel(x), stride=2)
        y = conv(y)
        return x + F.conv_transpose2d(F.pad(y, (1, 1, 1, 1), "reflect"), kernel(x) * 4, stride=2, padding=3)

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def convolutions(h: int, w: int) -> Call:
    """Grouped, depthwise, dilated, large, asymmetric, transposed, growing and shrinking again."""
    return _call(
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
    """By fractions, with and without aligned corners, antialiased, and back by explicit sizes."""

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

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


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

    return _middle(
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

    call = _call(Block(), h, w)
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
            x = x + self.table[:, :, 2 : 2 + h, 2 : 2 + w] + self.rows(torch.arange(h)).t()[None, :, :, None]
            y, z = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
            grid = torch.stack([y, z])[None].expand(x.shape[0], -1, -1, -1)
            x = self.coordinates(torch.cat([x, grid], 1))
            q, k, v = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in self.qkv(_tokens(x)).chunk(3, -1))
            angle = torch.outer(torch.arange(h * w).float(), 10 ** -torch.arange(2).float()).repeat_interleave(2, -1)

            def rotate(t: Tensor) -> Tensor:
                a, b = t.unflatten(-1, (2, 2)).unbind(-1)
                return t * angle.cos() + torch.stack([-b, a], -1).flatten(-2) * angle.sin()

            t = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
            return x + _image(t.transpose(1, 2).flatten(2), x)

    return _call(Block(), h, w)


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
        return z + shifted + F.conv2d(padded, torch.ones(8, 1, 5, 1) / 5, groups=8)

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


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

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


@family(GROUP)
def unforeseen(h: int, w: int) -> Call:
    """Operators that no rule knows, and what has to see all rows in order."""

    def f(x: Tensor, conv: nn.Module) -> Tensor:
        return conv(x.cummax(2).values + x.sort(2).values + x.median(2, keepdim=True).values + x.median())

    return _middle(f, h, w, conv=nn.Conv2d(8, 8, 3, padding=1))


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

    return _middle(f, h, w, conv=nn.Conv1d(8, 8, 5, padding=2, groups=8))


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
            t = _tokens(self.embed(x))
            q, k, v = self.qkv(self.norm(t)).chunk(3, -1)
            t = t + F.scaled_dot_product_attention(q, k, v) + t.mean(1, keepdim=True)
            pooled = F.scaled_dot_product_attention(self.latents.expand(2, -1, -1), k, v)
            t = t + F.scaled_dot_product_attention(q, torch.cat([pooled, k], 1), torch.cat([pooled, v], 1))
            y = self.out(t).reshape(2, h // 2, w // 2, 2, 2, 8)
            return torch.einsum("nhwpqc->nchpwq", y).reshape(2, 8, h, w)

    return _call(Block(), h, w)
