# SPDX-License-Identifier: Apache-2.0
"""Shapes of a bundle: convert a module again, for inputs of other sizes, as a bundle was converted.

``dc.load(bundle, shapes="auto")`` converts a shape at the first call that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from districompile.bundle.bundle import Bundle
from districompile.bundle.manifest import names_factory
from districompile.errors import BundleError, InputError
from districompile.frontend.call_tree import flatten_call, replace_leaves
from districompile.ir.spec import dtype_of
from districompile.ir.unit import reuse_text
from districompile.plan.options import PlanOptions
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes
from districompile.progress import Progress, tasks, terminal_progress
from districompile.runtime.calls.inputs import RETURN_DICT
from districompile.runtime.calls.shapes import picture_of, wanted_shapes
from districompile.runtime.growth import register_source
from districompile.runtime.load import load as load

if TYPE_CHECKING:
    from districompile.backends.base import Backend
    from districompile.program import Program
    from districompile.sharding.registry import RuleSource

ADD_TIMEOUT = 3600.0  # seconds


class AddShapes:
    """Add shapes to a bundle when they are first called: ``dc.load(bundle, shapes=AddShapes())``.

    ``"auto"`` is one without arguments. ``model`` says where the original model is, as for ``convert``; the default is
    what the bundle says, unless that is a function. ``module`` is the model itself instead. ``backend`` is an object,
    where the bundle's backend has options. ``timeout`` limits, in seconds, how long the ranks wait for a conversion.
    ``progress`` shows it; the default is on the terminal.
    """

    def __init__(
        self, model: str | None = None, *, module: torch.nn.Module | None = None,
        backend: str | Backend | None = None, timeout: float = ADD_TIMEOUT, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.timeout = timeout
        self._model, self._module, self._backend, self._progress = model, module, backend, progress

    def check(self, bundle: Bundle) -> None:
        """Check that shapes can be added to ``bundle``. Raises :class:`BundleError` or :class:`InputError`."""
        check_repeatable(bundle)
        if self._module is None:
            self._source(bundle)

    def add(self, bundle: Bundle, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Convert the shape of a call into the folder of ``bundle``. Raises :class:`districompile.Error`."""
        progress = self._progress or terminal_progress()
        sizes = wanted_shapes(bundle.plan, flatten_call(bundle.plan.signature, args, kwargs))
        with tasks(progress).task(f"adding the shape {_sizes_text(sizes)} to {bundle.path}"):
            if self._module is None:
                self._module = self._load(bundle)
            program = convert_like(bundle, self._module, args, kwargs, progress=progress)
            program.add_to(bundle.path, self._backend, progress)

    def _source(self, bundle: Bundle) -> str:
        source = self._model or bundle.manifest.get("source")
        if not source:
            raise InputError(
                f"{bundle.path} does not name its model, so that no shape can be added to it: give the model, "
                "shapes=AddShapes(model=...) or AddShapes(module=...)"
            )
        if self._model is None and names_factory(str(source)):
            raise InputError(
                f"{bundle.path} names the function {source} as its model, and functions are called only where you name "
                f"them: give shapes=AddShapes({str(source)!r}) if you trust it"
            )
        return str(source)

    def _load(self, bundle: Bundle) -> torch.nn.Module:
        from districompile.models.sources import load_source

        dtype = bundle.plan.options.dtype
        return load_source(self._source(bundle), None if dtype is None else dtype_of(dtype)).module


def check_repeatable(bundle: Bundle) -> None:
    """Check that a conversion can be repeated from what the bundle says.

    Raises :class:`BundleError` for one with passes or rules of the user's own: a bundle is data, and names none that
    are called.
    """
    made: Mapping[str, Any] = bundle.manifest.get("made_with") or {}
    own = [
        *(p.text for p in bundle.plan.report.passes if not p.built_in),
        *made.get("rules", ()),
        *made.get("skip", ()),
    ]
    if own:
        raise BundleError(
            f"{bundle.path} was converted with {', '.join(dict.fromkeys(map(str, own)))}: add shapes with "
            "`districompile convert --add` and the same --passes, --rules and --skip"
        )


def convert_like(
    bundle: Bundle, module: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
    passes: Iterable[str] = (), rules: Iterable[RuleSource] = (), skip: Sequence[str] = (),
    extensions: Sequence[str] = (), strict: bool = False, progress: Progress | None = None,
) -> Program:  # fmt: skip
    """Convert ``module`` for the shapes of a call, with the options of ``bundle``.

    The tensors of ``args`` and ``kwargs`` are brought to the dtypes of the bundle's inputs, and a timestep or label to
    its form. Other arguments are those of the bundle. Raises :class:`InputError` for a call that differs from the
    bundle's in more than sizes, and what :func:`districompile.convert` raises.
    """
    from districompile import api

    plan, options = bundle.plan, bundle.plan.options
    args, kwargs = example_like(plan, args, dict(kwargs or {}))
    program = api.convert(
        module, args, kwargs, ranks=plan.world_size,
        rows={i.path: i.rows for i in plan.inputs if i.rows is not None}, cfg=options.cfg, groupnorm=options.groupnorm,
        displace=options.displace or "none", warmup_steps=options.warmup_steps, drift_limit=options.drift_limit,
        segments=options.segments, optimise=options.optimise, strict=strict or options.strict, passes=passes,
        rules=rules, skip=skip, extensions=extensions, progress=progress,
        reuse=reuse_text(options.reuse, options.reuse_level), transfer_bits=options.transfer_bits,
        quantise="none" if options.quantise == "none" else plan.report.quantised, timestep=options.timestep,
    )  # fmt: skip
    program.plan = dataclasses.replace(program.plan, options=_described(plan, program.plan))
    return program


def example_like(
    plan: ExecutionPlan, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as an example for a conversion like that of ``plan``."""
    leaves = flatten_call(plan.signature, args, kwargs)
    sizes = wanted_shapes(plan, leaves)
    values: dict[str, Any] = {}
    for spec in plan.inputs:
        value, dtype = leaves.get(spec.path), spec.spec.dtype
        if value is None:
            raise InputError(f"input {spec.path!r} is missing: the module was converted with it")
        value = torch.as_tensor(value).detach().to("cpu", dtype)
        if value.shape != sizes[spec.path]:
            value = value.reshape(-1)[:1].reshape([1] * len(sizes[spec.path])).expand(sizes[spec.path])
        values[spec.path] = value.clone(memory_format=torch.contiguous_format)
    known = {*values, *plan.constants, RETURN_DICT}
    extra = [p for p, v in leaves.items() if p not in known and v is not None]
    if extra:
        raise InputError(f"input {extra[0]!r} was not given at conversion: leave it out, or convert again with it")
    given = {k: v for k, v in kwargs.items() if k != RETURN_DICT or k in plan.constants}
    return replace_leaves(plan.signature, args, given, values)


def _described(like: ExecutionPlan, plan: ExecutionPlan) -> PlanOptions:
    """Return the options of a plan with the facts of ``like`` that the pipeline around the module needs."""
    picture = picture_of(like, input_shapes(plan))
    known = like.options
    described = dataclasses.replace(
        plan.options, guidance=known.guidance, dtype=known.dtype, timestep=known.timestep,
        quantise=known.quantise,
    )  # fmt: skip
    if picture is None:
        return described
    height, width, images = picture
    return dataclasses.replace(described, height=height, width=width, images=images)


def _sizes_text(sizes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{p} {'x'.join(map(str, s))}" for p, s in sizes.items() if len(s) > 1)


register_source("auto", AddShapes)
