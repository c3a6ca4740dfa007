"""Kernels of our own for GPUs, in Triton, where those of PyTorch's libraries leave time: and what engines call of them.

Each is an operator that anyone can run, in a graph that can be stored; tracing for the compiler replaces it by the
kernel, which is compiled into the engine: as Inductor's own are. Which are used is decided by
timing them.
"""

from __future__ import annotations
