"""Checks of values that were typed, made before work starts. Imported by the command line: nothing heavy here."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import typer

from districompile.errors import Error

LARGEST_SEED = 2**64 - 1  # of PyTorch's generators


class OutputError(Error):
    """Standard output cannot be written."""


class ReaderLeft(Exception):
    """What reads standard output has closed it."""


def finite(value: float | None) -> float | None:
    """For options that are numbers: refuse NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def text(value: str | None) -> str | None:
    """For options that are text: refuse bytes that were no UTF-8."""
    if value is not None and any("\ud800" <= c <= "\udfff" for c in value):
        raise typer.BadParameter("it is not UTF-8 text.")
    return value


class Output:
    """Standard output whose errors have a name. A context manager that takes the place of ``sys.stdout``."""

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
        """As of a file. Characters that its encoding lacks are escaped."""
        try:
            return self._stream.write(data)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(data.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as e:
            raise self._failed(e) from e

    def flush(self) -> None:
        """As of a file."""
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
    """Let what is still buffered go nowhere: Python writes it once more as it ends."""
    try:
        number = stream.fileno()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, number)
        os.close(sink)
    except (OSError, ValueError):
        return


def check_steps(model: str, steps: int) -> None:
    """Ask the scheduler of a pipeline's folder whether it can take so many steps, without the model.

    Raises :class:`districompile.errors.Error` where it cannot. Where there is no such file nothing is checked.
    """
    from districompile.models.files import one_reason, read_json
    from districompile.models.inputs import ModelError
    from districompile.models.sources import DEMO, import_diffusers

    folder = DEMO if model == "demo" else Path(model).expanduser()
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    trained = config.get("num_train_timesteps")
    if isinstance(trained, int) and steps > trained:
        raise Error(f"--steps {steps}: the scheduler in {path} was trained with {trained} steps, and takes no more")
    cls = getattr(import_diffusers(), str(config.get("_class_name")), None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ModelError(f"{path}: diffusers has no scheduler {config.get('_class_name')!r}")
    try:
        scheduler = cls.from_config(config)
    except Exception as e:  # a constructor raises whatever it makes of a wrong value
        raise ModelError(f"{path}: the scheduler cannot be made: {one_reason(e)}") from e
    try:
        _rehearse(scheduler, steps)
    except (IndexError, ValueError, ZeroDivisionError) as e:
        kind = config["_class_name"]
        raise Error(f"--steps {steps}: the {kind} in {path} cannot take so many ({one_reason(e)}); use fewer") from e


def _rehearse(scheduler: Any, steps: int) -> None:
    """All steps of a sampler on one number. What needs more than that is left to the pipeline."""
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
