# SPDX-License-Identifier: Apache-2.0
"""Compare pictures of the demo model on N ranks with those of one device, and write the tables of docs/quality.md.

    python tools/quality_table.py --out docs/measurements/quality.jsonl [--ranks 2,3,4,6,8] [--modes forecast,sync,...]
        [--steps 20,50,8] [--pictures 64] [--seeds 0-3] [--batch 16] [--device cuda] [--dtype float16]
        [--budget SECONDS]
    python tools/quality_table.py --out docs/measurements/quality.jsonl --docs docs/quality.md

The first form measures, and adds one JSON line a job. All ranks run in this process, operator by operator. A job that
is in the file already is not measured again. ``--batch`` draws several pictures in one call. Each picture gets the
exact steps that its own run on one device asks for, and pictures with the same exact steps are drawn together.

The second form writes the tables between the marks of the page. Lines of one job with different seeds are pooled.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

from districompile.cli.calibration import calibration_calls
from districompile.cli.checks import seeds as parse_seeds
from districompile.cli.common import quiet_libraries
from districompile.cli.generate import place
from districompile.cli.shapes import Shape
from districompile.ir.unit import DRIFT_LIMIT
from districompile.models.sources import load_pipeline, load_source
from districompile.plan.options import PlanOptions
from districompile.progress import Silent
from districompile.quality.cases import Case, demo_prompts, make_cases
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.measure import MODES, Result, borders_of, compare, converted, options_of
from districompile.quality.page import png
from districompile.runtime.calls.drift import RULE, DriftMonitor

Schedule = tuple[bool, ...]  # of each call of a picture: whether it is exact


class Recording(nn.Module):
    """Run the original, and record for each picture of a call which of its steps would be exact.

    A call holds the samples without the prompt first, and then those with it.
    """

    def __init__(self, original: nn.Module, batch: int, warmup: int, limit: float) -> None:
        super().__init__()
        self.original, self._batch, self._warmup, self._limit = original, batch, warmup, limit
        self.reset()

    def reset(self) -> None:
        self._monitors = [DriftMonitor(self._limit) for _ in range(self._batch)]
        self.exact: list[list[bool]] = [[] for _ in range(self._batch)]

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.original(sample, *args, **kwargs)
        output = out[0] if isinstance(out, tuple) else out.sample
        for i, monitor in enumerate(self._monitors):
            rows = slice(i, None, self._batch)
            self.exact[i].append(len(self.exact[i]) < self._warmup or monitor.must_be_exact(0))
            monitor.observe(0, sample[rows].clone(), output[rows].clone())
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class Scheduled(nn.Module):
    """Run a compiled module with the exact steps of ``schedule``."""

    def __init__(self, compiled: Any, schedule: Schedule) -> None:
        super().__init__()
        self.compiled, self._schedule, self._call = compiled, schedule, 0
        self._every, self._since = compiled.plan.options.reuse or 1, 0  # reused calls since the last full one

    def reset(self) -> None:
        self.compiled.reset()
        self._call = self._since = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        phase = "exact" if self._schedule[self._call] else "displaced"
        if phase == "displaced" and self._since + 1 < self._every:
            phase = "reused"
        self._since = self._since + 1 if phase == "reused" else 0
        self.compiled.phase = phase
        self._call += 1
        return self.compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("compiled"), name)


class Demo:
    """Draw with the demo model. Keeps the pictures of one device, by number of steps."""

    def __init__(
        self, cases: Sequence[Case], batch: int, device: torch.device, warmup: int, limit: float, dtype: torch.dtype
    ) -> None:
        self.pipe, self.loaded = load_pipeline("demo", dtype), load_source("demo", dtype)
        self.cases, self.batch, self.device, self.warmup, self.limit = list(cases), batch, device, warmup, limit
        self.loaded.module.to(device)
        place(self.pipe, device)
        self._drawn: dict[int, tuple[Drawn, list[Schedule]]] = {}
        self.example = self.loaded.example(batch=batch)

    @functools.cached_property
    def calls(self) -> list[Any]:
        """The calls by which modes in 8 bits choose their layers."""
        return calibration_calls(self.loaded, Shape(batch=self.batch), "batch", Silent())

    def setting(self, steps: int) -> Setting:
        """Return how the pictures are drawn."""
        height, width = self.loaded.default_size or (None, None)
        options = PlanOptions(images=self.batch, guidance="batch", height=height, width=width)
        return Setting(steps, None, options)

    def expected(self, steps: int) -> tuple[Drawn, list[Schedule]]:
        """Return the pictures of one device, and which steps of each would be exact."""
        if steps not in self._drawn:
            recording = Recording(self.loaded.module, self.batch, self.warmup, self.limit)
            batches, schedules = [], []
            for at in range(0, len(self.cases), self.batch):
                batch = self.cases[at : at + self.batch]
                with Silent().task("") as task:
                    batches.append(draw(self.pipe, recording, batch, self.setting(steps), task))
                schedules += [tuple(e) for e in recording.exact[: len(batch)]]
            self._drawn[steps] = _joined(batches), schedules
        return self._drawn[steps]

    def measure(self, mode: str, ranks: int, steps: int) -> tuple[Result, Drawn]:
        """Draw all pictures in one mode on ``ranks`` ranks, and compare them."""
        expected, schedules = self.expected(steps)
        groups = collections.defaultdict(list)
        for i, schedule in enumerate(schedules):
            groups[schedule].append(i)
        began = time.perf_counter()
        found: dict[int, tuple[Tensor, Tensor, int]] = {}
        plain = {"warmup_steps": self.warmup, "drift_limit": 0.0, "calibration": self.calls if "fp8" in mode else ()}
        options = options_of(mode, plain)
        with converted(self.loaded.module, self.example, ranks, self.device, **options) as compiled:
            borders = borders_of(compiled.plan)
            for schedule, members in groups.items():
                for at in range(0, len(members), self.batch):
                    batch = members[at : at + self.batch]
                    module = Scheduled(compiled, schedule)
                    with Silent().task("") as task:
                        drawn = draw(self.pipe, module, [self.cases[i] for i in batch], self.setting(steps), task)
                    assert drawn.latents is not None
                    for k, i in enumerate(batch):
                        found[i] = drawn.pixels[k], drawn.latents[:, k], sum(schedule)
        order = range(len(self.cases))
        whole = Drawn(
            torch.stack([found[i][0] for i in order]),
            torch.stack([found[i][1] for i in order], 1),
            tuple(found[i][2] for i in order),
        )
        scores = compare(self.cases, whole, expected, borders)
        return Result(mode, ranks, scores, time.perf_counter() - began), whole


def _joined(batches: Sequence[Drawn]) -> Drawn:
    """Concatenate the pictures of several batches."""
    latents = [d.latents for d in batches if d.latents is not None]
    return Drawn(torch.cat([d.pixels for d in batches]), torch.cat(latents, 1))


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """List the jobs of a command: one a number of steps, number of ranks and mode."""
    for steps in map(int, args.steps.split(",")):
        for ranks in map(int, args.ranks.split(",")):
            for mode in args.modes.split(","):
                yield {"mode": mode, "ranks": ranks, "steps": steps, "prompts": args.pictures, "seeds": args.seeds,
                       "warmup_steps": args.warmup_steps, "drift_limit": args.drift_limit,
                       "drift_rule": RULE, "dtype": args.dtype}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--ranks", default="2,3,4,6,8")
    parser.add_argument(
        "--modes", default="forecast,corrected_async,sync,stale,reference",
        help=f"of {','.join(MODES)}, deep=N, 8bit and fp8, or several joined by +",
    )  # fmt: skip
    parser.add_argument("--steps", default="20,50,8")
    parser.add_argument("--pictures", type=int, default=64, help="prompts")
    parser.add_argument("--seeds", default="0-3")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--drift-limit", type=float, default=DRIFT_LIMIT)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of both sides")
    parser.add_argument("--batch", type=int, default=1, help="pictures of one call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; no job is started after them")
    parser.add_argument("--images", type=Path, help="write the worst picture of each line here, beside one device's")
    parser.add_argument("--docs", type=Path, help="only write the tables of --out into this page")
    args = parser.parse_args()
    if args.docs is not None:
        write_docs(args.docs, read(args.out))
        return
    quiet_libraries()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, done = time.perf_counter(), [_job(line) for line in read(args.out)]
    cases = make_cases(demo_prompts(args.pictures), parse_seeds(args.seeds))
    dtype = getattr(torch, args.dtype)
    demo = Demo(cases, args.batch, torch.device(args.device), args.warmup_steps, args.drift_limit, dtype)
    for job in jobs(args):
        if job in done or time.perf_counter() - began > args.budget:
            continue
        result, drawn = demo.measure(job["mode"], job["ranks"], job["steps"])
        data = {k: v for k, v in result.to_dict().items() if k not in ("scores", "drift_by_step")}
        low = sum(s.psnr < 35 for s in result.scores)
        line = {**data, "below_35_db": low, "psnr_by_picture": [round(s.psnr, 1) for s in result.scores]}
        with args.out.open("a") as file:
            file.write(json.dumps({**line, "device": _device(demo.device), "batch": args.batch, "job": job}) + "\n")
        print(json.dumps({k: line[k] for k in ("way", "ranks", "psnr_db", "below_35_db", "exact_steps", "seconds")}))
        if args.images is not None:
            worst = result.scores.index(result.worst)
            pair = torch.cat([demo.expected(job["steps"])[0].pixels[worst], drawn.pixels[worst]], 2)
            args.images.mkdir(parents=True, exist_ok=True)
            name = f"worst-{job['mode']}-{job['ranks']}-{job['steps']}.png"
            (args.images / name).write_bytes(png(pair))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, torch {torch.__version__}"


def read(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of a JSON-lines file; an empty list where the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _job(line: dict[str, Any]) -> dict[str, Any]:
    """Return the job of a line. A line without a drift rule was measured with the first one."""
    return {"drift_rule": 1, **line["job"]}


def pool(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the lines of one job that differ only in their seeds.

    Counts are summed, means are weighted by the number of pictures, and the worst picture is the worst of all. The
    devices and the seeds of a pool are lists. Lines of different jobs are never merged.

    Raises :class:`ValueError` where one job has a seed twice: its pictures would count twice.
    """
    jobs: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for line in lines:
        jobs[json.dumps({k: v for k, v in _job(line).items() if k != "seeds"}, sort_keys=True)].append(line)
    return [_pooled(parts) for parts in jobs.values()]


def _pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the lines ``parts`` of one job."""
    seeds = [seed for part in parts for seed in parse_seeds(part["job"]["seeds"])]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"these lines measure one seed twice, remove one of them: {[part['job'] for part in parts]}")
    pictures = sum(part["pictures"] for part in parts)
    worst = min(parts, key=lambda part: (not part["not_finite"], part["psnr_db"]["worst"]))

    def mean(values: Sequence[float | None]) -> float | None:
        weights = [part["pictures"] for part in parts]
        known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None]
        return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None

    return {
        **worst,
        "psnr_db": {"mean": mean([p["psnr_db"]["mean"] for p in parts]), "worst": worst["psnr_db"]["worst"]},
        "exact_steps": mean([p["exact_steps"] for p in parts]),
        "pictures": pictures,
        "not_finite": sum(part["not_finite"] for part in parts),
        "below_35_db": sum(part["below_35_db"] for part in parts),
        "devices": sorted({part["device"] for part in parts}),
        "seeds": sorted(seeds),
    }


def _cell(line: dict[str, Any] | None, most: int) -> str:
    """Format one pooled line as a cell; a cell with fewer than ``most`` pictures says how many it has."""
    if line is None:
        return "-"
    psnr, black, pictures = line["psnr_db"], line["not_finite"], line["pictures"]
    notes = [f"{pictures} pictures"] * (pictures < most) + [f"{black} not finite"] * bool(black)
    return f"{psnr['mean']:.1f} / {psnr['worst']:.1f}" + (f" ({', '.join(notes)})" if notes else "")


@dataclasses.dataclass(frozen=True, order=True)
class _Table:
    """What the lines of one table have in common."""

    steps: int
    dtype: str
    prompts: int
    warmup_steps: int
    drift_limit: float
    drift_rule: int

    @staticmethod
    def of(line: dict[str, Any]) -> _Table:
        """Read the table of a line from its job."""
        return _Table(**{k: v for k, v in _job(line).items() if k in _TABLE_FIELDS})


_TABLE_FIELDS = {field.name for field in dataclasses.fields(_Table)}


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Write one Markdown table for each number of steps, type, number of prompts, drift limit and drift rule."""
    parts = []
    pooled = pool(lines)
    for table in sorted(set(map(_Table.of, pooled))):
        here = [line for line in pooled if _Table.of(line) == table]
        ranks = sorted({line["ranks"] for line in here})
        by = {(line["way"], line["ranks"]): line for line in here}
        most = max(line["pictures"] for line in here)
        parts += [_head(table, here, most), ""]
        parts.append("| group norm | " + " | ".join(f"{r} ranks" for r in ranks) + " |")
        parts.append("| --- |" + " --- |" * len(ranks))
        for mode in dict.fromkeys(line["way"] for line in here):
            parts.append(f"| `{mode}` | " + " | ".join(_cell(by.get((mode, r)), most) for r in ranks) + " |")
        parts.append("")
    return "\n".join(parts)


def _head(table: _Table, here: Sequence[dict[str, Any]], most: int) -> str:
    """Describe a table in one line; ``here``: its pooled lines, ``most``: the pictures of the largest."""
    exact = [(line["exact_steps"], line["pictures"]) for line in here if line["exact_steps"] is not None]
    how = f"{table.warmup_steps} steps exact"
    if table.drift_limit:
        mean = sum(e * n for e, n in exact) / sum(n for _, n in exact)
        how = f"drift limit {table.drift_limit:g} (rule {table.drift_rule}), {mean:.1f} steps exact on average"
    seeds = sorted({seed for line in here for seed in line["seeds"]})
    devices = ", ".join(sorted({device for line in here for device in line["devices"]}))
    return (
        f"{table.steps} steps, {most} pictures ({table.prompts} prompts, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}), {table.dtype}, {how} ({devices}):"
    )


def write_docs(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the text between ``<!-- quality tables -->`` and ``<!-- end -->`` in the page ``path``."""
    text = path.read_text()
    replaced = f"<!-- quality tables -->\n{tables(lines)}<!-- end -->"
    path.write_text(re.sub(r"<!-- quality tables -->.*?<!-- end -->", lambda _: replaced, text, flags=re.DOTALL))


if __name__ == "__main__":
    with torch.no_grad():
        main()
