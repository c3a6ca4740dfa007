# SPDX-License-Identifier: Apache-2.0
"""TensorRT: one backend for NVIDIA's ``tensorrt`` (8.6, 10.x, 11.x) and ``tensorrt_rtx``.

=================  ================================================================================================
backend.py         the backend protocol and the options
library.py         select a flavour, resolve targets, format the errors of TensorRT
builder.py         build an engine file from an ONNX file
collectives.py     collectives inside an engine
engine.py          load and run an engine
v8.py              what TensorRT 8.6 does in another way
=================  ================================================================================================
"""

from __future__ import annotations

from districompile.backends.tensorrt.backend import TensorRTBackend

__all__ = ["TensorRTBackend"]
