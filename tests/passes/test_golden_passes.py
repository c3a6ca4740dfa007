"""A golden dump of the graph before and after every pass, and the picture in the pass's docstring against it.

``python -m tests.passes.test_golden_passes`` writes the dumps anew; read the difference before it is committed.

A docstring shows lines of the dump under ``Before:`` and ``After:``. Types and layouts are left out, names of arguments
too, and ``...`` stands for anything. Each line has to be a line of the dump, and they have to come in this order.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import districompile as dc
from districompile.ir.report_builder import QuantisedLayer
from districompile.passes import pipelines

GOLDEN = Path(__file__).parents[1] / "golden" / "passes"


class Dropout(nn.Module):
    """A dropout and a cast to the dtype that the value has."""

    def forward(self, sample: Tensor) -> Tensor:
        return F.silu(F.dropout(sample, 0.1, self.training).to(torch.float32))


class NormOfParts(nn.Module):
    """A group norm that is made of a mean and a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, sample: Tensor) -> Tensor:
        x = sample.view(1, 2, 2, 8, 4)
        mean, var = (f(x, (2, 3, 4), keepdim=True) for f in (torch.mean, torch.var))
        return ((x - mean) * (var + 1e-5).rsqrt()).view(sample.shape) * self.weight.view(1, 4, 1, 1)


class Promotion(nn.Module):
    """Half and single precision are concatenated."""

    def forward(self, half: Tensor, single: Tensor) -> Tensor:
        return torch.cat([half, single], 1)


class Embedding(nn.Module):
    """Two projections of one time embedding, each with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, sample: Tensor, temb: Tensor) -> Tensor:
        a, b = self.first(F.silu(temb)), self.second(F.silu(temb))
        return sample + a[:, :, None, None] * b[:, :, None, None]


class Attention(nn.Module):
    """Self-attention over the pixels, two heads; with ``text``, the values come from the text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, sample: Tensor) -> Tensor:
        tokens = sample.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(-1, (2, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(sample.shape)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(F.silu(sample))  # type: ignore[no-any-return]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, sample: Tensor) -> Tensor:
        return self.norm(sample)  # type: ignore[no-any-return]


class NormAndConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(sample)))  # type: ignore[no-any-return]


class Text(nn.Module):
    """A projection of the text, which stays the same from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 8, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        key, value = self.key(text).chunk(2, -1)
        tokens = (sample + timestep).flatten(2).transpose(1, 2)
        out = F.scaled_dot_product_attention(tokens, key, value)
        return out.transpose(1, 2).reshape(sample.shape)


class Joint(nn.Module):
    """Attention over the tokens of a text and of an image together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tokens = torch.cat([text * timestep, sample.flatten(2).transpose(1, 2)], 1)
        out = F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
        return out[:, text.shape[1] :].transpose(1, 2).reshape(sample.shape)


class Deep(nn.Module):
    """Two resolutions and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 8, 2, 2, bias=False)
        self.up, self.last = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        skip = self.first(sample * timestep)
        up = self.up(F.interpolate(F.silu(self.down(skip)), scale_factor=2.0))
        return self.last(torch.cat([up, skip], 1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A stack of equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * timestep
        for block in self.blocks:
            x = x + block(F.silu(x))
        return x


class Feed(nn.Module):
    """A linear over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 4)

    def forward(self, sample: Tensor) -> Tensor:
        return self.ff(sample.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(sample.shape)  # type: ignore[no-any-return]


IMAGE = {"sample": torch.zeros(1, 4, 8, 4)}
LARGE = {"sample": torch.zeros(1, 4, 16, 8)}


@dataclasses.dataclass(frozen=True)
class Example:
    """A module to convert, its inputs, options of the conversion, and the phase whose graph is dumped."""

    module: nn.Module
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=lambda: IMAGE)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


EXAMPLES = {
    "drop-noops": Example(Dropout()),
    "fuse-norms": Example(NormOfParts()),
    "explicit-casts": Example(Promotion(), {"half": LARGE["sample"].half(), "single": LARGE["sample"]}),
    "cse": Example(Embedding(), {**IMAGE, "temb": torch.zeros(1, 4)}, {"optimise": "cse"}),
    "fuse-parallel-linears": Example(Attention(), options={"optimise": "fuse-parallel-linears"}),
    "quantise": Example(Feed(), options={"quantise": [QuantisedLayer("ff.weight", "ff", None, None, None)]}),
    "propagate-shardings": Example(Conv()),
    "shard-tokens": Example(
        Joint(), {"sample": torch.zeros(1, 32, 8, 4), "timestep": torch.zeros(()), "text": torch.zeros(1, 7, 32)}
    ),
    "partition": Example(Conv()),
    "hoist-fetches": Example(Attention(), options={"optimise": "fuse-parallel-linears,hoist-fetches"}),
    "in-place-gather": Example(Attention(), options={"optimise": "hoist-fetches"}),
    "choose-displaced": Example(Conv()),
    "announce-statistics": Example(Norm()),
    "lower-collectives": Example(Conv()),
    "exchange-before-norm": Example(NormAndConv(), options={"optimise": "exchange-before-norm"}),
    "group-norm-mode": Example(Norm()),
    "cache-conditioning": Example(
        Text(),
        {**IMAGE, "timestep": torch.zeros(()), "text": torch.zeros(1, 3, 4)},
        {"optimise": "cache-conditioning"},
    ),
    "send-differences": Example(Conv(), options={"transfer_bits": 8}),
    "reuse-deep": Example(Deep(), {**IMAGE, "timestep": torch.zeros(())}, {"reuse": "deep=2"}),
    "save-reused": Example(Residual(), {**IMAGE, "timestep": torch.zeros(())}, {"reuse": "deep=2"}),
}


def dumps(name: str, folder: Path) -> tuple[str, str]:
    """The graph before and after a pass.

    What shard-tokens and in-place-gather mark shows in a later graph, with them and without.
    """
    example = EXAMPLES[name]
    if name == "shard-tokens":
        plain, marked = (converted(example, folder / n, skip=skip) for n, skip in (("a", [name]), ("b", [])))
        return plain["partition"], marked["partition"]
    if name == "in-place-gather":
        text = "in-place-gather{share=1000;least=1}"
        plain, marked = (converted(example, folder / n, passes) for n, passes in (("a", []), ("b", [text])))
        return plain["lower-collectives"], marked["lower-collectives"]
    found = converted(example, folder)
    if name == "save-reused":  # of the exact phase
        return found["lower-collectives"], found[name]
    names = list(found)
    return found[names[names.index(name) - 1]], found[name]


def converted(example: Example, folder: Path, passes: Sequence[str] = (), skip: Sequence[str] = ()) -> dict[str, str]:
    """The graph after each pass, by the pass's name; as captured, by "captured"."""
    torch.manual_seed(0)
    captured = dc.capture(example.module.eval(), kwargs=example.inputs)
    dc.convert(captured, ranks=2, dump=folder, passes=passes, skip=skip, **example.options)
    found = {}
    for file in sorted(folder.glob("*.txt")):  # the .diff files beside them follow from these
        _, name = re.fullmatch(r"\d+-(displaced-|reused-|exact-)?(.*)", file.stem).groups()  # type: ignore[union-attr]
        found[name] = file.read_text()
    return found


def golden(name: str, folder: Path) -> str:
    before, after = dumps(name, folder)
    return f"before {name}\n{before}\nafter {name}\n{after}"


def normalised(line: str) -> str:
    """A line without types, layouts, names of arguments and spaces that align."""
    line = re.sub(r" : [a-z0-9]+\[.*$| @ \[.*$|  +#.*$", "", line.strip())
    return re.sub(r"(?<=[(, ])[a-z_]+=", "", re.sub(r"\s+", " ", line))


def picture(name: str) -> Iterator[tuple[str, list[str]]]:
    """The parts of the docstring: (``Before`` or ``After``, lines)."""
    doc = importlib.import_module(pipelines.PASSES[name].__module__).__doc__ or ""
    for part, block in re.findall(r"^(Before|After)[^\n]*:\n\n((?:    .*\n?|\n)+)", doc, re.MULTILINE):
        yield part, [normalised(line) for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("name", sorted(pipelines.PASSES))
def test_dump_before_and_after(name: str, tmp_path: Path) -> None:
    assert golden(name, tmp_path) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", sorted(pipelines.PASSES))
def test_picture_in_the_docstring(name: str) -> None:
    text = (GOLDEN / f"{name}.txt").read_text()
    _, before, after = re.split(rf"^(?:before|after) {name}\n", text, flags=re.MULTILINE)
    parts = list(picture(name))
    assert [part for part, _ in parts] == ["Before", "After"]
    for part, shown in parts:
        lines = iter([normalised(line) for line in (before if part == "Before" else after).splitlines()])
        for wanted in shown:
            pattern = re.escape(wanted).replace(re.escape("..."), ".*")
            assert any(re.fullmatch(pattern, line) for line in lines), f"{part}: {wanted} is not in the dump, in order"


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for known in sorted(pipelines.PASSES):
        with tempfile.TemporaryDirectory() as temporary:
            (GOLDEN / f"{known}.txt").write_text(golden(known, Path(temporary)))
