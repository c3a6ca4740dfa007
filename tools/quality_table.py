"""Pictures of the demo model on N ranks against one device: the figures of docs/quality.md, one JSON line each.

    python tools/quality_table.py --out docs/measurements/quality.jsonl [--ranks 2,3,4,6,8] [--modes forecast,sync,...]
        [--steps 20,50,8] [--pictures 64] [--seeds 0-3] [--lot 16] [--device cuda] [--dtype float16] [--budget SECONDS]
    python tools/quality_table.py --out docs/measurements/quality.jsonl --docs docs/quality.md

All ranks run in this process, operator by operator. A line that is in the file already is not measured again. With
``--lot`` several pictures are drawn in one call. Their steps are exact where a picture's own would be: which they are
is worked out from one device's run of the same picture, and pictures that agree on it are drawn together.

The second form writes the tables between the marks of the page.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
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

from districompile.commands.common import quiet_libraries
from districompile.commands.drawing import place
from districompile.commands.quality import parse_seeds
from districompile.models.sources import load_pipeline, load_source
from districompile.progress import Silent
from districompile.quality.cases import Case, demo_prompts, make_cases
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.measure import MODES, Result, borders_of, compare, converted
from districompile.quality.page import png
from districompile.runtime.drift import DriftMonitor
from districompile.unit import DRIFT_LIMIT

Schedule = tuple[bool, ...]  # of each call of a picture: whether it is exact


class Recording(nn.Module):
    """The original, and for each picture of a call which of its steps would be exact. Both guidance halves are in a
    call, one behind the other."""

    def __init__(self, original: nn.Module, lot: int, warmup: int, limit: float) -> None:
        super().__init__()
        self.original, self._lot, self._warmup, self._limit = original, lot, warmup, limit
        self.reset()

    def reset(self) -> None:
        self._monitors = [DriftMonitor(self._limit) for _ in range(self._lot)]
        self.exact: list[list[bool]] = [[] for _ in range(self._lot)]

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.original(sample, *args, **kwargs)
        output = out[0] if isinstance(out, tuple) else out.sample
        for i, monitor in enumerate(self._monitors):
            rows = slice(i, None, self._lot)
            self.exact[i].append(len(self.exact[i]) < self._warmup or monitor.must_be_exact(0))
            monitor.observe(0, sample[rows].clone(), output[rows].clone())
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class Scheduled(nn.Module):
    """A compiled module whose steps are exact as ``schedule`` says."""

    def __init__(self, compiled: Any, schedule: Schedule) -> None:
        super().__init__()
        self.compiled, self._schedule, self._call = compiled, schedule, 0

    def reset(self) -> None:
        self.compiled.reset()
        self._call = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.compiled.phase = "warmup" if self._schedule[self._call] else "steady"
        self._call += 1
        return self.compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("compiled"), name)


class Demo:
    """The demo model with what one device draws, by number of steps."""

    def __init__(
        self, cases: Sequence[Case], lot: int, device: torch.device, warmup: int, limit: float, dtype: torch.dtype
    ) -> None:
        self.pipe, self.loaded = load_pipeline("demo", dtype), load_source("demo", dtype)
        self.cases, self.lot, self.device, self.warmup, self.limit = list(cases), lot, device, warmup, limit
        self.loaded.module.to(device)
        place(self.pipe, device)
        self._drawn: dict[int, tuple[Drawn, list[Schedule]]] = {}
        self.example = self.loaded.example(batch=lot)

    def setting(self, steps: int) -> Setting:
        height, width = self.loaded.default_size or (None, None)
        options = {"images": self.lot, "guidance": "batch", "height": height, "width": width}
        return Setting(steps, None, options)

    def expected(self, steps: int) -> tuple[Drawn, list[Schedule]]:
        """The pictures of one device, and which steps of each would be exact."""
        if steps not in self._drawn:
            recording = Recording(self.loaded.module, self.lot, self.warmup, self.limit)
            lots, schedules = [], []
            for at in range(0, len(self.cases), self.lot):
                lot = self.cases[at : at + self.lot]
                with Silent().task("") as task:
                    lots.append(draw(self.pipe, recording, lot, self.setting(steps), task))
                schedules += [tuple(e) for e in recording.exact[: len(lot)]]
            self._drawn[steps] = _joined(lots), schedules
        return self._drawn[steps]

    def measure(self, mode: str, ranks: int, steps: int) -> tuple[Result, Drawn]:
        """All pictures in one mode."""
        expected, schedules = self.expected(steps)
        groups = collections.defaultdict(list)
        for i, schedule in enumerate(schedules):
            groups[schedule].append(i)
        began = time.perf_counter()
        found: dict[int, tuple[Tensor, Tensor, int]] = {}
        options: dict[str, Any] = {"groupnorm": mode, "warmup_steps": self.warmup, "drift_limit": 0.0}
        with converted(self.loaded.module, self.example, ranks, self.device, **options) as compiled:
            borders = borders_of(compiled.plan)
            for schedule, members in groups.items():
                for at in range(0, len(members), self.lot):
                    lot = members[at : at + self.lot]
                    module = Scheduled(compiled, schedule)
                    with Silent().task("") as task:
                        drawn = draw(self.pipe, module, [self.cases[i] for i in lot], self.setting(steps), task)
                    assert drawn.latents is not None
                    for k, i in enumerate(lot):
                        found[i] = drawn.pixels[k], drawn.latents[:, k], sum(schedule)
        order = range(len(self.cases))
        whole = Drawn(
            torch.stack([found[i][0] for i in order]),
            torch.stack([found[i][1] for i in order], 1),
            tuple(found[i][2] for i in order),
        )
        scores = compare(self.cases, whole, expected, borders)
        return Result(mode, ranks, scores, time.perf_counter() - began), whole


def _joined(lots: Sequence[Drawn]) -> Drawn:
    latents = [d.latents for d in lots if d.latents is not None]
    return Drawn(torch.cat([d.pixels for d in lots]), torch.cat(latents, 1))


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for steps in map(int, args.steps.split(",")):
        for ranks in map(int, args.ranks.split(",")):
            for mode in args.modes.split(","):
                yield {"mode": mode, "ranks": ranks, "steps": steps, "prompts": args.pictures, "seeds": args.seeds,
                       "warmup_steps": args.warmup_steps, "drift_limit": args.drift_limit,
                       "dtype": args.dtype}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--ranks", default="2,3,4,6,8")
    parser.add_argument(
        "--modes", default="forecast,corrected_async,sync,stale,reference", help=f"of {','.join(MODES)}"
    )
    parser.add_argument("--steps", default="20,50,8")
    parser.add_argument("--pictures", type=int, default=64, help="prompts")
    parser.add_argument("--seeds", default="0-3")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--drift-limit", type=float, default=DRIFT_LIMIT)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of both sides")
    parser.add_argument("--lot", type=int, default=1, help="pictures of one call")
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
    began, done = time.perf_counter(), [line["job"] for line in read(args.out)]
    cases = make_cases(demo_prompts(args.pictures), parse_seeds(args.seeds))
    dtype = getattr(torch, args.dtype)
    demo = Demo(cases, args.lot, torch.device(args.device), args.warmup_steps, args.drift_limit, dtype)
    for job in jobs(args):
        if job in done or time.perf_counter() - began > args.budget:
            continue
        result, drawn = demo.measure(job["mode"], job["ranks"], job["steps"])
        data = {k: v for k, v in result.to_dict().items() if k not in ("scores", "drift_by_step")}
        low = sum(s.psnr < 35 for s in result.scores)
        line = {**data, "below_35_db": low, "psnr_by_picture": [round(s.psnr, 1) for s in result.scores]}
        with args.out.open("a") as file:
            file.write(json.dumps({**line, "device": _device(demo.device), "lot": args.lot, "job": job}) + "\n")
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
    """The lines of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a table shows of one line."""

    text: str

    @staticmethod
    def of(line: dict[str, Any] | None) -> Cell:
        if line is None:
            return Cell("-")
        psnr, black = line["psnr_db"], line["not_finite"]
        return Cell(f"{psnr['mean']:.1f} / {psnr['worst']:.1f}" + (f" ({black} not finite)" if black else ""))


def _table(line: dict[str, Any]) -> tuple[int, str, int, float]:
    """What the lines of one table have in common: steps, type, number of pictures, drift limit."""
    job = line["job"]
    return job["steps"], job["dtype"], line["pictures"], job["drift_limit"]


def write_docs(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between ``<!-- quality tables -->`` and ``<!-- end -->``."""
    parts = []
    sets = dict.fromkeys(map(_table, lines))
    for key in sorted(sets):
        steps, dtype, pictures, limit = key
        here = [e for e in lines if _table(e) == key]
        ranks = sorted({e["ranks"] for e in here})
        by = {(e["way"], e["ranks"]): e for e in here}
        exact = [e["exact_steps"] for e in here if e["exact_steps"] is not None]
        how = (
            f"drift limit {limit:g}, {sum(exact) / len(exact):.1f} steps exact on average" if limit else "4 steps exact"
        )
        devices = ", ".join(sorted({e["device"] for e in here}))
        parts.append(f"{steps} steps, {pictures} pictures, {dtype}, {how} ({devices}):\n")
        parts.append("| group norm | " + " | ".join(f"{r} ranks" for r in ranks) + " |")
        parts.append("| --- |" + " --- |" * len(ranks))
        for mode in dict.fromkeys(e["way"] for e in here):
            parts.append(f"| `{mode}` | " + " | ".join(Cell.of(by.get((mode, r))).text for r in ranks) + " |")
        parts.append("")
    text = path.read_text()
    tables = "<!-- quality tables -->\n" + "\n".join(parts) + "<!-- end -->"
    path.write_text(re.sub(r"<!-- quality tables -->.*?<!-- end -->", lambda _: tables, text, flags=re.DOTALL))


if __name__ == "__main__":
    with torch.no_grad():
        main()
