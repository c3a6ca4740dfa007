"""What a compiled model does, for people and for scripts: read off the plan alone, so that a bundle on disk shows the
same."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from districompile.ir.plan import Deliver, Exchange, Keep, Phase, Plan, Post, Run, Take, Wait

_PHASES: tuple[Phase, ...] = ("warmup", "steady")
_FEW_ROWS = 4  # with fewer, a convolution of 3 rows reads more than a third of the previous step
_UNSHOWN = ("ranks", "cfg_inputs")  # shown elsewhere, or of no interest to people


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows per rank, what is exchanged where, fallbacks, segments. ``str(report)`` is text, ``to_dict()`` plain data,
    and a rich console prints it as tables. All byte counts are for one call of the model."""

    plan: Plan

    def rows(self) -> dict[int, list[int]]:
        """Rows that each rank owns, for every height of a map that is cut, tallest first."""
        bounds = sorted(((int(n), b) for n, b in self.plan.bounds.items()), reverse=True)
        return {n: [b[r + 1] - b[r] for r in range(self.plan.ranks)] for n, b in bounds}

    def sites(self) -> dict[str, dict[str, Any]]:
        """Collectives by kind: how many, how many of them displaced, bytes sent by each rank."""
        found: dict[str, dict[str, Any]] = {}
        for c in self.plan.collectives.values():
            entry = found.setdefault(
                c.kind, {"count": 0, "displaced": 0, "bytes": [0] * self.plan.ranks, "patterns": {}}
            )
            entry["count"] += 1
            entry["displaced"] += int(c.displaced)
            pattern = c.pattern if isinstance(c, Exchange) else f"reduce {c.op}"
            entry["patterns"][pattern] = entry["patterns"].get(pattern, 0) + 1
            for r in range(self.plan.ranks):
                entry["bytes"][r] += c.sent_bytes(r)
        return dict(sorted(found.items()))

    def sent(self, phase: Phase) -> list[int]:
        """Bytes that each rank sends in one call of ``phase``. At least: an all-gather inside an engine sends all
        that a rank gives to every other one."""
        posts = [s for s in self.plan.phases[phase].steps if isinstance(s, Post)]
        inside = phase == "warmup" and self.plan.options.get("collectives") == "inside"
        names = list(self.plan.collectives) if inside else [n for s in posts for n in s.collectives]
        return [sum(self.plan.collectives[n].sent_bytes(r) for n in names) for r in range(self.plan.ranks)]

    def waits(self, phase: Phase) -> int:
        """How many times a call of ``phase`` waits for other ranks."""
        return sum(isinstance(s, Wait) for s in self.plan.phases[phase].steps)

    def engines(self) -> int:
        """Distinct engines on disk, over all phases and ranks."""
        return len({e for p in self.plan.phases.values() for s in p.segments.values() for e in s.engines})

    def fallbacks(self) -> list[dict[str, Any]]:
        """Operators computed on gathered inputs because no rule covers them: where, why, bytes gathered."""
        return [dict(f) for f in self.plan.report.get("fallbacks", ())]

    def cut_share(self) -> float | None:
        """The part of the model's FLOPs that is divided among the ranks, 0 to 1; None where it was not counted."""
        flops = self.plan.report.get("flops")
        if not flops or not flops["cut"] + flops["whole"]:
            return None
        return float(flops["cut"]) / float(flops["cut"] + flops["whole"])

    def few_rows(self) -> str | None:
        """One line where a rank's displaced steps see little that is fresh, with the way out; None elsewhere.

        Of the rows that a 3-row window reads on a rank with n rows, 2 of n + 2 are the previous step's."""
        displaced = any(
            isinstance(c, Exchange) and c.displaced and c.kind == "conv" for c in self.plan.collectives.values()
        )
        maps = {n: min(rows) for n, rows in self.rows().items() if min(rows) > 0}
        if not displaced or not maps:
            return None
        tallest, rows = min(maps.items(), key=lambda m: (m[1], m[0]))
        if rows >= _FEW_ROWS:
            return None
        stale = f"{2 / (rows + 2):.0%} of what a convolution reads there is the previous step's"
        return (
            f"few rows a rank: {rows} of the map of {tallest}, so {stale}; fewer GPUs, a larger image or --cfg split "
            "give a rank more, and districompile verify --quality measures the pictures"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        phases = [p for p in _PHASES if p in self.plan.phases]
        return {
            "ranks": self.plan.ranks,
            "options": dict(self.plan.options),
            "inputs": {i.path: {"shape": list(i.spec.shape), "rows": i.rows} for i in self.plan.inputs},
            "rows": {str(n): rows for n, rows in self.rows().items()},
            "bounds": {n: list(b) for n, b in self.plan.bounds.items()},
            "sites": self.sites(),
            "bytes_per_step": {p: self.sent(p) for p in phases},
            "segments": {p: len(self.plan.phases[p].segments) for p in phases},
            "waits": {p: self.waits(p) for p in phases},
            "engines": self.engines(),
            "weights": {"count": len(self.plan.weights), "bytes": self._weight_bytes()},
            "fallbacks": self.fallbacks(),
            "few_rows": self.few_rows(),
            "quality": self.plan.report.get("quality"),
            "flops": {**self.plan.report.get("flops", {}), "cut_share": self.cut_share()},
            "passes": [dict(p) for p in self.plan.report.get("passes", ())],
            "notes": list(self.plan.report.get("notes", ())),
        }

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._tables()

    def _weight_bytes(self) -> int:
        return sum(w.nbytes for w in self.plan.weights.values())

    def _tables(self) -> Iterator[Any]:
        plan = self.plan
        settings = ", ".join(f"{k} {_plain(v)}" for k, v in plan.options.items() if k not in _UNSHOWN)
        yield escape(f"{plan.ranks} ranks; {settings}" if settings else f"{plan.ranks} ranks")
        shapes = ", ".join(f"{i.path} {tuple(i.spec.shape)}" for i in plan.inputs)
        yield escape(f"inputs: {shapes}")
        yield f"weights: {len(plan.weights)} tensors, {size(self._weight_bytes())}"
        yield self._row_table()
        yield self._site_table()
        yield self._phase_table()
        share = self.cut_share()
        if share is not None:
            yield f"FLOPs divided among the ranks: {share:.1%}"
        fallbacks = self.fallbacks()
        if fallbacks:
            table = _table("computed on gathered inputs (no rule)", "node", "operator", "bytes", "why", "source")
            for f in fallbacks:
                cells = (f.get("node"), f.get("op"), size(int(f.get("bytes") or 0)), f.get("reason"), f.get("source"))
                table.add_row(*(escape(str(c or "")) for c in cells))
            yield table
        else:
            yield "fallbacks: none"
        for note in filter(None, (*plan.report.get("notes", ()), self.few_rows())):
            yield escape(f"note: {note}")

    def _row_table(self) -> Table:
        ranks = range(self.plan.ranks)
        table = _table("rows per rank", "map height", *(f"rank {r}" for r in ranks))
        for n, rows in self.rows().items():
            table.add_row(str(n), *(str(k) for k in rows))
        return table

    def _site_table(self) -> Table:
        table = _table("exchanges", "kind", "sites", "displaced", "sent per rank", "patterns")
        for kind, entry in self.sites().items():
            patterns = ", ".join(f"{n} {p}" for p, n in sorted(entry["patterns"].items()))
            table.add_row(kind, str(entry["count"]), str(entry["displaced"]), _spread(entry["bytes"]), patterns)
        return table

    def _phase_table(self) -> Table:
        table = _table("phases", "phase", "segments", "waits", "sent per rank and step")
        for name in _PHASES:
            if name in self.plan.phases:
                segments = len(self.plan.phases[name].segments)
                table.add_row(name, str(segments), str(self.waits(name)), _spread(self.sent(name)))
        table.caption = f"{self.engines()} distinct engines"
        return table


def phase_text(plan: Plan, phase: Phase) -> str:
    """The steps of one phase, one line each: what runs, what is sent, what is waited for, what is kept."""
    described = plan.phases[phase]
    lines = [f"{phase}: {len(described.steps)} steps, {len(described.segments)} segments, {plan.ranks} ranks"]
    for step in described.steps:
        if isinstance(step, Take):
            rows = ", ".join(f"{a}:{b}" for a, b in zip(step.starts, step.stops, strict=True))
            lines.append(f"take {step.value} = {step.source}[rows {rows}]")
        elif isinstance(step, Run):
            segment = described.segments[step.segment]
            engines = len(set(segment.engines))
            lines.append(
                f"run  {segment.name}({', '.join(segment.inputs)}) -> {', '.join(segment.outputs)}"
                f"  # {len(segment.weights)} weights, {engines} distinct engine{'s' * (engines != 1)}"
            )
        elif isinstance(step, Post):
            lines += [f"post {_collective(plan, name)}" for name in step.collectives]
        elif isinstance(step, Wait):
            lines.append(f"wait {', '.join(step.collectives)}")
        elif isinstance(step, Deliver):
            lines.append(f"got  {', '.join(step.collectives)}  # received inside of the engine, for the next call")
        elif isinstance(step, Keep):
            lines.append(f"keep {step.state} = {step.value}")
    lines.append(f"out  {', '.join(described.outputs)}")
    return "\n".join(lines)


def size(count: float) -> str:
    """``1536`` -> ``"1.5 kB"``; decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _collective(plan: Plan, name: str) -> str:
    c = plan.collectives[name]
    shapes = collections.Counter(s.shape for s in c.specs)
    shape = " | ".join(str(list(s)) for s in shapes)
    how = f"{c.pattern} along dim {c.dim}" if isinstance(c, Exchange) else c.op
    later = ", for the next call" if c.displaced else ""
    sent = _spread([c.sent_bytes(r) for r in range(plan.ranks)])
    return f"{name} = {type(c).__name__.lower()}({c.source} : {shape})  # {c.kind}, {how}, {sent}{later}; {c.site}"


def _spread(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return size(low) if low == high else f"{size(low)} to {size(high)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(str(v) for v in value) or "none"
    return str(value)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or len(columns) == 5 else "right", overflow="fold")
    return table
