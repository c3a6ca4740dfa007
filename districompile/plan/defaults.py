# SPDX-License-Identifier: Apache-2.0
"""The defaults of a conversion for GPUs: one place for the command line and the benchmarks."""

from __future__ import annotations

OPTIMISE = "all"  # every exact optimisation
SEGMENTS = 8  # at most, of a displaced step
BACKENDS = ("tensorrt", "inductor")  # the first that can build here and run on the GPU
