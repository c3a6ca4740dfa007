# SPDX-License-Identifier: Apache-2.0
"""What a conversion does without flags: the best that works on this machine.

Without a GPU nothing is chosen here, and the defaults of :mod:`districompile.cli.options` hold. A machine is described
by an object, so that the choice can be made for any.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeVar

from districompile.cli import convert
from districompile.cli.options import DEFAULT_BACKEND, DEFAULT_DTYPE, Dtype
from districompile.cost.gpus import Gpu, gpu_of_device
from districompile.cuda import driver
from districompile.errors import BackendError
from districompile.models.shipped import Shipped, shipped
from districompile.plan.defaults import BACKENDS, OPTIMISE, SEGMENTS
from districompile.progress import Progress

if TYPE_CHECKING:
    from districompile.cli.divisions import Guidance
    from districompile.models.sources import LoadedModel

_BFLOAT16_FROM = 80  # the kind of GPU
_OF_A_PREDICTION = ("groupnorm", "displace", "warmup_steps", "drift_limit", "segments", "optimise", "strict", "passes",
                    "rules", "skip", "timestep")  # fmt: skip
S = TypeVar("S", bound=convert.Settings)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The kinds of the GPUs of a machine, such as ``"sm90"``.

    ``gpu``: what is known of them, to predict times; None if they differ or are not in the table.
    """

    gpus: tuple[str, ...] = ()
    gpu: Gpu | None = dataclasses.field(default=None, kw_only=True)

    def unusable(self, backend: str) -> str | None:
        """Return why a backend is not chosen for these GPUs: it cannot build for them, run on them, or do it well."""
        from districompile.backends.registry import get_backend

        try:
            made: Any = get_backend(backend)
            if not str(made.device).startswith("cuda"):
                return f"the backend {backend} runs on the CPU"
            library = getattr(made, "library", None)
        except BackendError as e:
            return str(e)
        if library is not None and library.is_v8:
            return f"{backend} {library.version} takes long to build, and computes float16 in float32"
        reasons = [None if library is None else library.runs_on(kind) for kind in dict.fromkeys(self.gpus)]
        build = getattr(made, "build_unavailable_reason", None)
        return next((r for r in (*reasons, None if build is None else build()) if r is not None), None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen: one line for the user (None: nothing), and the backends to try if the first cannot build.

    ``gpu``: guidance is to be chosen by a prediction for this GPU, once the model is loaded (:func:`with_guidance`).
    """

    line: str | None = None
    others: tuple[str, ...] = ()
    gpu: Gpu | None = None


def driver_gpus() -> int:
    """Return the number of GPUs that the driver finds. PyTorch is not imported."""
    count = ctypes.c_int(0)
    try:
        driver.call("cuInit", 0)
        driver.call("cuDeviceGetCount", ctypes.byref(count))
    except driver.DriverError:
        return 0
    return count.value


def this_machine() -> Machine:
    """Describe this machine. PyTorch is imported only if the driver finds a GPU."""
    if not driver_gpus():
        return Machine()
    import torch

    if not torch.cuda.is_available():  # a PyTorch for CPUs
        return Machine()
    kinds = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    devices = [torch.cuda.get_device_properties(i) for i in range(len(kinds))]
    known = {gpu_of_device(d.name, d.total_memory) for d in devices}
    gpu = known.pop() if len(known) == 1 else None
    return Machine(tuple(f"sm{major}{minor}" for major, minor in kinds), gpu=gpu)


def resolve(settings: S, machine: Machine) -> tuple[S, Choice]:
    """Fill in what the user did not give, for the GPUs of ``machine``. Return the settings, and what was chosen."""
    if not machine.gpus:
        return settings, Choice()
    chosen: dict[str, Any] = {}
    said: list[str] = []
    others: tuple[str, ...] = ()
    predicted: Gpu | None = None
    backend = settings.backend
    if backend is None:
        backend, others, reason = _backend(machine)
        chosen["backend"] = backend
        said.append(f"--backend {backend}{reason}")
        if backend == DEFAULT_BACKEND:
            chosen["dtype"] = settings.dtype or DEFAULT_DTYPE
    elif machine.unusable(backend) is not None:  # a bundle for the CPU, or an error that comes with its reason
        return settings, Choice()
    if backend != DEFAULT_BACKEND:
        found = shipped(settings.model)
        if settings.dtype is None and found is not None:
            dtype, why = _dtype(found, machine)
            chosen["dtype"] = dtype
            said.append(f"--dtype {dtype} ({why})")
        if settings.optimise is None:
            chosen["optimise"] = OPTIMISE
            said.append(f"--optimise {OPTIMISE}")
        if settings.segments is None:
            chosen["segments"] = SEGMENTS
            said.append(f"--segments {SEGMENTS}")
        if settings.cfg is None and settings.ranks % 2 == 0 and machine.gpu is not None:
            predicted = machine.gpu
        elif settings.cfg is None and found is not None and found.guided:
            cfg, why = _guidance(settings.ranks)
            chosen["cfg"] = cfg
            said.append(f"--cfg {cfg} ({why})")
    if not said:
        return settings, Choice(gpu=predicted)
    kinds = ", ".join(dict.fromkeys(machine.gpus))
    line = f"chosen for the GPUs here ({kinds}), each option overrides it: {', '.join(said)}"
    return dataclasses.replace(settings, **chosen), Choice(line, others, predicted)


def _backend(machine: Machine) -> tuple[str, tuple[str, ...], str]:
    """Return the first backend that can be used, those after it, and why the ones before cannot."""
    reasons = {name: machine.unusable(name) for name in BACKENDS}
    usable = [name for name, reason in reasons.items() if reason is None]
    first = usable[0] if usable else DEFAULT_BACKEND
    before = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if usable:
        before = before[: BACKENDS.index(first)]
    return first, tuple(usable[1:]), f" ({'; '.join(before)})" if before else ""


def _dtype(found: Shipped, machine: Machine) -> tuple[Dtype, str]:
    if found.dtype == "float16" and found.upcast:
        return "float32", "its force_upcast says that float16 overflows"
    if found.dtype == "bfloat16" and any(int(kind[2:]) < _BFLOAT16_FROM for kind in machine.gpus):
        return "float32", "a GPU here has no bfloat16, in which the weights are shipped"
    return found.dtype, "as the weights are shipped"


def with_guidance(
    settings: convert.Settings, loaded: LoadedModel, gpu: Gpu, progress: Progress
) -> tuple[convert.Settings, str | None]:
    """Choose how guided calls are divided among GPUs that are known, by what is predicted for the first shape.

    Return the settings, and the line that says why; None for a model that pipelines do not call with two halves. The
    rule of GPUs that are not known holds where no prediction is possible.
    """
    from districompile.cli.divisions import STEPS, Divisions, choose_guidance
    from districompile.cli.shapes import shapes_of

    if loaded.cfg != "batch" or loaded.parts != 2:
        return settings, None
    shape = shapes_of(settings)[0]
    given = {name: getattr(settings, name) for name in _OF_A_PREDICTION}
    options = {name: value for name, value in given.items() if value is not None}
    divisions = Divisions(loaded, functools.partial(shape.example, loaded), gpu, STEPS, progress, options)
    cfg, why = choose_guidance(divisions, settings.ranks) or _guidance(settings.ranks)
    return dataclasses.replace(settings, cfg=cfg), f"chosen by the plan: --cfg {cfg} ({why})"


def _guidance(ranks: int) -> tuple[Guidance, str]:
    """Choose how guided calls are divided among GPUs that are not known.

    A rank computes as much either way. With split halves a rank exchanges with half as many ranks, what it sends is
    less, and its rows are in one piece twice as high; with two ranks nothing is exchanged inside a call.
    """
    if ranks % 2:
        return "batch", "an odd number of GPUs"
    return "split", "the same work a GPU, and fewer rows to exchange"
