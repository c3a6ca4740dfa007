# SPDX-License-Identifier: Apache-2.0
"""Convert, compile and run networks, for ``gpu_coverage.py``: one line of JSON each, with the errors or the reason."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import districompile as dc  # noqa: E402
from districompile.backends.inductor import InductorBackend  # noqa: E402
from districompile.ir.spec import Phase  # noqa: E402
from districompile.runtime.calls.agreement import Proposal  # noqa: E402
from districompile.runtime.calls.call_tracker import Decision  # noqa: E402
from districompile.runtime.calls.inputs import InputChecker  # noqa: E402
from tests.families.base import Call, error_of  # noqa: E402
from tests.families.measure import load_families  # noqa: E402

LIMIT = 1e-4  # of float32: other kernels, and other orders of sums
PHASES: tuple[Phase, ...] = ("exact", "displaced", "displaced", "displaced")


def measure(name: str, ranks: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the relative errors of one run.

    ``exact`` is against the network in eager PyTorch on the device, ``displaced`` against the displaced program run by
    eager PyTorch there. In half precision both count against float32 with the same weights and inputs, and ``eager``
    is the error of eager PyTorch itself.
    """
    family = load_families()[name]
    call = _call(family, dtype, device)
    given = copy.deepcopy((call.args, call.kwargs))
    with torch.no_grad():
        # made anew and not copied: a network may change itself, or hold what cannot be copied
        eager = _call(family, dtype, device).module(*copy.deepcopy(given[0]), **copy.deepcopy(given[1]))
        whole = _call(family, dtype, device).module.float()
        args, kwargs = pytree.tree_map(_widened, copy.deepcopy(given))
        want = eager if dtype == torch.float32 else whole(*args, **kwargs)
        del whole
    started = time.perf_counter()
    program = dc.convert(
        call.module, call.args, call.kwargs, ranks=ranks, rows=call.rows, optimise="all", phases="both"
    )
    converted = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="districompile-") as folder:
        program.save(Path(folder) / "b", backend=InductorBackend(device.type, workers=1))  # type: ignore[arg-type]
        saved = time.perf_counter()
        packages = len(list(Path(folder).rglob("*.pt2")))
        loaded = dc.load(Path(folder) / "b", lockstep=True, device=device)
        calls = [pytree.tree_map(lambda x, n=n: _other(x, n), copy.deepcopy(given)) for n in range(len(PHASES))]
        got = _driven(loaded._runner, loaded.plan, device, calls)
        oracle = [program.simulate(*copy.deepcopy(a), phase=p, **copy.deepcopy(k))
                  for p, (a, k) in zip(PHASES, calls, strict=True)]  # fmt: skip
    noise = error_of(eager, want)
    errors = {
        "exact": error_of(got[0], want),
        "displaced": max(error_of(a, list(_leaves(b))) for a, b in zip(got[1:], oracle[1:], strict=True)),
    }
    found: dict[str, Any] = {
        "group": family.group, "size": list(family.sizes[0]), "eager": noise, **errors,
        "packages": packages, "convert_s": round(converted - started, 1), "save_s": round(saved - converted, 1),
        "error": None,
    }  # fmt: skip
    limit = LIMIT if dtype == torch.float32 else 3 * noise + 1e-3
    over = [k for k, error in errors.items() if not error <= (limit if k == "exact" else 2 * limit)]
    if over:
        found["error"] = f"the {over[0]} phase is off by {errors[over[0]]:.1e}"
    return found


def _driven(runner: Any, plan: Any, device: torch.device, calls: Sequence[tuple[Any, Any]]) -> list[list[Tensor]]:
    """Run one exact call and displaced ones, whatever their timesteps say."""
    check = InputChecker(plan, device)
    found = []
    for phase, (args, kwargs) in zip(PHASES, calls, strict=True):
        proposal = Proposal(Decision(phase, 0, False), check(args, kwargs).tensors)
        with torch.no_grad():
            found.append([t.clone() for t in runner.call(proposal)[1]])
    return found


def _call(family: Any, dtype: torch.dtype, device: torch.device) -> Call:
    torch.manual_seed(0)
    call: Call = family.make(*family.sizes[0])

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    module = call.module.to(device)
    if dtype != torch.float32:
        module = module.to(dtype)
    args, kwargs = pytree.tree_map(moved, (call.args, call.kwargs))
    return Call(module, kwargs, call.rows, args)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _other(x: Any, number: int) -> Any:
    """Change an image a little from call to call; the first call has the example's values."""
    return x * (1 - 0.03 * number) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2 else x


def _leaves(x: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)]


def main() -> None:
    """Measure the jobs that are given as lines of JSON, and print a line for each."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what networks and compilers print must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of one job, or why there is none."""
    device = torch.device(job["where"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        return measure(job["family"], job["ranks"], getattr(torch, job["dtype"]), device)
    except Exception as e:  # whatever a network, a rule or a compiler raised is the result
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
        family = load_families()[job["family"]]
        reason = f"{type(e).__name__}: {' '.join(lines)[:400]}"
        return {"group": family.group, "size": list(family.sizes[0]), "error": reason}


if __name__ == "__main__":
    main()
