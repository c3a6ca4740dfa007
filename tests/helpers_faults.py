"""Ranks that fail, each in a process of its own. This module is quick to import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

import districompile as dc

TIMEOUT = 5.0


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(4, 8), torch.nn.Conv2d(8, 4, 3, padding=1)
    )


def make(path: Path, ranks: int, scale: float = 1.0) -> Path:
    module = net()
    module[0].weight.data *= scale
    x = torch.randn(1, 4, 24, 8)
    dc.convert(module, args=(x,), ranks=ranks, rows={"input": 2}).save(path, backend="eager")
    return path


def calls(bundle: str, how: str, who: int, marks: str, lingers: float = 0.0) -> str:
    """Call the module until rank ``who`` fails in the way ``how``.

    The other ranks write their error to the folder ``marks``. They then live on for ``lingers`` seconds, so that no
    rank detects the failure by their end.
    """
    rank = int(os.environ["RANK"])
    module = dc.load(bundle, timeout=TIMEOUT)
    x = torch.randn(1, 4, 24, 8)
    for _ in range(5):
        module(x)
    (Path(marks) / f"ready-{rank}").write_text(str(os.getpid()))
    for i in range(10 if how == "think" else 1_000_000):
        if rank == who and i == 3:
            accident(how, module, Path(marks))
        began = time.monotonic()
        try:
            module(x)
        except dc.LaunchError as e:
            (Path(marks) / f"told-{rank}").write_text(f"{time.monotonic() - began:.1f} {e}")
            time.sleep(lingers)
            raise
    module.close()
    return "done"


def accident(how: str, module: torch.nn.Module, marks: Path) -> None:
    (marks / "accident").write_text(str(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "raise":
        raise ValueError("had enough")
    if how == "think":
        time.sleep(1.5 * TIMEOUT)
    if how == "hang":
        module._runner.executor.channel.post = lambda transfer: time.sleep(1000)  # type: ignore[union-attr]


if __name__ == "__main__":
    calls(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], 3 * TIMEOUT)
