# SPDX-License-Identifier: Apache-2.0
"""Compare the outputs of a bundle on its GPUs with those of the same program run by PyTorch, for ``bench_gpu.py``."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import districompile as dc
from districompile.cli.calls import Calls
from districompile.ir.spec import Phase
from districompile.runtime.processes.launcher import launch
from districompile.sharding.compare import relative_error


def compare(bundle: Path, eager: Path, ranks: int, module: torch.nn.Module, scratch: Path) -> dict[str, Any]:
    """Return the relative errors (2-norms) of ``bundle``, and whether two runs of it gave the same bits.

    The references are ``eager``, a bundle of the same program for PyTorch, and ``module`` on one GPU.
    """
    files = {name: scratch / f"{name}.pt" for name in ("first", "second", "eager")}
    folders = {"first": bundle, "second": bundle, "eager": eager}
    with ProcessPoolExecutor(len(files), get_context("spawn")) as pool:  # in parallel, as loading takes long
        list(pool.map(run, folders.values(), files.values(), [ranks] * len(files)))
    first, second, oracle = (torch.load(f, weights_only=True) for f in files.values())
    whole = first["kwargs"]
    with torch.no_grad():
        one = module(**_moved(whole, next(module.parameters()).device), return_dict=False)[0].cpu()
    found: dict[str, Any] = {
        "exact_against_one_gpu": relative_error(first["outputs"][0], one),
        "eager_exact_against_one_gpu": relative_error(oracle["outputs"][0], one),
        "exact_against_eager": relative_error(first["outputs"][0], oracle["outputs"][0]),
        "displaced_against_eager": max(
            relative_error(a, b) for a, b in zip(first["outputs"][1:], oracle["outputs"][1:], strict=True)
        ),
        "same_bits_twice": all(torch.equal(a, b) for a, b in zip(first["outputs"], second["outputs"], strict=True)),
    }
    for file in files.values():
        file.unlink()
    return found


def run(bundle: Path, file: Path, ranks: int) -> None:
    """Run :func:`answers` on all ranks of ``bundle``."""
    launch(answers, (str(bundle), str(file)), ranks)


def answers(bundle: str, file: str) -> None:
    """Compute one exact and three displaced calls on one rank. Rank 0 writes outputs and arguments to ``file``."""
    import torch.distributed as dist

    unet = dc.load(bundle, verify="quick", device="cuda" if torch.cuda.is_available() else "cpu")
    calls = Calls(unet)
    outputs: list[torch.Tensor] = []
    first: dict[str, Any] = {}
    phases: list[Phase] = ["exact", "displaced", "displaced", "displaced"]
    for phase in phases:
        unet.phase = phase
        outputs.append(calls.call()[0].cpu().clone())
        first = first or _moved(calls.kwargs, torch.device("cpu"))  # with the timestep of the exact call
    if dist.get_rank() == 0:
        torch.save({"kwargs": first, "outputs": outputs}, file)
    unet.close()


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, dict):
        return {k: _moved(v, device) for k, v in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x
