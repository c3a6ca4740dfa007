"""Kernels of our own for GPUs, where those of PyTorch's libraries leave time: and what engines call of them.

Each is an operator that anyone can run, in a graph that can be stored; tracing for the compiler replaces it by the
kernel. Those in Triton are compiled into the engine, as Inductor's own are; the one in CUDA is beside it in the bundle.
Which are used is decided by timing them.
"""

from __future__ import annotations
