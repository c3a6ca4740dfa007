# SPDX-License-Identifier: Apache-2.0
"""Draw pictures of scenes: choose positions, and compute pixels from signed distances over whole batches.

The code uses only functions that NumPy and PyTorch share. The training script draws on the GPU with ``xp=torch``;
everything else uses NumPy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from districompile.models.scenes import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SINGLE_SCALE,
    SIZES,
    TEETH_FREQUENCY,
    TIMES,
    Colour,
    Scene,
    parse,
)

Array = Any
"""A NumPy array or a torch tensor: the drawing code takes either."""

# --- From scenes to numbers ---------------------------------------------------

Layout = dict[str, Array]
"""The numbers of a batch: float32 arrays of shape (batch, 1 or 3, 1, 1)."""


def _place_single(radius: float, rng: random.Random) -> tuple[float, float]:
    margin = radius + 0.03
    x, y = 0.5 + rng.uniform(-0.15, 0.15), 0.47 + rng.uniform(-0.14, 0.14)
    return min(max(x, margin), 1 - margin), min(max(y, margin), 1 - margin)


def _place_pair(radii: tuple[float, float], way: tuple[int, int], rng: random.Random) -> list[tuple[float, float]]:
    gap = rng.uniform(0.03, 0.08)
    extent = 2 * radii[0] + 2 * radii[1] + gap
    slack = 0.94 - extent
    start = 0.03 + slack * rng.uniform(0.25, 0.75)
    near, far = (0, 1) if sum(way) > 0 else (1, 0)
    along = {near: start + radii[near], far: start + extent - radii[far]}
    points = []
    for i in range(2):
        across = 0.5 + rng.uniform(-0.07, 0.07)
        points.append((along[i], across) if way[0] else (across, along[i]))
    return points


def _place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    if len(scene.items) == 1:
        radius = SIZES[scene.items[0].size] * SINGLE_SCALE
        return [(*_place_single(radius, rng), radius)]
    first, second = (SIZES[item.size] for item in scene.items)
    points = _place_pair((first, second), RELATIONS[scene.relation], rng)
    return [(*points[0], first), (*points[1], second)]


def _item_numbers(scene: Scene, rng: random.Random) -> dict[str, Sequence[float]]:
    numbers: dict[str, Sequence[float]] = {}
    places = _place(scene, rng)
    for i in range(2):
        item = scene.items[min(i, len(scene.items) - 1)]
        # An absent second shape is drawn far outside the picture.
        x, y, r = places[i] if i < len(places) else (-9.0, -9.0, 0.1)
        numbers |= {
            f"x{i}": (x,),
            f"y{i}": (y,),
            f"r{i}": (r,),
            f"shape{i}": (float(SHAPES.index(item.shape)),),
            f"fill{i}": COLOURS[item.colour],
            f"rim{i}": _rim(item.colour),
        }
    return numbers


def _rim(colour: str) -> Colour:
    """A rim that sets the shape off: darker than the fill, lighter for black."""
    if colour == "black":
        return (0.62, 0.62, 0.66)
    r, g, b = COLOURS[colour]
    return (r * 0.45, g * 0.45, b * 0.45)


def _sky_numbers(scene: Scene, rng: random.Random) -> dict[str, Sequence[float]]:
    time = TIMES[scene.time]
    base = PLACES[scene.place][1].base
    return {
        "top": time.top,
        "middle": time.middle,
        "low": time.low,
        "tint": time.tint,
        "haze": (time.haze,),
        "stars": (time.stars,),
        "seed": (rng.uniform(0, 50),),
        "sun": time.sun,
        "sun_glow": (time.sun_glow,),
        "sun_disc": (time.sun_disc,),
        "sun_x": (rng.uniform(0.25, 0.75),),
        "horizon": (min(base, 0.75) if time.ground else 1.0,),
        "nebula": (0.0 if time.ground else 1.0,),
    }


def _ridge_numbers(scene: Scene, rng: random.Random) -> dict[str, Sequence[float]]:
    numbers: dict[str, Sequence[float]] = {}
    _, *ridges = PLACES[scene.place]
    teeth = TEETH_FREQUENCY.get(scene.place, (1.0, 1.0))
    for i, ridge in enumerate(ridges):
        base = ridge.base if TIMES[scene.time].ground else 2.0
        numbers |= {
            f"ridge{i}": (base + rng.uniform(-0.015, 0.015) * (ridge.water == 0),),
            f"ridge_top{i}": ridge.top,
            f"ridge_bottom{i}": ridge.bottom,
            f"wave{i}": (ridge.wave,),
            f"frequency{i}": (ridge.frequency * rng.uniform(0.9, 1.1),),
            f"phase{i}": (rng.uniform(0, 1),),
            f"teeth{i}": (ridge.teeth,),
            f"teeth_frequency{i}": (teeth[i],),
            f"snowcap{i}": (ridge.snowcap,),
            f"water{i}": (ridge.water,),
        }
    return numbers


def layout(scenes: Sequence[Scene], rng: random.Random) -> Layout:
    """Compute all numbers that drawing needs; ``rng`` makes the free choices."""
    rows = [_item_numbers(s, rng) | _sky_numbers(s, rng) | _ridge_numbers(s, rng) for s in scenes]
    return {key: np.asarray([row[key] for row in rows], np.float32)[:, :, None, None] for key in rows[0]}


# --- Signed distances ---------------------------------------------------------
# Each takes points (x right, y down) in units of the shape's radius and returns a
# distance that is exact or nearly so close to the edge, where it decides a pixel.


def _length(x: Array, y: Array, xp: ModuleType) -> Array:
    return xp.sqrt(x * x + y * y + 1e-12)


def _polygon(x: Array, y: Array, corners: int, radius: float, turn: float, xp: ModuleType) -> Array:
    """A regular polygon with one corner up (``turn`` 0), corners left sharp."""
    sector = 2 * math.pi / corners
    angle = xp.arctan2(x, -y) + turn
    folded = angle - sector * xp.floor(angle / sector) - sector / 2
    return _length(x, y, xp) * xp.cos(folded) - radius * math.cos(sector / 2)


def _circle(x: Array, y: Array, xp: ModuleType) -> Array:
    return _length(x, y, xp) - 0.88


def _square(x: Array, y: Array, xp: ModuleType) -> Array:
    return xp.maximum(xp.abs(x), xp.abs(y)) - 0.80


def _triangle(x: Array, y: Array, xp: ModuleType) -> Array:
    return _polygon(x, y - 0.2, 3, 1.12, 0.0, xp)


def _star(x: Array, y: Array, xp: ModuleType) -> Array:
    """Five points: fold into half a point, then the distance to its one edge."""
    sector = 2 * math.pi / 5
    y = y - 0.06
    angle = xp.arctan2(x, -y)
    folded = xp.abs(angle - sector * xp.floor(angle / sector + 0.5))
    r = _length(x, y, xp)
    px, py = r * xp.sin(folded), r * xp.cos(folded)
    # The edge runs from the tip (0, outer) to the notch at half a sector.
    outer, inner = 1.06, 0.47
    ex, ey = inner * math.sin(sector / 2), inner * math.cos(sector / 2) - outer
    along = ((px * ex + (py - outer) * ey) / (ex * ex + ey * ey)).clip(0, 1)
    away = _length(px - along * ex, py - outer - along * ey, xp)
    return xp.where((py - outer) * ex < px * ey, -1.0, 1.0) * away


def _heart(x: Array, y: Array, xp: ModuleType) -> Array:
    """Two half discs on a square that stands on its corner."""
    scale = 1.62
    px, py = xp.abs(x) / scale, (0.88 - y) / scale
    lobe = _length(px - 0.25, py - 0.75, xp) - math.sqrt(2) / 4
    both = 0.5 * (px + py).clip(0, 9)
    side = xp.minimum(_length(px, py - 1, xp), _length(px - both, py - both, xp))
    below = xp.where(px > py, side, -side)
    return scale * xp.where(px + py > 1, lobe, below)


def _ring(x: Array, y: Array, xp: ModuleType) -> Array:
    return xp.abs(_length(x, y, xp) - 0.70) - 0.21


def _diamond(x: Array, y: Array, xp: ModuleType) -> Array:
    return (xp.abs(x) / 0.70 + xp.abs(y) - 1.0) * 0.573


def _cross(x: Array, y: Array, xp: ModuleType) -> Array:
    ax, ay = xp.abs(x), xp.abs(y)
    near, far = xp.minimum(ax, ay), xp.maximum(ax, ay)
    return xp.maximum(near - 0.29, far - 0.88)


def _moon(x: Array, y: Array, xp: ModuleType) -> Array:
    """A disc with a bite; near the two horns the distance is to their tips."""
    turn = math.radians(20)
    px = (x - 0.14) * math.cos(turn) - y * math.sin(turn)
    py = xp.abs((x - 0.14) * math.sin(turn) + y * math.cos(turn))
    body, bite, shift = 0.92, 0.76, 0.40
    a = (body**2 - bite**2 + shift**2) / (2 * shift)
    b = math.sqrt(body**2 - a**2)
    crescent = xp.maximum(_length(px, py, xp) - body, bite - _length(px - shift, py, xp))
    at_horn = px * b - py * a > shift * (b - py).clip(0, 9)
    return xp.where(at_horn, _length(px - a, py - b, xp), crescent)


def _hexagon(x: Array, y: Array, xp: ModuleType) -> Array:
    return _polygon(x, y, 6, 0.96, math.pi / 6, xp)


def _flower(x: Array, y: Array, xp: ModuleType) -> Array:
    """Six round petals about a middle."""
    sector = 2 * math.pi / 6
    angle = xp.arctan2(x, -y)
    folded = angle - sector * xp.floor(angle / sector + 0.5)
    r = _length(x, y, xp)
    petal = _length(r * xp.sin(folded), r * xp.cos(folded) - 0.60, xp) - 0.33
    return xp.minimum(petal, r - 0.45)


def _drop(x: Array, y: Array, xp: ModuleType) -> Array:
    """A disc and the cone of its tangents from a point above it."""
    radius, tip, centre = 0.60, -0.98, 0.36
    sine = radius / (centre - tip)
    cosine = math.sqrt(1 - sine * sine)
    disc = _length(x, y - centre, xp) - radius
    cone = xp.abs(x) * cosine - (y - tip) * sine
    touch = centre - radius * sine
    return xp.minimum(disc, xp.maximum(cone, y - touch))


_DISTANCES: tuple[Callable[[Array, Array, ModuleType], Array], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _heart,
    _ring,
    _diamond,
    _cross,
    _moon,
    _hexagon,
    _flower,
    _drop,
)


# --- Drawing ------------------------------------------------------------------


def _mix(a: Array, b: Array, share: Array) -> Array:
    return a + (b - a) * share


def _hash(x: Array, y: Array, xp: ModuleType) -> Array:
    value = xp.sin(x * 12.9898 + y * 78.233) * 437.585
    return value - xp.floor(value)


def _stars(x: Array, y: Array, seed: Array, size: int, xp: ModuleType) -> Array:
    """At most one star in each cell of a grid, at a spot that the cell's hash gives."""
    cells = 9.0
    cx, cy = xp.floor(x * cells), xp.floor(y * cells)
    lot = _hash(cx + seed, cy, xp)
    sx = (cx + 0.2 + 0.6 * _hash(cx + seed, cy + 17.0, xp)) / cells
    sy = (cy + 0.2 + 0.6 * _hash(cx + seed, cy + 31.0, xp)) / cells
    distance = ((x - sx) ** 2 + (y - sy) ** 2) * float(size) ** 2
    wide = 1.1 * (size / 256) ** 2
    return xp.exp(-distance / wide) * ((lot - 0.45) / 0.55).clip(0, 1)


def _sky(n: Layout, x: Array, y: Array, size: int, xp: ModuleType) -> Array:
    height = (y / n["horizon"]).clip(0, 1)
    sky = _mix(n["top"], n["middle"], (height * 2).clip(0, 1))
    sky = _mix(sky, n["low"], (height * 2 - 1).clip(0, 1))
    cloud = xp.sin(x * 4 + n["seed"]) * xp.sin(y * 5 + x * 2 + n["seed"] * 3)
    sky = sky * (1 + n["nebula"] * 0.6 * cloud)
    away = (x - n["sun_x"]) ** 2 + (y - n["horizon"] + 0.03) ** 2
    sky = _mix(sky, n["sun"], n["sun_glow"] * xp.exp(-away / 0.045))
    disc = (0.5 - (xp.sqrt(away) - n["sun_disc"]) * size).clip(0, 1)
    sky = _mix(sky, n["sun"], disc * (n["sun_disc"] > 0))
    return sky + n["stars"] * _stars(x, y, n["seed"], size, xp) * (1 - height**3)


def _teeth(x: Array, xp: ModuleType) -> Array:
    """A zigzag between -1 and 1 whose peaks differ a little in height."""
    saw = xp.abs(x - xp.floor(x) - 0.5) * 4 - 1
    return saw * (1 + 0.25 * xp.sin(x * 2.1))


def _ridge_line(n: Layout, i: int, x: Array, xp: ModuleType) -> Array:
    turn = (x * n[f"frequency{i}"] + n[f"phase{i}"]) * (2 * math.pi)
    line = n[f"ridge{i}"] - n[f"wave{i}"] * xp.sin(turn)
    return line - n[f"teeth{i}"] * _teeth(x * n[f"teeth_frequency{i}"] + n[f"phase{i}"], xp)


def _water(n: Layout, x: Array, y: Array, xp: ModuleType) -> Array:
    """Light on the water: waves that grow towards the viewer, and the sun's path."""
    depth = (y - n["horizon"]).clip(0.004, 1)
    rows = xp.sin(26 * xp.log(depth * 9 + 0.25) + 1.3 * xp.sin(x * 9 + n["seed"]))
    waves = 0.05 * rows * (depth * 14).clip(0, 1)
    path = xp.exp(-((x - n["sun_x"]) ** 2) / (0.003 + 0.05 * depth))
    return waves + n["sun_glow"] * path * (0.30 + 0.12 * rows)


def _land(picture: Array, n: Layout, x: Array, y: Array, size: int, xp: ModuleType) -> Array:
    for i in range(2):
        line = _ridge_line(n, i, x, xp)
        inside = ((y - line) * (size * 0.8) + 0.5).clip(0, 1)
        fall = ((y - n[f"ridge{i}"]) / 0.3).clip(0, 1)
        land = _mix(n[f"ridge_top{i}"], n[f"ridge_bottom{i}"], fall)
        edge = line + 0.055 + 0.02 * xp.sin(x * 60 + n[f"phase{i}"] * 40)
        cap = ((edge - y) * (size * 0.5) + 0.5).clip(0, 1) * n[f"snowcap{i}"]
        peak = ((n[f"ridge{i}"] - line) * 18).clip(0, 1)
        land = _mix(land, 0.97 + 0.0 * land, cap * peak) * n["tint"]
        land = _mix(land, n["middle"], 0.35 * n[f"water{i}"])
        land = land + (n["sun"] * 0.8 + 0.2) * n[f"water{i}"] * _water(n, x, y, xp)
        haze = n["haze"] * (1.0 - 0.35 * i) * (1 - 0.4 * fall)
        picture = _mix(picture, _mix(land, n["low"], haze), inside)
    return picture


def _distance(shape: Array, x: Array, y: Array, xp: ModuleType) -> Array:
    distance = _DISTANCES[0](x, y, xp)
    for index, function in enumerate(_DISTANCES[1:], start=1):
        distance = xp.where(shape == index, function(x, y, xp), distance)
    return distance


def _item(picture: Array, n: Layout, i: int, x: Array, y: Array, size: int, xp: ModuleType) -> Array:
    r = n[f"r{i}"]
    px, py = (x - n[f"x{i}"]) / r, (y - n[f"y{i}"]) / r
    d = _distance(n[f"shape{i}"], px.clip(-3, 3), py.clip(-3, 3), xp) * r * size
    scale = size / 256
    halo = 0.35 * xp.exp(-d.clip(0, 1e4) / (3.0 * scale))
    picture = _mix(picture, 1.0 + 0.0 * picture, halo)
    body = (n[f"fill{i}"] * (1 - 0.10 * (py + 0.4 * px))).clip(0, 1)
    inner = (0.5 - (d + 2.6 * scale)).clip(0, 1)
    body = _mix(n[f"rim{i}"], body, inner)
    return _mix(picture, body, (0.5 - d).clip(0, 1))


def draw(n: Layout, size: int, xp: ModuleType, grid: tuple[Array, Array]) -> Array:
    """A batch of pictures, (batch, 3, size, size) in [0, 1].

    ``grid`` holds the pixels' centres, x of shape (1, 1, 1, size) and y of shape
    (1, 1, size, 1), on the device where the layout's arrays are.
    """
    x, y = grid
    picture = _sky(n, x, y, size, xp)
    picture = _land(picture, n, x, y, size, xp)
    for i in range(2):
        picture = _item(picture, n, i, x, y, size, xp)
    return picture.clip(0, 1)


def pixel_grid(size: int) -> tuple[Array, Array]:
    """Return the centres of pixels in [0, 1], in the form that ``draw`` takes."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[None, None, None, :], centres[None, None, :, None]


def picture(scene: Scene | str, seed: int = 0, size: int = 256) -> Image.Image:
    """Draw one scene or caption, for display and for tests."""
    scene = parse(scene) if isinstance(scene, str) else scene
    numbers = layout([scene], random.Random(seed))
    drawn = draw(numbers, size, np, pixel_grid(size))[0]
    pixels = (drawn.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)
