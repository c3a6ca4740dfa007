# SPDX-License-Identifier: Apache-2.0
"""``districompile doctor --try``: convert and run a small network with each usable backend.

Each backend runs in a process of its own, as what is tried may end it: compiled code, drivers, libraries.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.backends.registry import get_backend
from districompile.cli.common import full_precision, quiet_libraries
from districompile.errors import Error
from districompile.progress import Progress
from districompile.sharding.compare import relative_error

_TIMEOUT = 600.0  # seconds; the first compilation on a GPU takes one or two minutes
_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}  # relative; on a GPU other kernels, and other orders of sums


class TrialNet(nn.Module):
    """A small network of the layers of UNets: convolutions, group norm, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.qkv = nn.Linear(32, 96)
        self.outer = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """Map (B, 4, H, W) to (B, 4, H, W)."""
        x = torch.nn.functional.silu(self.norm(self.inner(sample)))
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outer(x + seen.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def run_trials(backends: Sequence[str], progress: Progress) -> dict[str, str]:
    """Try each backend. Return a line for each: its result, or the stage where it stopped."""
    outcomes = {}
    with progress.task("trying backends", len(backends)) as task:
        for name in backends:
            task.describe(f"trying {name}")
            outcomes[name] = try_backend(name)
            task.advance()
    return outcomes


def try_backend(name: str, timeout: float = _TIMEOUT) -> str:
    """Try one backend. Return one line: its result, or the stage and the reason where it stopped."""
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch:
        command = [sys.executable, "-X", "faulthandler", "-m", __name__, name, scratch]
        return follow(command, Path(scratch) / "log", timeout)


def follow(command: Sequence[str], log: Path, timeout: float) -> str:
    """Run a process that prints its stages, with its standard error in ``log``. Return a line on how it ended."""
    with log.open("w") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, timeout=timeout, text=True)
        except subprocess.TimeoutExpired as e:
            said = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
            return f"stopped after {timeout:.0f} s {_stage(said)}"
    found = _last(done.stdout)
    if done.returncode == 0 and "result" in found:
        return str(found["result"])
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name}) {_stage(done.stdout)}{_where(log)}"
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    return f"failed {_stage(done.stdout)}: {found.get('error') or lines[-1]}"


def _last(said: str) -> dict[str, Any]:
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def _stage(said: str) -> str:
    stages = [json.loads(line)["stage"] for line in said.splitlines() if line.startswith('{"stage"')]
    return f"while {stages[-1]}" if stages else "while starting"


def _where(log: Path) -> str:
    """Return the innermost line of Python of a crash, as faulthandler wrote it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("  File ")]
    return f", in {lines[0].removeprefix('File ')}" if lines else ""


def main(name: str, scratch: Path) -> None:
    """Run one backend in this process. Print each stage before it begins, as a line of JSON."""
    quiet_libraries()
    began = time.perf_counter()
    torch.manual_seed(0)
    net, x = TrialNet().eval(), torch.randn(1, 4, 32, 16)
    _say(stage="converting")
    program = dc.convert(net, kwargs={"sample": x}, ranks=2, rows={"sample": 2})
    _say(stage="building engines")
    backend = get_backend(name)
    program.save(scratch / "bundle", backend)
    built_for = backend.device
    kind = built_for.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        _say(result=f"built engines in {time.perf_counter() - began:.0f} s; not run: there is no GPU here")
        return
    _say(stage="loading engines")
    here = "cuda" if name == "eager" and torch.cuda.is_available() else None  # the one backend that runs on either
    compiled = dc.load(scratch / "bundle", lockstep=True, backend=backend, device=here)
    _say(stage="running engines")
    with torch.no_grad(), full_precision():
        want = net(x)
        moved = x.to(compiled.device)
        # The displaced phase settles where the input stays as it is: then it gives what the exact phase does
        errors = [relative_error(compiled(sample=moved), want) for _ in range(8)]
    worst, last = errors[0], errors[-1]
    seconds = time.perf_counter() - began
    kind = compiled.device.type
    if not max(worst, last) <= _TOLERANCE[kind]:
        _say(error=f"its numbers are off by {worst:.1e} in the exact phase and by {last:.1e} in the displaced one")
        sys.exit(1)
    device = torch.cuda.get_device_name() if kind == "cuda" else "the CPU"
    _say(result=f"ran on {device}, exact to {worst:.1e}, displaced to {last:.1e}, in {seconds:.0f} s")


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except Error as e:
        _say(error=str(e))
        sys.exit(1)
