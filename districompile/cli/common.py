# SPDX-License-Identifier: Apache-2.0
"""What several commands share: output, extensions, quiet libraries, paths.

Functions import PyTorch where they need it, because the process that starts the ranks of ``run`` does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console

from districompile.bundle.manifest import MANIFEST, names_factory
from districompile.cli.options import NO_VAE
from districompile.common import extensions
from districompile.errors import EngineWarning, Error, ValueWarning

if TYPE_CHECKING:
    import torch

    from districompile.models.inputs import Example
    from districompile.models.sources import LoadedModel
    from districompile.plan.plan import ExecutionPlan


class UsageError(Error):
    """Options that contradict each other, or a path that cannot be used."""


_WIDE = 100_000  # columns, of output that is not for a terminal


class _Unpadded:
    """A text file without the spaces at the end of lines that rich pads tables with."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(re.sub(r" +(?=\n|$)", "", text))

    def flush(self) -> None:
        self._file.flush()


def console() -> Console:
    """Return a rich console on standard output.

    Output that is not for a terminal has no colours, no folded lines and no spaces at the end of lines.
    """
    if sys.stdout.isatty():
        return Console()
    return Console(file=cast(IO[str], _Unpadded(sys.stdout)), width=_WIDE, color_system=None, force_terminal=False)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(data, indent=1))


def load_extensions(names: Sequence[str]) -> None:
    """Load the extensions of installed packages, and those of ``--extension``, in this process.

    Raise :class:`~districompile.errors.ExtensionError` for one that cannot be loaded.
    """
    if names:
        from districompile.models.imports import add_current_folder

        add_current_folder()
    extensions.load_extensions(names)


def quiet_libraries() -> None:
    """Turn off warnings, advice and progress bars of other libraries. Errors still show."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=ValueWarning)
    warnings.filterwarnings("once", category=EngineWarning)
    for name in ("torch", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("diffusers", "transformers"):
        try:
            library = importlib.import_module(f"{name}.utils.logging")
        except ImportError:
            continue
        library.set_verbosity_error()
        library.disable_progress_bar()
    _use_thread_locks()


def _use_thread_locks() -> None:
    """Give tqdm, which diffusers and transformers use, a lock of threads instead of one of processes.

    Each rank has bars of its own. A rank that is ended leaves a lock of processes behind, and Python then warns of
    leaked semaphores after the message of the error or of Ctrl-C.
    """
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        return
    tqdm.tqdm.set_lock(threading.RLock())


def source_of(manifest: Mapping[str, Any], given: str | None) -> str:
    """Return the model that a bundle was made from: ``given`` (--model), else the one in its manifest.

    Raise :class:`UsageError` where neither names one. Raise it too for a function that only the manifest names: a
    bundle is data, and must not decide which code is called.
    """
    if given:
        return given
    source = manifest.get("source")
    if not source:
        raise UsageError("the bundle does not name its model: give --model")
    if names_factory(str(source)):
        raise UsageError(
            f"the bundle names the function {source} as its model, and functions are called only where you name them: "
            f"give --model {source} if you trust it"
        )
    return str(source)


def chosen_dtype(plan: ExecutionPlan) -> torch.dtype | None:
    """Return the dtype of the conversion; None for a factory's own."""
    from districompile.ir.spec import dtype_of

    name = plan.options.dtype
    return None if name is None else dtype_of(name)


def whole_path(vae: str | None) -> str | None:
    """Return what ``--vae`` says with the whole path of a folder, which holds in any process."""
    return vae if vae in (None, NO_VAE) else str(Path(vae).expanduser().absolute())


def is_bundle(path: Path) -> bool:
    """Return whether ``path`` is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def example_of(loaded: LoadedModel, plan: ExecutionPlan, seed: int, device: torch.device | None = None) -> Example:
    """Return inputs as a bundle with ``plan`` takes them. They are drawn on the CPU, so that a seed gives the same
    values on every ``device``."""
    from torch import Tensor

    from districompile.cli.examples import example_like_plan
    from districompile.ir.graph import replace

    options = plan.options
    if loaded.kind == "factory":
        example = loaded.example(seed=seed)
    else:
        cfg = options.guidance or loaded.cfg
        example = loaded.example(options.height, options.width, options.images, cfg, seed)
    example = example_like_plan(loaded, plan, example, seed)
    if device is None or device.type == "cpu":
        return example
    args, kwargs = replace((example.args, example.kwargs), Tensor, lambda t: t.to(device))
    return dataclasses.replace(example, args=args, kwargs=kwargs)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off inside: PyTorch has it on for convolutions on GPUs. float32 is compared by its own rounding."""
    import torch

    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    earlier = [s.allow_tf32 for s in switches]
    try:
        for s in switches:
            s.allow_tf32 = False
        yield
    finally:
        for s, before in zip(switches, earlier, strict=True):
            s.allow_tf32 = before


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of all files below ``folder``."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
