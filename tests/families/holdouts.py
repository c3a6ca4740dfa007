"""Networks written to find gaps in the rules. Each once gave a wrong result, a crash, or work that was not divided."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.base import Call, family, randn, randomise
from tests.families.blocks import around, around_function, to_image, to_tokens

GROUP = "hold-outs"


def _conv(i: int = 8, o: int = 8, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2)


@family(GROUP)
def haar_resampling(h: int, w: int) -> Call:
    """Wavelets by slices with step 2, and back by writes into every other row."""

    def f(x: Tensor, inner: nn.Module) -> Tensor:
        a, b, c, d = x[:, :, ::2, ::2], x[:, :, 1::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, 1::2]
        p, q, r = inner(torch.cat([a + b + c + d, a - b + c - d, a + b - c - d], 1)).chunk(3, 1)
        out = torch.zeros_like(x)
        out[:, :, ::2, ::2], out[:, :, 1::2, ::2] = p + q + r, p - q + r
        out[:, :, ::2, 1::2], out[:, :, 1::2, 1::2] = p + q - r, p - q - r
        return out

    return around_function(f, h, w, inner=_conv(24, 24))


@family(GROUP)
def spectral_block(h: int, w: int) -> Call:
    """A Fourier neural operator: low frequencies weighted, written into complex zeros."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = (nn.Parameter(torch.zeros(8, 8, 4, 3, 2)) for _ in range(2))
            self.side = _conv(k=1)

        def forward(self, x: Tensor) -> Tensor:
            waves = torch.fft.rfft2(x)
            out = torch.zeros_like(waves)
            for rows, weight in ((slice(0, 4), self.low), (slice(-4, None), self.high)):
                out[:, :, rows, :3] = torch.einsum(
                    "bixy,ioxy->boxy", waves[:, :, rows, :3], torch.view_as_complex(weight)
                )
            return F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.side(x))

    return around(Block(), h, w)


@family(GROUP)
def warped(h: int, w: int) -> Call:
    """A flow field, and an affine map from pooled features."""

    def f(x: Tensor, flow: nn.Module, affine: nn.Module) -> Tensor:
        y, z = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        moved = torch.stack([z, y], -1) + 0.2 * flow(x).tanh().permute(0, 2, 3, 1)
        x = x + F.grid_sample(x, moved, padding_mode="border", align_corners=True)
        theta = affine(x.mean((2, 3))).reshape(-1, 2, 3) * 0.1 + torch.eye(2, 3)
        return x + F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    return around_function(f, h, w, flow=_conv(8, 2), affine=nn.Linear(8, 6))


@family(GROUP)
def attention_causal(h: int, w: int) -> Call:
    """Pixels in raster order, each attends to those before it; and a table of distances."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv(to_tokens(x)).chunk(3, -1))
        place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2).float()
        away = -torch.cdist(place, place, p=1)[None] * torch.tensor([0.5, 0.25])[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out + F.scaled_dot_product_attention(q, k, v, attn_mask=away)
        return x + to_image(out.transpose(1, 2).flatten(2), x)

    return around_function(f, h, w, qkv=nn.Linear(8, 24))


@family(GROUP)
def attention_of_channels(h: int, w: int) -> Call:
    """Channels attend to channels through the fused operator: the pixels are its features."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = (t.reshape(x.shape[0], 2, 4, -1) for t in qkv(x).chunk(3, 1))
        return x + F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v).reshape(x.shape)

    return around_function(f, h, w, qkv=_conv(8, 24, 1))


@family(GROUP, sizes=((40, 8), (64, 8)))
def windows_of_tokens(h: int, w: int) -> Call:
    """Tokens viewed as windows and as a strided grid: rows that no rank's border divides."""

    def attend(t: Tensor, qkv: nn.Module) -> Tensor:
        return t + F.scaled_dot_product_attention(*qkv(t).chunk(3, -1))

    def f(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        n, c = x.shape[0], x.shape[1]
        t = to_tokens(x).view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        t = attend(t, a).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        g = t.reshape(n, 4, h // 4, 4, w // 4, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, c)
        g = attend(g, b).reshape(n, h // 4, w // 4, 4, 4, c).permute(0, 3, 1, 4, 2, 5).reshape(n, h, w, c)
        return g.permute(0, 3, 1, 2)

    return around_function(f, h, w, a=nn.Linear(8, 24), b=nn.Linear(8, 24))


@family(GROUP)
def attention_landmarks(h: int, w: int) -> Call:
    """Nystrom: keys and queries averaged over runs of tokens."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(to_tokens(x)).chunk(3, -1)
        few = [t.reshape(x.shape[0], h // 2, -1, 8).mean(2) for t in (q, k)]
        near, far = (q @ few[1].mT).softmax(-1), (few[0] @ k.mT).softmax(-1)
        return x + to_image(near @ ((few[0] @ few[1].mT).softmax(-1) @ (far @ v)), x)

    return around_function(f, h, w, qkv=nn.Linear(8, 24))


@family(GROUP)
def scans(h: int, w: int) -> Call:
    """Box means by an integral image; a gated recurrence over all pixels in log space."""

    def f(x: Tensor, gate: nn.Module) -> Tensor:
        sums = F.pad(x.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        box = (sums[:, :, :-5, :-3] + sums[:, :, 5:, 3:] - sums[:, :, :-5, 3:] - sums[:, :, 5:, :-3]) / 15
        x = x + F.pad(box, (1, 1, 2, 2), mode="replicate")
        g, v = gate(to_tokens(x)).chunk(2, -1)
        kept = torch.cumsum(-F.softplus(g), 1)
        state = torch.logcumsumexp(-F.softplus(-g) + F.softplus(v).log() - kept, 1) + kept
        return x + to_image(state.exp(), x)

    return around_function(f, h, w, gate=nn.Linear(8, 16))


@family(GROUP)
def peaks(h: int, w: int) -> Call:
    """Maxima over rows, with their indices, and over windows; a mask of the strongest channels."""

    def f(x: Tensor, gate: nn.Module, join: nn.Module) -> Tensor:
        both = gate(F.adaptive_max_pool2d(x, 1)) + gate(F.adaptive_avg_pool2d(x, 1))
        flat = x.mean(1).flatten(1)
        top, low = flat.max(1, keepdim=True)[0], flat.min(1, keepdim=True)[0]
        x = x * both.sigmoid() * ((flat - low) / (top - low)).reshape(-1, 1, h, w)
        near = F.interpolate(F.adaptive_max_pool2d(x, (7, 5)), size=(h, w))
        place = F.one_hot(x.argmax(2), h).to(x.dtype).permute(0, 1, 3, 2)
        strong = torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, 1.0)
        return join(torch.cat([x + near, place, strong], 1))

    return around_function(f, h, w, gate=_conv(k=1), join=_conv(24, 8))


@family(GROUP)
def statistics_of_all(h: int, w: int) -> Call:
    """Layer and RMS norms over rows and channels, statistics of the batch, moments by the older calls."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.rms = nn.LayerNorm([8, h, w]), nn.RMSNorm([h, w])
            self.batch = nn.BatchNorm2d(8, track_running_stats=False)
            self.conv = _conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.all(x) + self.rms(x)) + self.batch(x)
            spread, mean = torch.var_mean(y.view(x.shape[0], 2, -1), -1, keepdim=True, unbiased=False)
            y = ((y.view(x.shape[0], 2, -1) - mean) * (spread + 1e-5).rsqrt()).view(x.shape)
            return (y - y.mean()) / y.std()

    return around(Block(), h, w)


@family(GROUP)
def composites(h: int, w: int) -> Call:
    """Composite operators without a rule of their own."""

    def f(x: Tensor, weight: nn.Linear, join: nn.Module) -> Tensor:
        t = torch.addmm(weight.bias, x.permute(0, 2, 3, 1).reshape(-1, 8), weight.weight.t())
        y = t.reshape(x.shape[0], h, w, 8).permute(0, 3, 1, 2)
        z = torch.tensordot(y, weight.weight, dims=([1], [0])).movedim(-1, 1)
        alike = F.cosine_similarity(y, z, dim=1).unsqueeze(1)
        steps = torch.diff(y, dim=2, prepend=y[:, :, :1])
        return join(torch.hstack([y * alike, F.channel_shuffle(z, 2), torch.rot90(steps, 2, (2, 3))]))

    return around_function(f, h, w, weight=nn.Linear(8, 8), join=_conv(24, 8))


@family(GROUP)
def without_batch(h: int, w: int) -> Call:
    """An image of three dims, as a sampler for single images passes it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.norm = _conv(3, 8), _conv(8, 3), nn.GroupNorm(2, 8)
            self.up = nn.ConvTranspose2d(8, 8, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x)[None])[0].relu()
            out: Tensor = self.last(self.up(F.max_pool2d(y, 2)) + y)
            return out

    return Call(randomise(Net()), {"x": randn(3, h, w)}, {"x": 1})


@family(GROUP, sizes=((26, 6), (16, 6)))
def volume_last_dim(h: int, w: int) -> Call:
    """The last dim of a volume is sharded. At one level it is as long as the channels, which PReLU has slopes for."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(16, 1, 3, padding=1)
            self.down, self.slopes, self.norm = nn.Conv3d(8, 8, 3, 2, 1), nn.PReLU(8), nn.InstanceNorm3d(8, affine=True)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x)
            y = self.slopes(self.norm(self.down(a)))
            y = F.interpolate(y, size=a.shape[2:], mode="trilinear", align_corners=True)
            out: Tensor = self.last(torch.cat([a, y], 1))
            return out

    return Call(randomise(Net()), {"x": randn(1, 1, 5, w, h)}, {"x": 4})


@dataclasses.dataclass
class _Denoised:
    sample: Tensor
    features: Any = None


@family(GROUP)
def many_inputs(h: int, w: int) -> Call:
    """Maps of four sizes in dicts and lists, and a dataclass in a dict that comes back."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.down, self.up = _conv(7, 8), nn.Conv2d(8, 8, 3, 2, 1), _conv(16, 3)
            self.hint = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Conv2d(4, 8, 3, 2, 1))

        def forward(self, noisy: Tensor, given: dict[str, Tensor], residuals: list[Tensor]) -> dict[str, Any]:
            low = F.interpolate(given["low"], size=noisy.shape[-2:], mode="bicubic", align_corners=False)
            mask = given["mask"]
            a = self.first(torch.cat([noisy * mask + (1 - mask) * low, low, mask], 1)) + residuals[0]
            y = F.silu(self.down(a) + self.hint(given["hint"]) + residuals[1])
            out = self.up(torch.cat([F.interpolate(y, scale_factor=2), a], 1))
            return {"denoised": _Denoised(out, (y, None)), "kept": (noisy - out).clamp(-1, 1) * mask}

    given = {
        "low": randn(2, 3, h // 4, w // 4),
        "mask": (randn(2, 1, h, w) > 0).float(),
        "hint": randn(2, 3, 2 * h, 2 * w),
    }
    inputs = {"noisy": randn(2, 3, h, w), "given": given, "residuals": [randn(2, 8, h, w), randn(2, 8, h // 2, w // 2)]}
    return Call(randomise(Net()), inputs)
