# SPDX-License-Identifier: Apache-2.0
"""``districompile doctor``: print versions, devices and backends."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Table

from districompile.backends import registry
from districompile.backends.inductor.kernels import hopper, launch
from districompile.backends.tensorrt.library import installed, present_gpu
from districompile.cli.common import console, print_json
from districompile.cli.smoke_test import run_trials
from districompile.errors import BackendError
from districompile.models.sources import DEMO
from districompile.progress import terminal_progress

PACKAGES = ("districompile", "torch", "numpy", "safetensors", "onnx", "onnxscript", "onnxruntime", "tensorrt",
            "tensorrt_rtx", "diffusers", "transformers", "accelerate", "flash_attn_3", "flash-attn-4", "triton",
            "cuda-bindings")  # fmt: skip
# Backends, and the devices on which the tests executed them
BACKENDS = {
    "eager": "CPU, H100, H200",
    "inductor": "CPU (operator by operator), H100, H200",
    "onnxruntime": "CPU",
    "tensorrt": "engines built without a GPU (tensorrt_rtx 1.7); H200 (8.6)",
}


def main(as_json: bool, trying: bool = False) -> int:
    """Print what is installed and usable. With ``trying``, run a small network with each backend."""
    facts = gather()
    if trying:
        usable = [name for name, entry in facts["backends"].items() if entry["usable"]]
        facts["tried"] = run_trials(usable, terminal_progress())
    if as_json:
        print_json(facts)
        return 0
    terminal = console()
    terminal.print(
        f"python {facts['python']} on {facts['system']}, {facts['cpu_threads']} CPU threads", highlight=False
    )
    terminal.print("GPUs: " + ("; ".join(facts["gpus"]) or "none"), markup=False, highlight=False)
    terminal.print(f"demo model: {facts['demo']}", markup=False, highlight=False)
    table = Table("package", "version", box=None, pad_edge=False)
    for name, found in facts["packages"].items():
        table.add_row(name, found or "not installed")
    terminal.print(table)
    table = Table("backend", "here", "tested on", "", box=None, pad_edge=False)
    for name, entry in facts["backends"].items():
        table.add_row(name, "usable" if entry["usable"] else "no", entry["tested_on"], entry["reason"] or "")
    terminal.print(table)
    for line in (*facts["kernels"], *facts["tensorrt"]):
        terminal.print(line, markup=False, highlight=False)
    for name, line in facts.get("tried", {}).items():
        terminal.print(f"{name} {line}", markup=False, highlight=False)
    return 0


def gather() -> dict[str, Any]:
    """Return all facts as plain data."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": _gpus(),
        "demo": "installed" if (DEMO / "model_index.json").is_file() else "not installed",
        "backends": {name: _backend(name) for name in BACKENDS},
        "kernels": _kernels(),
        "tensorrt": _tensorrt(),
    }


def _kernels() -> list[str]:
    """Say for each language whether the kernels of the inductor backend are usable here."""
    reasons = {"attention and products, in Triton": launch.unavailable_reason(),
               "gated products and convolutions, in CUDA": hopper.unavailable_reason()}  # fmt: skip
    return [f"inductor's own kernels for {what}: {reason or 'usable'}" for what, reason in reasons.items()]


def _tensorrt() -> list[str]:
    """Say for each flavour what it can build, and whether it runs on the GPU here."""
    gpu = present_gpu()
    lines = []
    for flavour, library in installed().items():
        if isinstance(library, str):
            lines.append(library)
            continue
        builds = f"builds {library.describe_targets()}"
        inside = "" if library.has_collectives else "; cannot hold collectives inside engines"
        here = "nothing to run on here" if gpu is None else library.runs_on(gpu) or f"may run on the GPU here ({gpu})"
        lines.append(f"{flavour} {library.version}: {builds}{inside}; {here}")
    return lines


def _backend(name: str) -> dict[str, Any]:
    try:
        registry.get_backend(name)
    except BackendError as e:
        return {"usable": False, "reason": str(e), "tested_on": BACKENDS[name]}
    return {"usable": True, "reason": None, "tested_on": BACKENDS[name]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    try:
        found = getattr(importlib.import_module(package), "__version__", None)
    except ImportError:
        return None
    return None if found is None else str(found)


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}" for p in properties]
