# SPDX-License-Identifier: Apache-2.0
"""Scenes of the demo model: a small grammar of captions, which ``scene_pictures.py`` draws.

A caption names one or two coloured shapes, how they stand to each other, and a
setting (a place, a time, both or neither)::

    a red circle
    a small green triangle left of a large yellow star at night on snow
    an orange heart above a blue square at sea at sunset
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.88, 0.12, 0.14),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.86, 0.12),
    "green": (0.12, 0.66, 0.22),
    "cyan": (0.10, 0.82, 0.86),
    "blue": (0.12, 0.26, 0.86),
    "purple": (0.50, 0.16, 0.74),
    "pink": (1.00, 0.52, 0.74),
    "white": (0.97, 0.97, 0.97),
    "black": (0.07, 0.07, 0.08),
}

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "ring",
    "diamond",
    "cross",
    "moon",
    "hexagon",
    "flower",
    "drop",
)

SIZES: dict[str, float] = {"small": 0.085, "": 0.13, "large": 0.185}
"""Radius of a shape in a pair, as a share of the picture's side."""

SINGLE_SCALE = 1.35
"""A shape that stands alone may be larger."""

RELATIONS: dict[str, tuple[int, int]] = {
    "above": (0, 1),
    "below": (0, -1),
    "left of": (1, 0),
    "right of": (-1, 0),
}
"""Direction from the first shape to the second, y pointing down."""


@dataclass(frozen=True)
class Time:
    """The light of a scene."""

    phrase: str
    top: Colour
    middle: Colour
    low: Colour
    tint: Colour
    haze: float = 0.0
    stars: float = 0.0
    sun: Colour = (1.0, 1.0, 1.0)
    sun_glow: float = 0.0
    sun_disc: float = 0.0
    ground: bool = True


@dataclass(frozen=True)
class Ridge:
    """One layer of land or water: a wavy upper edge and a vertical gradient."""

    top: Colour
    bottom: Colour
    base: float
    wave: float = 0.0
    frequency: float = 1.0
    teeth: float = 0.0
    snowcap: float = 0.0
    water: float = 0.0


NO_RIDGE = Ridge((0, 0, 0), (0, 0, 0), base=2.0)

TIMES: dict[str, Time] = {
    "day": Time(
        "",
        top=(0.24, 0.53, 0.92),
        middle=(0.50, 0.74, 0.97),
        low=(0.84, 0.94, 0.99),
        tint=(1.0, 1.0, 1.0),
    ),
    "dawn": Time(
        "at dawn",
        top=(0.46, 0.58, 0.88),
        middle=(0.86, 0.74, 0.86),
        low=(1.0, 0.84, 0.74),
        tint=(0.92, 0.80, 0.86),
        haze=0.15,
        sun=(1.0, 0.95, 0.82),
        sun_glow=0.7,
    ),
    "sunset": Time(
        "at sunset",
        top=(0.25, 0.15, 0.42),
        middle=(0.80, 0.28, 0.38),
        low=(1.0, 0.60, 0.22),
        tint=(0.74, 0.46, 0.44),
        haze=0.08,
        sun=(1.0, 0.86, 0.42),
        sun_glow=0.75,
        sun_disc=0.075,
    ),
    "night": Time(
        "at night",
        top=(0.02, 0.03, 0.11),
        middle=(0.05, 0.08, 0.23),
        low=(0.12, 0.17, 0.38),
        tint=(0.25, 0.30, 0.50),
        stars=1.0,
    ),
    "fog": Time(
        "in fog",
        top=(0.66, 0.70, 0.74),
        middle=(0.76, 0.79, 0.82),
        low=(0.86, 0.88, 0.89),
        tint=(0.88, 0.90, 0.92),
        haze=0.62,
    ),
    "space": Time(
        "in space",
        top=(0.03, 0.02, 0.10),
        middle=(0.16, 0.05, 0.28),
        low=(0.03, 0.08, 0.24),
        tint=(1.0, 1.0, 1.0),
        stars=1.0,
        ground=False,
    ),
}

PLACES: dict[str, tuple[str, Ridge, Ridge]] = {
    "nowhere": (
        "",
        Ridge((0.42, 0.52, 0.50), (0.30, 0.40, 0.40), 0.88, wave=0.015),
        NO_RIDGE,
    ),
    "sea": (
        "at sea",
        Ridge((0.26, 0.58, 0.76), (0.03, 0.22, 0.46), 0.66, water=1.0),
        NO_RIDGE,
    ),
    "snow": (
        "on snow",
        Ridge((0.84, 0.89, 0.97), (0.74, 0.82, 0.93), 0.68, wave=0.03),
        Ridge((0.97, 0.98, 1.0), (0.86, 0.91, 0.98), 0.80, wave=0.03),
    ),
    "desert": (
        "in the desert",
        Ridge((0.93, 0.74, 0.46), (0.80, 0.58, 0.33), 0.66, wave=0.035),
        Ridge((0.97, 0.80, 0.50), (0.74, 0.50, 0.28), 0.79, wave=0.04),
    ),
    "mountains": (
        "in the mountains",
        Ridge((0.42, 0.48, 0.60), (0.56, 0.62, 0.70), 0.62, 0.02, 1.3, 0.13, snowcap=1.0),
        Ridge((0.26, 0.42, 0.34), (0.12, 0.24, 0.20), 0.80, wave=0.03),
    ),
    "meadow": (
        "in a meadow",
        Ridge((0.52, 0.75, 0.36), (0.36, 0.62, 0.28), 0.68, wave=0.03),
        Ridge((0.40, 0.70, 0.24), (0.14, 0.42, 0.14), 0.80, wave=0.035),
    ),
    "forest": (
        "in a forest",
        Ridge((0.22, 0.45, 0.33), (0.18, 0.38, 0.28), 0.68, 0.015, 1.0, 0.05),
        Ridge((0.10, 0.30, 0.19), (0.05, 0.17, 0.11), 0.82, 0.015, 1.2, 0.07),
    ),
}

TEETH_FREQUENCY: dict[str, tuple[float, float]] = {
    "mountains": (2.2, 1.0),
    "forest": (9.0, 6.0),
}
"""Peaks across the picture, for the places whose ridges have teeth."""


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""

    shape: str
    colour: str
    size: str = ""

    def phrase(self) -> str:
        words = " ".join(w for w in (self.size, self.colour, self.shape) if w)
        return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Scene:
    """The content of a caption. Exact positions are drawn at random later."""

    items: tuple[Item, ...]
    relation: str = ""
    time: str = "day"
    place: str = "nowhere"
    time_first: bool = False

    def caption(self) -> str:
        parts = [self.items[0].phrase()]
        if len(self.items) == 2:
            parts += [self.relation, self.items[1].phrase()]
        setting = [PLACES[self.place][0], TIMES[self.time].phrase]
        parts += reversed(setting) if self.time_first else setting
        return " ".join(p for p in parts if p)


def random_item(rng: random.Random) -> Item:
    size = rng.choice(("small", "", "", "large"))
    return Item(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), size)


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene at random. Three of four have two shapes, which are harder to learn."""
    first = random_item(rng)
    time = rng.choice(tuple(TIMES))
    place = rng.choice(tuple(PLACES)) if TIMES[time].ground else "nowhere"
    time_first = rng.random() < 0.5
    if rng.random() < 0.25:
        return Scene((first,), "", time, place, time_first)
    second = random_item(rng)
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = random_item(rng)
    return Scene((first, second), rng.choice(tuple(RELATIONS)), time, place, time_first)


def _either(words: Sequence[str]) -> str:
    return "|".join(re.escape(w) for w in words if w)


_ITEM = re.compile(rf"^an? (?:({_either(tuple(SIZES))}) )?({_either(tuple(COLOURS))}) ({_either(SHAPES)})")
_RELATION = re.compile(rf"^ ({_either(tuple(RELATIONS))}) ")


def _parse_item(text: str) -> tuple[Item, str]:
    found = _ITEM.match(text)
    if found is None:
        raise ValueError(f"no shape of the grammar at {text!r}")
    size, colour, shape = found.groups()
    return Item(shape, colour, size or ""), text[found.end() :]


def _parse_setting(text: str) -> tuple[str, str, bool]:
    for time, light in TIMES.items():
        for place, (where, _, _) in PLACES.items():
            if not light.ground and where:
                continue
            phrases = (where, light.phrase)
            for time_first in (False, True):
                order = reversed(phrases) if time_first else phrases
                if text == " ".join(p for p in order if p):
                    return time, place, time_first
    raise ValueError(f"no setting of the grammar: {text!r}")


def parse(caption: str) -> Scene:
    """Parse a caption of the grammar. Raises ``ValueError`` for any other text."""
    first, rest = _parse_item(" ".join(caption.lower().split()))
    items, relation = (first,), ""
    found = _RELATION.match(rest)
    if found is not None:
        relation = found.group(1)
        second, rest = _parse_item(rest[found.end() :])
        return Scene((first, second), relation, *_parse_setting(rest.strip()))
    return Scene(items, relation, *_parse_setting(rest.strip()))


def words() -> list[str]:
    """List every word that a caption can hold, sorted."""
    phrases = ["a an", *COLOURS, *SHAPES, *SIZES, *RELATIONS]
    phrases += [t.phrase for t in TIMES.values()] + [p[0] for p in PLACES.values()]
    return sorted({w for p in phrases for w in p.split()})
