"""The ways in which networks write attention, each in a small network around one block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families.base import Call, family
from tests.families.blocks import GROUP, around, around_function, to_image, to_tokens


@family(GROUP)
def attention_ldm(h: int, w: int) -> Call:
    """latent-diffusion's first AttnBlock: 1x1 convolutions, bmm over (b, c, hw), scores transposed in between."""

    def f(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Tensor:
        b, c, rows, columns = x.shape
        a, d, e = q(x), k(x), v(x)
        scores = torch.bmm(a.reshape(b, c, -1).permute(0, 2, 1), d.reshape(b, c, -1)) * c**-0.5
        weights = scores.softmax(2).permute(0, 2, 1)
        return x + torch.bmm(e.reshape(b, c, -1), weights).reshape(b, c, rows, columns)

    return around_function(f, h, w, q=nn.Conv2d(8, 8, 1), k=nn.Conv2d(8, 8, 1), v=nn.Conv2d(8, 8, 1))


@family(GROUP)
def attention_transposed(h: int, w: int) -> Call:
    """Scores with keys first, softmax over dim 1."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(x).flatten(2).chunk(3, 1)
        weights = torch.einsum("bcj,bci->bji", k, q).softmax(1)
        return x + torch.einsum("bji,bcj->bci", weights, v).reshape(x.shape)

    return around_function(f, h, w, qkv=nn.Conv2d(8, 24, 1))


@family(GROUP)
def attention_unflattened(h: int, w: int) -> Call:
    """einsum over rows and columns that were never flattened."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(x).chunk(3, 1)
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * 0.3
        weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
        return x + torch.einsum("bhwij,bcij->bchw", weights, v)

    return around_function(f, h, w, qkv=nn.Conv2d(8, 24, 1))


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

    return around(Block(), h, w)


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
            q, k, v = self.qkv(to_tokens(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index.reshape(-1)].reshape(n, n, 2).permute(2, 0, 1)
            weights = ((q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
            return x + to_image((weights @ v).transpose(1, 2).reshape(b, n, 8), x)

    return around(Block(), h, w)


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

    return around(Block(), h, w)


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

    return around_function(f, h, w, qkv=nn.Conv2d(8, 24, 1))


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

    return around(Block(), h, w)


@family(GROUP)
def attention_channels(h: int, w: int) -> Call:
    """Restormer: cross-covariance of channels, L2 norm over pixels."""

    def f(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = (t.reshape(2, 2, 4, -1) for t in qkv(x).chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return x + ((q @ k.transpose(-2, -1)).softmax(-1) @ v).reshape(x.shape)

    return around_function(f, h, w, qkv=nn.Conv2d(8, 24, 1))


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

    return around(Block(), h, w)


@family(GROUP)
def tokens_beside(h: int, w: int) -> Call:
    """Class and text tokens in front, through norms, attention and linears, and removed at the end."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(1, 5, 8))
            self.norm = nn.LayerNorm(8)
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.position = nn.Parameter(torch.zeros(1, 5 + h * w, 8))

        def forward(self, x: Tensor) -> Tensor:
            t = torch.cat([self.tokens.expand(x.shape[0], -1, -1), to_tokens(x)], 1) + self.position
            for _ in range(2):
                q, k, v = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in self.qkv(self.norm(t)).chunk(3, -1))
                t = t + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            pooled = t[:, 0].unsqueeze(1)
            return x + to_image(t[:, 5:] * pooled, x)

    return around(Block(), h, w)


@family(GROUP)
def tokens_mixed(h: int, w: int) -> Call:
    """MLP-Mixer: linears over the tokens themselves."""
    n = h * w

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(n, 32), nn.Linear(32, n)

        def forward(self, x: Tensor) -> Tensor:
            t = self.norm(to_tokens(x)).transpose(1, 2)
            return x + self.b(F.gelu(self.a(t))).reshape(x.shape)

    return around(Block(), h, w)


@family(GROUP)
def attention_merged(h: int, w: int) -> Call:
    """Token merging: a third of the tokens joins the most similar others before attention, and is restored after it."""

    def f(x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module) -> Tensor:
        _, channels, rows, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        count = rows * columns
        goals = torch.arange(count) % 3 == 0
        order = goals.int().argsort(stable=True)
        a_index, b_index = order[: count - int(goals.sum())], order[count - int(goals.sum()) :]
        a, b = tokens[:, a_index], tokens[:, b_index]
        likeness, partner = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).max(-1)
        ranked = likeness.argsort(dim=-1, descending=True)[..., None]
        merged = count // 3
        source, kept = ranked[:, :merged], ranked[:, merged:]
        target = partner[..., None].gather(1, source)
        sources = a.gather(1, source.expand(-1, -1, channels))
        b = b.scatter_reduce(1, target.expand(-1, -1, channels), sources, "mean")
        y = torch.cat([a.gather(1, kept.expand(-1, -1, channels)), b], 1)
        y = F.scaled_dot_product_attention(to_q(y)[:, None], to_k(y)[:, None], to_v(y)[:, None])[:, 0]
        unmerged, b = y[:, : kept.shape[1]], y[:, kept.shape[1] :]
        a = torch.zeros_like(a).scatter(1, kept.expand(-1, -1, channels), unmerged)
        a = a.scatter(1, source.expand(-1, -1, channels), b.gather(1, target.expand(-1, -1, channels)))
        restored = torch.zeros_like(tokens).index_copy(1, a_index, a).index_copy(1, b_index, b)
        return x + restored.transpose(1, 2).reshape(x.shape)

    layers = {name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v")}
    return around_function(f, h, w, **layers)
