"""A small bundle as JSON, and all ways to change one of its values."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.bundle.manifest import MANIFEST, manifest_text

TRIPWIRE = "tripwire_of_a_bundle"
Place = tuple[str | int, ...]


class Net(nn.Module):
    """A convolution, a group norm and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.query = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.norm(self.first(sample) + timestep.reshape(-1, 1, 1, 1) * scale)
        tokens = x.flatten(2).transpose(1, 2)
        q, kv = self.query(tokens)[:, None], tokens[:, None]
        attended = nn.functional.scaled_dot_product_attention(q, kv, kv)[:, 0]
        return {"sample": self.last(x + attended.transpose(1, 2).reshape(x.shape))}


def make(folder: Path, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Write the bundle of a :class:`Net` for two ranks, of unequal height, to ``folder``."""
    torch.manual_seed(0)
    net, args = Net().eval(), (torch.randn(1, 4, 7, 5), torch.tensor([3.0]))
    dc.convert(net, args, ranks=2, **options).save(folder, backend="eager", source="no.such.package:factory")
    return net, args


def places(x: Any, at: Place = ()) -> Iterator[Place]:
    """Yield the place of every value inside a JSON value, containers included."""
    if at:
        yield at
    for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(value, (*at, key))


def value_at(x: Any, place: Place) -> Any:
    for key in place:
        x = x[key]
    return x


WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 62, 10**30, 0.5, -2.0, 1e300, math.nan, math.inf, "", "x", "é",
    "os:abort", "os.abort", f"{TRIPWIRE}:Record", TRIPWIRE, "/etc/passwd", "../../../etc/passwd", "plan.json",
    "float16", "displaced", [], {}, [0], [[]], [None], {"": 0}, {"@": "Run", "segment": "warmup0"}, {"@dtype": "int64"},
    {"kind": "object", "class": "os:abort", "items": []},
    {"kind": "object", "class": f"{TRIPWIRE}:Record", "items": [["a", {"kind": "leaf", "index": 0}]]},
)  # fmt: skip


def change(x: Any, place: Place, how: str, other: Any) -> Any:
    """Copy ``x`` and change the value at ``place``. ``other`` is a new value, or the place of one."""
    x = copy.deepcopy(x)
    *above, key = place
    parent = value_at(x, tuple(above))
    value = parent[key]
    if how == "replace":
        parent[key] = other
    elif how == "copy":
        parent[key] = copy.deepcopy(value_at(x, other))
    elif how == "swap":
        parent[key] = copy.deepcopy(value_at(x, other))
        value_at(x, other[:-1])[other[-1]] = value
    elif how == "delete":
        del parent[key]
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(int(key), copy.deepcopy(value))
    elif how == "repeat":
        parent[f"{key}2"] = copy.deepcopy(value)
    elif how == "rename" and isinstance(parent, dict):
        parent[other if isinstance(other, str) else str(other)] = parent.pop(key)
    elif how == "step" and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = value + (1 if other is None else -1)
    elif how == "reverse" and isinstance(value, list):
        value.reverse()
    elif how == "add" and isinstance(value, list):
        value.append(other)
    elif how == "add" and isinstance(value, dict):
        value["added"] = other
    return x


def store(folder: Path, plan: Any, manifest: Any) -> None:
    """Write plan and manifest to ``folder``, with the right hashes."""
    text = json.dumps(plan)
    (folder / "plan.json").write_text(text)
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and "plan.json" in manifest["files"]:
        entry = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        manifest = {**manifest, "files": {**manifest["files"], "plan.json": entry}}
    (folder / MANIFEST).write_text(manifest_text(manifest) if isinstance(manifest, dict) else json.dumps(manifest))


def set_tripwire(folder: Path) -> Path:
    """Write a module to ``folder`` whose import creates a file; return the path of that file."""
    fired = folder / "fired"
    source = f"import dataclasses, pathlib\npathlib.Path({str(fired)!r}).touch()\n"
    source += "@dataclasses.dataclass\nclass Record:\n    a: object\n"
    (folder / f"{TRIPWIRE}.py").write_text(source)
    return fired
