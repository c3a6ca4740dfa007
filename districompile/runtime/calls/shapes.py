# SPDX-License-Identifier: Apache-2.0
"""Choose the plan of a call by the shapes of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from districompile.errors import InputError
from districompile.frontend.call_tree import flatten_call
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes, shape_key, shapes_text
from districompile.runtime.calls.inputs import Call, InputChecker, OtherShapeError

_MOST_LISTED = 8


class ShapeSelector:
    """The shapes of a converted module by name, each with the checker of its calls.

    ``bundle`` is the folder, as advice names it. ``grows``: a shape that is not there is converted.
    """

    def __init__(
        self, plans: Mapping[str, ExecutionPlan], device: torch.device, bundle: str = "BUNDLE", grows: bool = False
    ) -> None:
        self._device, self._bundle, self._grows = device, bundle, grows
        self.plans: dict[str, ExecutionPlan] = {}
        self.checkers: list[InputChecker] = []
        self._compared: list[dict[str, tuple[int, ...]]] = []  # by shape: the inputs that tell it from others
        for name, plan in plans.items():
            self.add(name, plan)
        self._first = next(iter(self.plans.values()))

    def add(self, name: str, plan: ExecutionPlan) -> None:
        """Add a shape. Its number is that of shapes so far."""
        self.plans[name] = plan
        self.checkers.append(InputChecker(plan, self._device))
        shapes, rows = input_shapes(plan), {i.path for i in plan.inputs if i.rows is not None}
        self._compared.append({path: s for path, s in shapes.items() if path in rows or len(s) > 1})

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, Call] | None:
        """Return the number of a call's shape, and the call.

        None for a shape that is not there but can be added. Raises :class:`InputError` for a call that fits no shape.
        """
        leaves = flatten_call(self._first.signature, args, kwargs)
        if any(isinstance(v, torch.Tensor) and v.is_nested for v in leaves.values()):
            return 0, self.checkers[0](args, kwargs)  # which refuses it: it has no shape
        number = next((i for i, shapes in enumerate(self._compared) if _fit(shapes, leaves)), None)
        if number is None:
            missing = next((i.path for i in self._first.inputs if leaves.get(i.path) is None), None)
            if missing is not None:
                raise InputError(f"input {missing!r} is missing: the module was converted with it")
            if self._grows and self._other_shapes(leaves) and not self._lacks_a_half(leaves):
                return None
        try:
            return number or 0, self.checkers[number or 0](args, kwargs)
        except OtherShapeError as e:
            if not self._other_shapes(leaves):  # nor can it be added
                raise
            raise InputError(self._advice(str(e), leaves)) from e

    def wanted(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs that a plan for this call has, by path."""
        leaves = flatten_call(self._first.signature, args, kwargs)
        return wanted_shapes(self._first, leaves)

    def _other_shapes(self, leaves: Mapping[str, Any]) -> bool:
        """Return whether a call differs from the first shape's in nothing but sizes, as far as its tensors show."""
        for spec in self._first.inputs:
            value, known = leaves.get(spec.path), self._first.called_spec(spec).shape
            if isinstance(value, torch.Tensor) and len(known) > 1 and (value.ndim != len(known) or not value.numel()):
                return False
            if len(known) > 1 and not isinstance(value, torch.Tensor):
                return False
        return True

    def _advice(self, problem: str, leaves: Mapping[str, Any]) -> str:
        """Name the shapes that there are, and the way to add another one."""
        if len(self.plans) > 1:
            path = next((p for p in self._odd_paths(leaves)), next(iter(leaves)))
            given = "x".join(map(str, leaves[path].shape))
            listed = [f"{name} ({shapes_text(p)})" for name, p in list(self.plans.items())[:_MOST_LISTED]]
            more = f" and {len(self.plans) - len(listed)} more" if len(self.plans) > len(listed) else ""
            problem = f"{path} is {given}, and there is no such shape; there are: {'; '.join(listed)}{more}"
        if self._lacks_a_half(leaves):
            return (
                f"{problem}; each guidance half of this bundle has its own GPUs, and an odd batch has no halves: for "
                "guidance that stops midway convert with --cfg batch, and load the bundle with shapes='auto'"
            )
        if self._other_guidance(leaves):
            return f"{problem}; to add the shape, a call without its guidance half: load the bundle with shapes='auto'"
        flags = " ".join(self._flags(leaves))
        return (
            f"{problem}; to add the shape: `districompile convert --add {self._bundle} {flags}`, or load the bundle "
            "with shapes='auto'"
        )

    def _batch(self, leaves: Mapping[str, Any]) -> int:
        """Return the batch of a call's image; 0 if it has none."""
        image = leaves.get(next(i.path for i in self._first.inputs if i.rows is not None))
        return int(image.shape[0]) if isinstance(image, torch.Tensor) and image.ndim else 0

    def _lacks_a_half(self, leaves: Mapping[str, Any]) -> bool:
        """Return whether a call of a plan with split guidance cannot be halved."""
        return self._first.guidance_halves == 2 and self._batch(leaves) % 2 == 1

    def _other_guidance(self, leaves: Mapping[str, Any]) -> bool:
        """Return whether the batch of a call is no number of images with the guidance of the bundle."""
        image = next(i for i in self._first.inputs if i.rows is not None)
        known = self._first.called_spec(image).shape[0]
        guided = self._first.options.guidance in ("batch", "split")
        return guided and self._first.options.images * self._batch(leaves) % known != 0

    def _odd_paths(self, leaves: Mapping[str, Any]) -> Iterator[str]:
        """Yield the inputs whose shape no plan has; then those that differ from the first plan's."""
        tables = [input_shapes(p) for p in self.plans.values()]
        tensors = {p: tuple(v.shape) for p, v in leaves.items() if isinstance(v, torch.Tensor) and p in tables[0]}
        large = {p: s for p, s in tensors.items() if len(tables[0][p]) > 1}
        yield from (p for p, s in large.items() if all(t[p] != s for t in tables))
        yield from (p for p, s in large.items() if tables[0][p] != s)

    def _flags(self, leaves: Mapping[str, Any]) -> Iterator[str]:
        """Yield the options of ``convert --add`` for a call."""
        sizes = wanted_shapes(self._first, leaves)
        facts = picture_of(self._first, sizes)
        if facts is None:
            changed = {p: s for p, s in sizes.items() if len(s) > 1 and s != input_shapes(self._first).get(p)}
            yield "--input " + ",".join(f"{p}={'x'.join(map(str, s))}" for p, s in (changed or sizes).items())
            return
        height, width, images = facts
        yield f"--size {width}x{height} --batch {images}"
        for path, shape in sizes.items():
            known = input_shapes(self._first)[path]
            if len(shape) == len(known) == 3 and shape[1] != known[1]:
                yield f"--tokens {shape[1]}"
                return


def picture_of(plan: ExecutionPlan, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Return height and width in pixels and the number of images of inputs with ``sizes``.

    They follow from those of ``plan``, which has the same inputs. None if that has no size in pixels.
    """
    options = plan.options
    image = next(i for i in plan.inputs if i.rows is not None)
    known, new = plan.called_spec(image).shape, sizes[image.path]
    if not options.height or not options.width or len(new) < 3:
        return None
    height, width = options.height * new[-2] // known[-2], options.width * new[-1] // known[-1]
    return height, width, max(1, options.images * new[0] // known[0])


def wanted_shapes(plan: ExecutionPlan, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs of a call that differs from ``plan`` in sizes alone.

    Inputs of at most one dim, such as a timestep, keep their form: one number, or one for each element of the batch.
    """
    known = input_shapes(plan)
    image = next(i.path for i in plan.inputs if i.rows is not None)
    found: dict[str, tuple[int, ...]] = {}
    batch = tuple(leaves[image].shape)[:1] if isinstance(leaves.get(image), torch.Tensor) else known[image][:1]
    for path, shape in known.items():
        value = leaves.get(path)
        if len(shape) > 1 and isinstance(value, torch.Tensor):
            found[path] = tuple(value.shape)
        else:
            found[path] = batch if shape == known[image][:1] else shape
    return found


def key_of(sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Return a number below 0 for the shapes of inputs, the same in all processes."""
    text = json.dumps(shape_key(sizes))
    return -1 - int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _fit(shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]) -> bool:
    """Return whether the tensors of a call have ``shapes``. Leaves that are no tensors are checked later."""
    tensors = ((leaves.get(path), shape) for path, shape in shapes.items())
    return all(value.shape == shape for value, shape in tensors if isinstance(value, torch.Tensor))
