"""districompile: one diffusion image on many GPUs at once, compiled.

program = dc.convert(module, args=(...), kwargs={...}, ranks=4)
program.save("bundle")
unet = dc.load("bundle")  # inside each rank's process: called like the module itself
"""

from __future__ import annotations

from districompile.interrupts import end_quietly

end_quietly()

# ruff: noqa: E402
from districompile.api import Program, convert
from districompile.capture import capture
from districompile.cutter import rows_of
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
from districompile.registry import Sample, rule
from districompile.runtime.module import image, load

__version__ = "0.1.0"

__all__ = [
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
    "capture",
    "convert",
    "image",
    "load",
    "rows_of",
    "rule",
]
