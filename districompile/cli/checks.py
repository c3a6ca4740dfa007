# SPDX-License-Identifier: Apache-2.0
"""Checks of option values before the work starts. The command line imports this file: it does not import PyTorch."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import typer

from districompile.errors import Error

LARGEST_SEED = 2**64 - 1  # of PyTorch's generators
MOST_IMAGES = 10_000


class OutputError(Error):
    """Standard output could not be written."""


class ReaderLeft(Exception):
    """The reader of standard output has closed it."""


def finite(value: float | None) -> float | None:
    """Return ``value``. Raise ``typer.BadParameter`` for NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Read ``"832x1216"`` as width and height. Raise :class:`districompile.errors.Error` for anything else."""
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if found is None or not int(found[1]) or not int(found[2]):
        raise Error(f"--size {text}: give width and height in pixels, as 832x1216")
    return int(found[1]), int(found[2])


def share(value: float | None) -> float | None:
    """Return ``value``. Raise ``typer.BadParameter`` unless it is above 0 and at most 1."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1.")
    return value


def seeds(text: str, option: str = "--seeds") -> list[int]:
    """Parse seeds such as ``"0,1,7"`` or ``"0-3"``. Raise :class:`districompile.errors.Error` for other text."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, to, last = part.strip().partition("-")
            numbers = range(int(first), int(last if to else first) + 1)
            if len(numbers) + len(found) > MOST_IMAGES:
                raise Error(f"{option} {text}: give at most {MOST_IMAGES} of them")
            found += numbers
    except (ValueError, OverflowError):
        raise Error(f"{option} {text}: give numbers with commas, or a range as 0-3") from None
    if not found or max(found) >= 2**63 or min(found) < 0:
        raise Error(f"{option} {text}: give at least one number, each below 2**63")
    return found


def text(value: str | None) -> str | None:
    """Return ``value``. Raise ``typer.BadParameter`` where its bytes were not UTF-8."""
    if value is not None and any("\ud800" <= c <= "\udfff" for c in value):
        raise typer.BadParameter("it is not UTF-8 text.")
    return value


def quantise(value: str | None) -> str | None:
    """Return ``value``. Raise ``typer.BadParameter`` unless it is none, auto, fp8, or fp8 with decibels."""
    if value is not None and re.fullmatch(r"none|auto|fp8(:[1-9]\d?)?", value) is None:
        raise typer.BadParameter(f"{value} is none of: none, auto, fp8, or fp8 with decibels, as fp8:40.")
    return value


def numbers(value: str | None) -> str | None:
    """Return ``value``. Raise ``typer.BadParameter`` unless it is numbers of 1 or more, separated by commas."""
    if value is not None and re.fullmatch(r"\s*0*[1-9]\d{0,5}\s*(,\s*0*[1-9]\d{0,5}\s*)*", value) is None:
        raise typer.BadParameter(f"{value}: give a number of 1 or more, or several separated by commas.")
    return value


class Output:
    """Replacement of ``sys.stdout``, as a context manager, whose errors are :class:`OutputError` or
    :class:`ReaderLeft`."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OutputError("standard output is closed: send it to a file or to /dev/null")
        self._stream: TextIO = sys.stdout

    def __enter__(self) -> Output:
        sys.stdout = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout = self._stream
        if kind is None or not issubclass(kind, OutputError | ReaderLeft):
            self.flush()

    def write(self, data: str) -> int:
        """Write text. Escape characters that the encoding of the file lacks."""
        try:
            return self._stream.write(data)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(data.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as e:
            raise self._failed(e) from e

    def flush(self) -> None:
        """Flush the file."""
        try:
            self._stream.flush()
        except OSError as e:
            raise self._failed(e) from e

    def _failed(self, error: OSError) -> Exception:
        _discard(self._stream)
        if isinstance(error, BrokenPipeError):
            return ReaderLeft()
        return OutputError(
            f"standard output cannot be written: {error.strerror or error}; files that the command wrote are complete"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to the null device. Python would write it again when it exits."""
    try:
        number = stream.fileno()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, number)
        os.close(sink)
    except (OSError, ValueError):
        return


def check_steps(model: str, steps: int, scheduler: str | None = None) -> None:
    """Check that the scheduler of a pipeline's folder supports ``steps``, without loading the model.

    ``scheduler`` is the class of another scheduler, made from the same configuration. Raise
    :class:`districompile.errors.Error` where it does not support them. Without a scheduler file nothing is checked.
    """
    from districompile.models.files import one_reason, read_json
    from districompile.models.inputs import ModelError
    from districompile.models.origin import Origin
    from districompile.models.sources import DEMO, import_diffusers

    given = Origin.of(model)
    folder = DEMO if model == "demo" else Path(given.config or given.path).expanduser()
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    trained = config.get("num_train_timesteps")
    if isinstance(trained, int) and steps > trained:
        raise Error(f"--steps {steps}: the scheduler in {path} was trained with {trained} steps; use at most as many")
    kind = scheduler or config.get("_class_name")
    cls = getattr(import_diffusers(), str(kind), None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ModelError(f"{path}: diffusers has no scheduler {kind!r}")
    try:
        scheduler = cls.from_config(config)
    except Exception as e:  # a constructor may raise anything for a wrong value
        raise ModelError(f"{path}: the scheduler cannot be made: {one_reason(e)}") from e
    try:
        _rehearse(scheduler, steps)
    except (IndexError, ValueError, ZeroDivisionError) as e:
        raise Error(
            f"--steps {steps}: the {kind} in {path} does not support so many ({one_reason(e)}); use fewer"
        ) from e


def _rehearse(scheduler: Any, steps: int) -> None:
    """Run all steps of a sampler on one number. Samplers that need more input are not checked."""
    import inspect

    import torch

    if "mu" in inspect.signature(scheduler.set_timesteps).parameters:
        return
    scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 1, 1)
    try:
        with torch.random.fork_rng(devices=[]):
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    except (TypeError, AttributeError, RuntimeError):
        return
