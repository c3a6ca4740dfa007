"""TensorRT: one backend for NVIDIA's ``tensorrt`` (10.x, 11.x) and ``tensorrt_rtx``, which have the same API.

=================  ================================================================================================
library.py         which of the two is used, what it can do, for which GPUs it builds, and what it says
builder.py         from an ONNX file to an engine file
inside.py          collectives inside an engine
engine.py          from an engine file to something that runs
backend.py         the backend protocol over these
=================  ================================================================================================
"""

from __future__ import annotations

from districompile.backends.tensorrt.backend import TensorRTBackend

__all__ = ["TensorRTBackend"]
