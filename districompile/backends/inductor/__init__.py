# SPDX-License-Identifier: Apache-2.0
"""TorchInductor ahead of time (AOTInductor), with custom kernels where they are measured to be faster.

==================  ==============================================================================================
backend.py          the backend protocol and the options
package.py          turn the graph of a segment into a compilation job; compile the job into a package
workers.py          processes that compile jobs in parallel
engine.py           run a package
lowerings.py        lower composites to the form that Inductor fuses best
autotune.py         time alternatives and select the fastest
attention.py        select a kernel for attention
flash_attention.py  FlashAttention-3 and -4, as an operator
fp8.py              select a custom kernel for layers in 8 bits
convolution.py      select im2col or a custom kernel for convolutions
gated.py            fuse gated linear layers into a custom kernel
split_linear.py     split linear layers whose columns go to two places
kernels/            the custom kernels, in Triton and CUDA
kernel_deps.py      find custom-kernel calls in a graph and the binaries the bundle must ship
compiler.py         select a C++ compiler
target.py           name the machine that compiled code needs, and check it
pytorch_private.py  the private API of PyTorch that is used
torch_patches.py    changes to Inductor while it compiles
fragment.py         register operators with PyTorch
==================  ==============================================================================================
"""

from __future__ import annotations

from districompile.backends.inductor.backend import InductorBackend

__all__ = ["InductorBackend"]
