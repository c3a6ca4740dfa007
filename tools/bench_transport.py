# SPDX-License-Identifier: Apache-2.0
"""What the exchanges of a converted model cost by themselves: its steps with engines that compute nothing.

    python tools/bench_transport.py BUNDLE_OR_PLAN_JSON [--transport peer nccl gloo] [--calls 20]

Starts one process per rank of the plan, a GPU each (on the CPU: gloo), and prints JSON lines: milliseconds a call
(median over calls, by CUDA events around all calls on a GPU) for each transport, phase, and with and without a CUDA
graph. Nothing hides a transfer here: this is the upper bound of what overlap has to hide.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from districompile.backends.base import Engine
from districompile.errors import Error
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.calls.agreement import Proposal
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.processes.launcher import launch
from districompile.runtime.runner import ProcessRunner
from districompile.runtime.transports.gloo import start_gloo


class Idle(Engine):
    """Leaves its outputs as they are."""

    binds_outputs = True

    def __init__(self) -> None:
        self._bound: dict[str, torch.Tensor] = {}

    def bind(self, name: str, tensor: torch.Tensor) -> None:
        self._bound[name] = tensor

    def enqueue(self) -> None:
        pass

    def output(self, name: str) -> torch.Tensor:
        return self._bound[name]

    def release(self) -> None:
        self._bound.clear()


def worker(path: str, transport: str, cuda_graph: bool, calls: int) -> list[dict[str, Any]]:
    plan = ExecutionPlan.from_json(Path(path).read_text())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    start_gloo()
    engines = {name: {s: Idle() for s in phase.segments} for name, phase in plan.phases.items()}
    runner = ProcessRunner(plan, engines, device, 60.0, transport, cuda_graph)
    inputs = {i.path: torch.zeros(i.spec.shape, dtype=i.spec.dtype, device=device) for i in plan.inputs}
    values = {i.value: inputs[i.path] for i in plan.inputs}
    for phase in ("exact", "exact", "exact", "displaced", "displaced", "displaced", "displaced"):
        runner.call(Proposal(Decision(phase, 0, False), inputs, fresh=False))
    rows = []
    state = runner._states[0][0]
    for phase in ("exact", "displaced"):
        for _ in range(4):
            runner.executor.run(phase, values, state)
        times = []
        for _ in range(calls):
            times.append(_timed(lambda phase=phase: runner.executor.run(phase, values, state), cuda))
        with runner.executor.trace() as trace:
            for _ in range(4):
                runner.executor.run(phase, values, state)
        rows.append({
            "transport": runner.transport, "cuda_graph": cuda_graph, "phase": phase,
            "ms": round(statistics.median(times), 3), "trace": trace.summary()[-1],
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        })  # fmt: skip
    runner.close()
    return rows


def _timed(call: Any, cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--transport", nargs="+", default=["auto"])
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    path = args.plan / "plan.json" if args.plan.is_dir() else args.plan
    ranks = ExecutionPlan.from_json(path.read_text()).world_size
    for transport in args.transport:
        for cuda_graph in (False, True):
            try:
                rows = launch(worker, (str(path), transport, cuda_graph, args.calls), ranks)[0]
            except Error as e:
                rows = [{"transport": transport, "cuda_graph": cuda_graph, "error": str(e)}]
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
