"""What several commands share: output, quiet libraries, paths."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from districompile.errors import Error, ValueWarning
from districompile.ir.plan import Plan, dtype_of
from districompile.manifest import MANIFEST, names_factory


class UsageError(Error):
    """Options that do not go together, or a path that cannot be used."""


def console() -> Console:
    """Standard output. Text that is not for a terminal is not folded at 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(data: dict[str, Any]) -> None:
    """One object on standard output."""
    print(json.dumps(data, indent=1))


def quiet_libraries() -> None:
    """Keep other libraries' advice and bars off the terminal: errors still show."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ValueWarning)
    for name in ("torch", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("diffusers", "transformers"):
        try:
            library = importlib.import_module(f"{name}.utils.logging")
        except ImportError:
            continue
        library.set_verbosity_error()
        library.disable_progress_bar()


def source_of(manifest: Mapping[str, Any], given: str | None) -> str:
    """The model that a bundle was made from: ``given`` (--model), else as its manifest says.

    Raise :class:`UsageError` where neither says, and for a function that only the manifest names: a bundle is data, and
    calls nothing.
    """
    if given:
        return given
    source = manifest.get("source")
    if not source:
        raise UsageError("the bundle does not say where its model came from: give --model")
    if names_factory(str(source)):
        raise UsageError(
            f"the bundle says that its model comes from the function {source}, and a bundle's word is not enough to "
            f"call it: give --model {source} if you trust that"
        )
    return str(source)


def chosen_dtype(plan: Plan) -> torch.dtype | None:
    """The type that the model was converted in; None where it was left as a factory makes it."""
    name = plan.options.get("dtype")
    return None if name is None else dtype_of(str(name))


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest, whole or not."""
    return (path / MANIFEST).is_file()
