# SPDX-License-Identifier: Apache-2.0
"""Custom GPU kernels, for sizes at which those of PyTorch's libraries are slower.

==================  ==============================================================================================
triton_kernels.py   the kernels in Triton
operators.py        the Triton kernels as operators that Inductor can trace
launch.py           launch a Triton kernel
products.cu         the kernel in CUDA: matrix products and convolutions on Hopper GPUs
hopper.py           compile, load and launch the CUDA kernel, as operators
fp8.py              the CUDA kernel for operands in 8 bits
==================  ==============================================================================================

A graph that is stored calls an operator that runs on any device. Lowering for Inductor replaces this operator by the
kernel. Triton kernels are compiled into the package, as Inductor's own kernels are. The CUDA kernel is a file beside
the package in the bundle. Autotuning decides which kernels are used.
"""

from __future__ import annotations
