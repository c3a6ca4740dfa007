"""The two flavours of TensorRT: which one is used, what it can do here, and what its logger says.

Only what both flavours have in every supported version is used as an attribute; what some lack is asked for by name
(:data:`OPTIONAL`) and looked for first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from districompile.errors import BackendError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
INSTALL: dict[Flavour, str] = {
    "tensorrt": 'pip install "districompile[tensorrt]"',
    "tensorrt_rtx": 'pip install "districompile[tensorrt-rtx]"',
}
OPTIONAL: dict[str, str] = {
    "add_dist_collective": "collectives inside an engine: tensorrt_rtx 1.4, tensorrt 10.16",
    "set_communicator": "the same",
    "CollectiveOperation": "the same",
    "MULTIDEVICE_RUNTIME_10_16": "tensorrt 10.16 alone asks for it, as a preview feature",
    "ComputeCapability": "building for GPUs that are not here: tensorrt_rtx",
    "num_compute_capabilities": "the same",
    "set_compute_capability": "the same",
    "create_runtime_config": "a context with a runtime cache: tensorrt_rtx, tensorrt 10.12",
    "create_runtime_cache": "the same: tensorrt_rtx",
    "set_runtime_cache": "the same: tensorrt_rtx",
    "set_execution_context_allocation_strategy": "the same",
    "is_stream_capturable": "whether a step may go into a CUDA graph: tensorrt_rtx",
    "get_engine_validity": "whether an engine fits this GPU: tensorrt_rtx",
}
"""What is used where a flavour has it, and which does."""


@dataclasses.dataclass(frozen=True)
class Library:
    """One flavour, imported."""

    flavour: Flavour
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def ahead_of_time(self) -> tuple[str, ...]:
        """GPUs it builds for without having one: ``("sm75", "sm80", ...)``; none where it builds for present ones."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        found = [name.lower() for name in members if re.fullmatch(r"SM\d+", name)]
        return tuple(sorted(found, key=lambda sm: int(sm[2:])))

    @property
    def has_collectives(self) -> bool:
        """Whether a collective can be a layer of an engine."""
        return hasattr(self.module.INetworkDefinition, "add_dist_collective")

    def runs_on(self, sm: str) -> str | None:
        """Why this flavour does not run on a GPU of that kind, or None. What the data-centre flavour supports differs
        from version to version: it is not second-guessed."""
        known = self.ahead_of_time
        if not known or sm in known:
            return None
        return (
            f"{self.flavour} {self.version} does not run on this GPU ({sm}; it knows {', '.join(known)}): use "
            "--backend inductor, or install the package `tensorrt`"
        )

    @functools.cached_property
    def log(self) -> Any:
        """The logger of all builders, parsers and runtimes: TensorRT wants one for a process."""
        return _make_log(self.module)


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings, prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[bool, str]] = []  # (is an error, text)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                self.messages.append((severity <= trt.ILogger.ERROR, text))

        def take(self) -> list[str]:
            """The errors since the last call, without repetitions, and forget all."""
            errors = [text for bad, text in self.messages if bad] or [text for _, text in self.messages]
            self.messages.clear()
            return list(dict.fromkeys(errors))

    return Log()


def told(errors: list[str], sources: Mapping[str, str] | None = None) -> str:
    """TensorRT's errors in one line, each with the source line of the first node of ours that it names.

    ``sources`` maps names of nodes (``conv2d_3``) to where the model's author wrote them (``net.py:12``).
    """
    lines = []
    for message in errors[:3]:
        text = " ".join(message.split())
        text = text if len(text) < 400 else text[:400] + "..."
        named = next((n for n in re.findall(r"([A-Za-z_]\w*)/[A-Z]\w*_\d+", message) if n in (sources or {})), None)
        lines.append(f"{text} (operator {named}{(sources or {})[named]})" if named else text)
    return "; ".join(lines) or "it gave no reason"


@functools.cache
def _load(flavour: Flavour) -> Library | str:
    """The flavour, or why it is not here."""
    if importlib.util.find_spec(flavour) is None:
        return f"the package {flavour} is not installed ({INSTALL[flavour]})"
    try:
        module = importlib.import_module(flavour)
    except Exception as e:  # a missing shared library, mostly
        return f"the package {flavour} cannot be imported ({type(e).__name__}: {str(e).splitlines()[0]})"
    if not hasattr(module, "Builder"):
        return f"the package {flavour} is incomplete: its libraries are missing ({INSTALL[flavour]})"
    return Library(flavour, module)


def installed() -> dict[Flavour, Library | str]:
    """Every flavour, or why it is not here."""
    return {flavour: _load(flavour) for flavour in FLAVOURS}


def find_library(flavour: str | None = None, sm: str | None = None) -> Library:
    """The flavour that is asked for, or the best of what is installed: on a machine with a GPU (of kind ``sm``)
    ``tensorrt``, without one ``tensorrt_rtx``, which alone can build there.

    Raises :class:`BackendError` naming what is missing and how to get it.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise BackendError(f"there is no TensorRT flavour {flavour!r}: use one of {', '.join(FLAVOURS)}")
    wanted = [f for f in FLAVOURS if flavour in (None, f)]
    found = {f: _load(f) for f in (wanted if sm is not None else reversed(wanted))}
    usable = [library for library in found.values() if isinstance(library, Library)]
    if not usable:
        raise BackendError("the tensorrt backend cannot be used: " + "; ".join(str(r) for r in found.values()))
    return next((library for library in usable if sm is not None and library.runs_on(sm) is None), usable[0])


def present_gpu(device: torch.device | None = None) -> str | None:
    """The kind of the GPU here, as ``"sm90"``; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def parse_targets(text: str | None, library: Library, gpu: str | None) -> tuple[str, ...]:
    """The GPUs to build for. ``text``: ``"current"``, or ``"sm89"``, or several with commas; None is the GPU that is
    here, or every Ampere or later one that ``library`` knows.

    Raises :class:`BackendError` saying what is possible instead.
    """
    ahead = library.ahead_of_time
    possible = f"it builds for {', '.join(ahead)} without a GPU" if ahead else "it builds for the GPU of this machine"
    if text is None:
        if gpu is not None and library.runs_on(gpu) is None:
            return (gpu,)
        if ahead:
            return tuple(sm for sm in ahead if int(sm[2:]) >= 80)
        text = "current"
    targets: list[str] = []
    for word in (w.strip().lower() for w in text.split(",") if w.strip()):
        if word == "current":
            if gpu is None:
                way_out = (
                    f"give --target {ahead[0]} or another of {', '.join(ahead)}"
                    if ahead
                    else "convert on a machine with the GPU, or install tensorrt_rtx, which builds without one "
                    f"({INSTALL['tensorrt_rtx']})"
                )
                raise BackendError(f"--target current: there is no GPU here: {way_out}")
            word = gpu
            if (reason := library.runs_on(word)) is not None:
                raise BackendError(f"--target current: {reason}")
        if not re.fullmatch(r"sm\d+", word):
            raise BackendError(f"--target {word}: a target is `current` or a kind of GPU such as sm89")
        if (ahead and word not in ahead) or (not ahead and word != gpu):
            here = f"the GPU here is {gpu}" if gpu else "there is no GPU here"
            raise BackendError(
                f"--target {word}: {library.flavour} {library.version} cannot build for it ({here}; {possible}). "
                + _other_way(library, word)
            )
        targets.append(word)
    if not targets:
        raise BackendError("--target is empty: give `current` or a kind of GPU such as sm89")
    return tuple(dict.fromkeys(targets))


def _other_way(library: Library, sm: str) -> str:
    if library.flavour == "tensorrt_rtx":
        return f"For {sm} convert on a machine that has one, with --tensorrt-flavour tensorrt or --backend inductor"
    return (
        f"Convert on a machine with such a GPU, or with --tensorrt-flavour tensorrt_rtx ({INSTALL['tensorrt_rtx']}) "
        "where that knows it"
    )


def dtype_table(trt: Any) -> dict[Any, torch.dtype]:
    """TensorRT's dtypes as torch's."""
    d = trt.DataType
    return {
        d.FLOAT: torch.float32, d.HALF: torch.float16, d.BF16: torch.bfloat16, d.INT64: torch.int64,
        d.INT32: torch.int32, d.INT8: torch.int8, d.UINT8: torch.uint8, d.BOOL: torch.bool,
    }  # fmt: skip


def set_optional(thing: Any, name: str, value: Any) -> None:
    """Set an attribute that not every flavour has (one of :data:`OPTIONAL`)."""
    if name not in OPTIONAL:
        raise KeyError(name)
    setattr(thing, name, value)


def optional(thing: Any, name: str) -> Callable[..., Any] | None:
    """A method that not every flavour has (one of :data:`OPTIONAL`), or None."""
    if name not in OPTIONAL:
        raise KeyError(name)
    found: Callable[..., Any] | None = getattr(thing, name, None)
    return found
