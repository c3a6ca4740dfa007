"""What several commands share: output, quiet libraries, paths."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from districompile.bundle import MANIFEST
from districompile.errors import Error


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
    for name in ("torch", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("diffusers", "transformers"):
        try:
            library = importlib.import_module(f"{name}.utils.logging")
        except ImportError:
            continue
        library.set_verbosity_error()
        library.disable_progress_bar()


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest, whole or not."""
    return (path / MANIFEST).is_file()
