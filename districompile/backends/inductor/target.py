# SPDX-License-Identifier: Apache-2.0
"""Name the machine that compiled code needs, and check the machine that runs it."""

from __future__ import annotations

from pathlib import Path

import torch

from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.spec import TensorSpec


def torch_version() -> str:
    """Return PyTorch's major and minor version, as ``"2.11"``."""
    return ".".join(torch.__version__.split(".")[:2])


def capability(device: torch.device | None = None) -> str:
    """Return the compute capability of a GPU, as ``"9.0"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def target_of(kind: str, device: torch.device | None = None) -> str:
    """Describe what machine code compiled here needs: a compute capability, or vector instructions of a CPU."""
    if kind == "cuda":
        return f"compute capability {capability(device)}" if torch.cuda.is_available() else "no GPU"
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def check_here(kind: str, target: str, built: str, device: torch.device) -> None:
    """Raise :class:`BackendError` unless code for ``kind`` and ``target``, of PyTorch ``built``, runs on ``device``."""
    again = "convert again on this machine"
    if device.type != kind:
        raise BackendError(f"this bundle was compiled for {kind}, not for {device}: {again}, or load it on {kind}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"this bundle was compiled for a GPU with {target}, and there is no GPU here")
    if (here := target_of(kind, device if kind == "cuda" else None)) != target:
        raise BackendError(f"this bundle was compiled for another device, a {target}, and this is a {here}: {again}")
    if built != torch_version():
        raise BackendError(f"this bundle was compiled with torch {built}, and this is torch {torch_version()}: {again}")


def check_weight(path: Path, weights: WeightFile, name: str, spec: TensorSpec) -> None:
    """Raise :class:`BackendError` unless a weight file has the weight ``name`` as the engine at ``path`` needs it."""
    if weights.spec(name) != spec:
        raise BackendError(f"{path} needs the weight {name!r} as {spec}, not as {weights.spec(name)}")
