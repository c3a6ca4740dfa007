# SPDX-License-Identifier: Apache-2.0
"""Select a flavour of TensorRT, resolve targets, and format the errors of its logger.

The code uses an attribute of TensorRT directly only if both flavours have it in every supported version. The others are
listed in :data:`OPTIONAL`, and looked up by name. What concerns TensorRT 8.6 alone is in
:mod:`districompile.backends.tensorrt.v8`.
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

from districompile.backends.tensorrt import v8
from districompile.errors import BackendError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
INSTALL: dict[Flavour, str] = {
    "tensorrt": 'pip install "districompile[tensorrt]"',
    "tensorrt_rtx": 'pip install "districompile[tensorrt-rtx]"',
}
LISTED = ("sm75", "sm86", "sm89", "sm120", "sm121")
"""The GPUs in NVIDIA's support matrices of ``tensorrt_rtx`` 1.0 to 1.5. Its builder accepts others without a word."""

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
"""Attributes that some flavours or versions lack: their purpose, and who has them."""


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
        """GPUs for which it can build ahead of time: ``("sm75", "sm80", ...)``; empty otherwise."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        found = [name.lower() for name in members if re.fullmatch(r"SM\d+", name)]
        return tuple(sorted(found, key=lambda sm: int(sm[2:])))

    def describe_targets(self) -> str:
        """Say for which GPUs engines can be built here: ``for sm75, sm86 without a GPU ...``."""
        ahead = self.ahead_of_time
        if not ahead:
            return "for the GPU of this machine"
        others = [sm for sm in ahead if sm not in LISTED]
        accepted = f" ({', '.join(others)}: accepted by the builder, but in no support matrix)" if others else ""
        return f"for {', '.join(sm for sm in ahead if sm in LISTED)} without a GPU{accepted}"

    @property
    def is_v8(self) -> bool:
        """Say whether this is TensorRT 8.6, which reads older ONNX files and has an older interface."""
        return self.flavour == "tensorrt" and self.numbers[0] == 8

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers: ``(10, 16, 1, 11)``."""
        return _numbers(self.version)

    @property
    def has_collectives(self) -> bool:
        """Say whether a collective can be a layer of an engine."""
        return hasattr(self.module.INetworkDefinition, "add_dist_collective")

    @property
    def has_all_to_all(self) -> bool:
        """Say whether a collective can be an all-to-all: tensorrt 11.0, and tensorrt_rtx where it has the operation."""
        known = hasattr(getattr(self.module, "CollectiveOperation", None), "ALL_TO_ALL")
        return known and self.has_collectives and (self.flavour == "tensorrt_rtx" or self.numbers >= (11, 0))

    def runs_on(self, sm: str) -> str | None:
        """Say why this flavour does not run on a GPU of that kind, or None if it may.

        The GPUs of the data-centre flavour differ from version to version. Of these, only the newest ones that
        TensorRT 8.6 knows are checked.
        """
        if self.is_v8 and int(sm[2:]) > v8.NEWEST_GPU:
            return (
                f"{self.flavour} {self.version} does not run on this GPU ({sm}; it knows none beyond "
                f"sm{v8.NEWEST_GPU}): use --backend inductor, or install tensorrt 10.1 or later"
            )
        known = self.ahead_of_time
        if not known or sm in known:
            return None
        return (
            f"{self.flavour} {self.version} does not run on this GPU ({sm}; it knows {', '.join(known)}): use "
            "--backend inductor, or install the package `tensorrt`"
        )

    @functools.cached_property
    def log(self) -> Any:
        """The logger of all builders, parsers and runtimes. TensorRT allows one for a process."""
        return _make_log(self.module)


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keep errors and warnings; print nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[bool, str]] = []  # (is an error, text)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                self.messages.append((severity <= trt.ILogger.ERROR, text))

        def take(self) -> list[str]:
            """Return and clear the errors since the last call, without repetitions; the warnings if there are none."""
            errors = [text for bad, text in self.messages if bad] or [text for _, text in self.messages]
            self.messages.clear()
            return list(dict.fromkeys(errors))

    return Log()


def format_errors(errors: list[str], sources: Mapping[str, str] | None = None) -> str:
    """Format TensorRT's errors in one line, each with the source line of the first known node that it names.

    ``sources`` maps names of nodes (``conv2d_3``) to lines of the model's source (``net.py:12``).
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
    """Import a flavour; return the reason if that is not possible."""
    if importlib.util.find_spec(flavour) is None:
        return f"the package {flavour} is not installed ({INSTALL[flavour]})"
    try:
        module = importlib.import_module(flavour)
    except Exception as e:  # a missing shared library, mostly
        text = str(e).splitlines()[0] if str(e) else ""
        help_ = f": {v8.IMPORT_HELP}" if any(name in text for name in v8.IMPORT_HINTS) else ""
        return f"the package {flavour} cannot be imported ({type(e).__name__}: {text}){help_}"
    if not hasattr(module, "Builder"):
        return f"the package {flavour} is incomplete: its libraries are missing ({INSTALL[flavour]})"
    library = Library(flavour, module)
    return _other_version(library) or library


def _other_version(library: Library) -> str | None:
    """Say which versions of ``tensorrt`` there is code for, if this is another one."""
    if library.flavour != "tensorrt" or library.numbers[:2] == (8, 6) or library.numbers[:2] >= (10, 1):
        return None
    return f"tensorrt {library.version} is not supported: install version 8.6, or 10.1 or later ({INSTALL['tensorrt']})"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def installed() -> dict[Flavour, Library | str]:
    """Map every flavour to its library, or to the reason why it is not installed."""
    return {flavour: _load(flavour) for flavour in FLAVOURS}


def find_library(flavour: str | None = None, sm: str | None = None) -> Library:
    """Return the library of ``flavour``, or the best one that is installed.

    The best is ``tensorrt`` on a machine with a GPU (of kind ``sm``), and ``tensorrt_rtx`` without one, as only that
    can build there. Raises :class:`BackendError` naming what is missing and how to install it.
    """
    check_flavour(flavour)
    wanted = [f for f in FLAVOURS if flavour in (None, f)]
    found = {f: _load(f) for f in (wanted if sm is not None else reversed(wanted))}
    usable = [library for library in found.values() if isinstance(library, Library)]
    if not usable:
        raise BackendError("the tensorrt backend cannot be used: " + "; ".join(str(r) for r in found.values()))
    return next((library for library in usable if sm is not None and library.runs_on(sm) is None), usable[0])


def present_gpu(device: torch.device | None = None) -> str | None:
    """Return the kind of the GPU of this machine, as ``"sm90"``; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def parse_targets(text: str | None, library: Library, gpu: str | None) -> tuple[str, ...]:
    """Resolve the option ``target`` to the kinds of GPU to build for.

    ``text`` is ``"current"`` or a kind such as ``"sm89"``, or several with commas. None is the present GPU, or every
    Ampere or later one that ``library`` knows and its support matrices list. Raises :class:`BackendError` saying what
    is possible instead.
    """
    ahead = library.ahead_of_time
    if text is None:
        if gpu is not None and library.runs_on(gpu) is None:
            return (gpu,)
        if ahead:
            return tuple(sm for sm in ahead if int(sm[2:]) >= 80 and sm in LISTED)
        text = "current"
    targets: list[str] = []
    for word in split_targets(text):
        if word == "current":
            if gpu is None:
                way_out = (
                    f"give target={ahead[0]} or another of {', '.join(ahead)}"
                    if ahead
                    else "convert on a machine with the GPU, or install tensorrt_rtx, which builds without one "
                    f"({INSTALL['tensorrt_rtx']})"
                )
                raise BackendError(f"target=current: there is no GPU here: {way_out}")
            word = gpu
            if (reason := library.runs_on(word)) is not None:
                raise BackendError(f"target=current: {reason}")
        if (ahead and word not in ahead) or (not ahead and word != gpu):
            here = f"the GPU here is {gpu}" if gpu else "there is no GPU here"
            raise BackendError(
                f"target={word}: {library.flavour} {library.version} cannot build for it ({here}; it builds "
                f"{library.describe_targets()}). {_other_way(library, word)}"
            )
        targets.append(word)
    return tuple(dict.fromkeys(targets))


def check_flavour(flavour: str | None) -> None:
    """Raise :class:`BackendError` unless ``flavour`` is None or one of :data:`FLAVOURS`."""
    if flavour is not None and flavour not in FLAVOURS:
        raise BackendError(f"flavour={flavour}: give one of {', '.join(FLAVOURS)}")


def split_targets(text: str) -> tuple[str, ...]:
    """Split the option ``target`` into words. Raises :class:`BackendError` for a malformed one."""
    words = tuple(w.strip().lower() for w in text.split(",") if w.strip())
    if not words:
        raise BackendError("target is empty: give current, or a kind of GPU such as sm89")
    for word in words:
        if word != "current" and not re.fullmatch(r"sm\d+", word):
            raise BackendError(f"target={word}: give current, or a kind of GPU such as sm89")
    return words


def _other_way(library: Library, sm: str) -> str:
    if library.flavour == "tensorrt_rtx":
        return f"For {sm} convert on a machine that has one, with flavour=tensorrt, or with the inductor backend"
    return (
        f"Convert on a machine with such a GPU, or with flavour=tensorrt_rtx ({INSTALL['tensorrt_rtx']}) "
        "if that knows it"
    )


def dtype_table(trt: Any) -> dict[Any, torch.dtype]:
    """Map TensorRT's dtypes to PyTorch's. Version 8.6 has no ``BF16`` and no ``INT64``."""
    names = {
        "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
        "INT32": torch.int32, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
        "FP8": torch.float8_e4m3fn,
    }  # fmt: skip
    found = {getattr(trt.DataType, name, None): dtype for name, dtype in names.items()}
    return {member: dtype for member, dtype in found.items() if member is not None}


def set_optional(thing: Any, name: str, value: Any) -> None:
    """Set an attribute that some flavours lack (one of :data:`OPTIONAL`)."""
    if name not in OPTIONAL:
        raise KeyError(name)
    setattr(thing, name, value)


def optional(thing: Any, name: str) -> Callable[..., Any] | None:
    """Return a method that some flavours lack (one of :data:`OPTIONAL`), or None."""
    if name not in OPTIONAL:
        raise KeyError(name)
    found: Callable[..., Any] | None = getattr(thing, name, None)
    return found


def required(thing: Any, name: str) -> Callable[..., Any]:
    """Return a method of :data:`OPTIONAL` that this flavour has. Raises :class:`BackendError` if it has not."""
    found = optional(thing, name)
    if found is None:
        raise BackendError(f"this TensorRT has no {name} ({OPTIONAL[name]})")
    return found
