# SPDX-License-Identifier: Apache-2.0
"""Tokens beside the image's: which are divided, that results stay exact, and when the pass leaves them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.passes import pipelines
from districompile.passes.shard_tokens import ShardTokens
from districompile.plan.plan import Exchange
from districompile.plan.report import Report
from districompile.program import Program
from tests.families.base import error_of

WIDTH = 32


class Block(nn.Module):
    """A block of two streams: modulated by the timestep, one attention, with a mask or without."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.more = nn.Linear(WIDTH, WIDTH), None if last else nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.text(F.layer_norm(text, (WIDTH,)) * (1 + t)).chunk(3, -1)
        b = self.image(F.layer_norm(x, (WIDTH,)) * (1 + t)).chunk(3, -1)
        q, k, v = (torch.cat(pair, 1).unflatten(-1, (2, -1)).transpose(1, 2) for pair in zip(a, b, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        first, second = out[:, : text.shape[1]], out[:, text.shape[1] :]
        return x + self.out(second), text if self.more is None else text + self.more(first)


class Joint(nn.Module):
    """Two streams, then one; ``rope`` multiplies all tokens. The text's own attention, if any, comes first."""

    def __init__(self, *, refined: bool = False, text_out: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.embed_text = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(False), Block(not text_out)])
        self.single, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.refined, self.text_out = refined, text_out

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, rope: Tensor, mask: Tensor | None = None) -> Any:
        t = timestep.reshape(1, 1, 1) * 1e-3
        x, y = self.embed(sample.flatten(2).transpose(1, 2)), self.embed_text(text)
        if self.refined:
            y = y + F.scaled_dot_product_attention(y * (1 + t), y, y)
        for block in self.blocks:
            x, y = block(x, y, t, mask)
        joint = torch.cat([y, x], 1)
        joint = joint + self.single(joint * rope) * t
        x, y = joint[:, text.shape[1] :], joint[:, : text.shape[1]]
        out = self.out(x).transpose(1, 2).reshape(sample.shape)
        return (out, y) if self.text_out else out


def call(tokens: int, h: int = 24, w: int = 4, masked: bool = False, batch: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    n = tokens + h * w
    inputs = {
        "sample": torch.randn(batch, 4, h, w, generator=g),
        "timestep": torch.tensor(400.0),
        "text": torch.randn(batch, tokens, 6, generator=g),
        "rope": torch.randn(n, WIDTH, generator=g),
    }
    if masked:
        inputs["mask"] = torch.rand(batch, 1, 1, n, generator=g) > 0.3
    return inputs


def convert(net: nn.Module, inputs: dict[str, Tensor], ranks: int, **options: Any) -> Program:
    return dc.convert(net.eval(), kwargs=inputs, ranks=ranks, rows={"sample": 2}, **options)


@pytest.mark.parametrize(
    ("tokens", "ranks", "masked"), [(77, 2, False), (77, 8, False), (231, 3, True), (5, 4, False), (512, 4, True)]
)
def test_any_number_of_tokens_is_exact(tokens: int, ranks: int, masked: bool) -> None:
    net, inputs = Joint(text_out=tokens == 231).eval(), call(tokens, masked=masked)
    with torch.no_grad():
        want = net(**inputs)
    program = convert(net, inputs, ranks)
    assert error_of(program.simulate(**inputs), want) <= 1e-5
    found = program.plan.report.tokens
    assert found is not None and found.divided
    assert found.sequences == {"text": tokens}
    assert found.transfers == 0 or tokens > 96  # without the pass, a longer text is gathered in every block
    share = program.report().cut_share()
    assert share is not None and share > 0.995


def test_the_displaced_phase_settles_on_the_same() -> None:
    net, inputs = Joint().eval(), call(13, masked=True)
    with torch.no_grad():
        want = net(**inputs)
    program = convert(net, inputs, 3)
    program.simulate(**{**inputs, "sample": inputs["sample"] * 0.9})
    first = error_of(program.simulate(**inputs, phase="displaced"), want)
    for _ in range(8):
        last = error_of(program.simulate(**inputs, phase="displaced"), want)
    assert last <= 1e-5 < first


def test_keys_of_the_text_ride_with_those_of_the_image() -> None:
    net, inputs = Joint().eval(), call(14)
    plans = [convert(net, inputs, 2, skip=skip).plan for skip in ((), (ShardTokens.name,))]
    with_text, without = ([c for c in p.collectives.values() if c.purpose == "attention"] for p in plans)
    assert len(with_text) == len(without) == 4  # keys and values of two blocks
    for a, b in zip(with_text, without, strict=True):
        assert isinstance(a, Exchange) and isinstance(b, Exchange)
        assert a.sent_bytes(0) - b.sent_bytes(0) == 7 * WIDTH * 4


def test_both_guidance_halves_have_the_text() -> None:
    net, inputs = Joint().eval(), call(9, batch=2)
    program = convert(net, inputs, 4, cfg="split")
    assert program.plan.report.tokens is not None and program.plan.report.tokens.divided
    assert program.plan.ranks == 2


def test_fewer_tokens_than_ranks_stay_on_every_rank() -> None:
    net, inputs = Joint().eval(), call(3)
    with torch.no_grad():
        want = net(**inputs)
    program = convert(net, inputs, 4)
    assert program.plan.report.tokens is None
    assert error_of(program.simulate(**inputs), want) <= 1e-5


def test_own_attention_of_the_text_is_divided_only_if_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = Joint(refined=True).eval(), call(64)
    with torch.no_grad():
        want = net(**inputs)
    program = convert(net, inputs, 2)
    found = program.plan.report.tokens
    assert found is not None and found.divided and found.transfers == 0
    assert "text" not in found.sequences, "each rank takes its tokens behind the text's own attention"
    assert error_of(program.simulate(**inputs), want) <= 1e-5
    monkeypatch.setattr(pipelines, "ShardTokens", functools.partial(ShardTokens, flops_per_transfer=0.0))
    program = convert(net, inputs, 2)
    early = program.plan.report.tokens
    assert (
        early is not None and list(early.sequences) == ["text"] and early.transfers == 1 and early.flops > found.flops
    )
    assert error_of(program.simulate(**inputs), want) <= 1e-5


def test_what_does_not_pay_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "ShardTokens", functools.partial(ShardTokens, flops_per_byte=1e9))
    program = convert(Joint().eval(), call(14), 2)
    found = program.plan.report.tokens
    assert found is not None and not found.divided and found.flops > 0 < found.bytes
    assert "on every rank: text (14)" in str(program.report()).replace("\n", " ")


class Keys(nn.Module):
    """Keys and values of a text beside the image's own, as UNets have them: they are the same at each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(6, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = sample.flatten(2).transpose(1, 2) + timestep * 1e-3
        keys = torch.cat([self.text(text), self.kv(x)], 1)
        return F.scaled_dot_product_attention(x, keys, keys).transpose(1, 2).reshape(sample.shape)


def test_keys_of_the_conditioning_alone_are_kept_and_not_sent() -> None:
    inputs = {"sample": torch.randn(1, WIDTH, 24, 4), "timestep": torch.tensor(4.0), "text": torch.randn(1, 64, 6)}
    program = dc.convert(Keys().eval(), kwargs=inputs, ranks=2, optimise="all")
    assert program.plan.report.tokens is None
    assert program.plan.options.conditioning == ("text",)


def test_a_bundle_shows_what_became_of_the_tokens(tmp_path: Path) -> None:
    convert(Joint().eval(), call(14), 2).save(tmp_path / "b", backend="eager")
    plan = Bundle.open(tmp_path / "b").plan
    assert plan.report.tokens is not None
    assert Report(plan).to_dict()["tokens"]["sequences"] == {"text": 14}
    assert "divided as well: text (14)" in str(Report(plan))
