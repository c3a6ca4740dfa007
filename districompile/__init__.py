# SPDX-License-Identifier: Apache-2.0
"""districompile: compile a diffusion model into programs that draw one image together on several GPUs.

program = dc.convert(module, args=(...), kwargs={...}, ranks=4)
program.save("bundle")
unet = dc.load("bundle")  # in the process of each rank: called like the module itself

The names below are imported at their first use, so that ``import districompile`` does not import PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from districompile.common.interrupts import end_quietly
from districompile.version import __version__

if TYPE_CHECKING:
    from districompile.api import convert
    from districompile.errors import (
        BackendError,
        BundleError,
        CaptureError,
        ConvertError,
        Error,
        InputError,
        LaunchError,
        RanksDifferError,
    )
    from districompile.frontend.capture import capture
    from districompile.live.autoencoder import load_vae
    from districompile.live.enable import enable
    from districompile.live.pipeline import load_pipeline
    from districompile.program import Program
    from districompile.runtime.module import image
    from districompile.runtime.workers.group import Workers
    from districompile.shapes import AddShapes, load
    from districompile.sharding.builder import rows_of
    from districompile.sharding.registry import Sample, rule

end_quietly()

__all__ = [
    "AddShapes",
    "BackendError",
    "BundleError",
    "CaptureError",
    "ConvertError",
    "Error",
    "InputError",
    "LaunchError",
    "Program",
    "RanksDifferError",
    "Sample",
    "Workers",
    "__version__",
    "capture",
    "convert",
    "enable",
    "image",
    "load",
    "load_pipeline",
    "load_vae",
    "rows_of",
    "rule",
]

_MODULES = {
    "districompile.api": ("convert",),
    "districompile.program": ("Program",),
    "districompile.errors": (
        "BackendError",
        "BundleError",
        "CaptureError",
        "ConvertError",
        "Error",
        "InputError",
        "LaunchError",
        "RanksDifferError",
    ),
    "districompile.frontend.capture": ("capture",),
    "districompile.shapes": ("AddShapes", "load"),
    "districompile.live.enable": ("enable",),
    "districompile.live.autoencoder": ("load_vae",),
    "districompile.live.pipeline": ("load_pipeline",),
    "districompile.runtime.module": ("image",),
    "districompile.runtime.workers.group": ("Workers",),
    "districompile.extend": ("Sample", "rows_of", "rule"),  # which loads the built-in rules first
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name at its first use. Raise ``AttributeError`` for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
