# SPDX-License-Identifier: Apache-2.0
"""Example inputs of a model in other shapes than its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from districompile.errors import InputError
from districompile.frontend.call_tree import flatten_call, replace_leaves
from districompile.frontend.capture import bind_call
from districompile.models.inputs import Example
from districompile.models.sources import LoadedModel
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes

Sizes = Mapping[str, tuple[int, ...]]


def resized(module: torch.nn.Module, example: Example, sizes: Sizes, seed: int = 0) -> Example:
    """Return ``example`` with tensors of other shapes at the paths of ``sizes``.

    Floating-point values are drawn from a normal distribution. Others repeat those of the example, so that they stay in
    their range. Raises :class:`InputError` for an input that there is not, or one with another number of dims.
    """
    signature, args, kwargs = bind_call(module, example.args, example.kwargs)
    leaves = flatten_call(signature, args, kwargs)
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {}
    for path, shape in sizes.items():
        if path not in tensors:
            raise InputError(f"there is no tensor input {path}: the inputs are {_listed(tensors)}")
        if tensors[path].ndim != len(shape):
            raise InputError(
                f"{path} has {tensors[path].ndim} dims, not {len(shape)}: the inputs are {_listed(tensors)}"
            )
        values[path] = _values(tensors[path], shape, generator)
    args, kwargs = replace_leaves(signature, args, kwargs, values)
    return Example(args, kwargs, example.rows)


def _values(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.dtype)
    flat, count = like.reshape(-1), math.prod(shape)
    return flat.repeat(-(-count // max(1, flat.numel())))[:count].reshape(shape)


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{p} {'x'.join(map(str, t.shape)) or 'of no dims'}" for p, t in tensors.items())


def example_like_plan(loaded: LoadedModel, plan: ExecutionPlan, example: Example, seed: int) -> Example:
    """Return ``example`` in the shapes that ``plan`` is for."""
    signature, args, kwargs = bind_call(loaded.module, example.args, example.kwargs)
    leaves = flatten_call(signature, args, kwargs)
    sizes = {
        path: shape
        for path, shape in input_shapes(plan).items()
        if isinstance(leaves.get(path), Tensor) and leaves[path].shape != shape and leaves[path].ndim == len(shape)
    }
    return resized(loaded.module, example, sizes, seed) if sizes else example
