# SPDX-License-Identifier: Apache-2.0
"""Reports of a compiled model, for people and for scripts, and its steps as text.

Everything is read from the plan alone, so that a bundle on disk gives the same report as the program.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from districompile.ir.report_builder import NOT_FASTER, Tokens
from districompile.ir.spec import PHASES, Phase
from districompile.plan.plan import Exchange, ExecutionPlan, SaveState, Start, Wait

_FEW_ROWS = 4  # with fewer, a convolution of 3 rows reads more than a third of the previous step
_UNSHOWN = ("ranks", "cfg_inputs", "conditioning", "example_timestep")  # shown elsewhere, or of no interest to people
# The words of the report, in the order in which they appear
WORDS = {
    "rank": "one of the processes that share an image; each has a GPU, or a part of the CPU",
    "rows": "a feature map is divided along its height: each rank owns some rows",
    "fallback": "an operator without a rule, computed by every rank on the gathered whole input",
    "exact": "phase whose exchanges carry values of this step: it computes what one device computes",
    "displaced": "phase whose exchanges carry values of the previous step, so that ranks need not wait",
    "transfer": "rows (exchange) or sums (reduction) that ranks send each other; the purpose is what it serves",
    "neighbour": "pattern of a transfer between ranks with adjacent rows; all_gather: from every rank to every rank",
    "wait": "a point where a rank needs what others sent before it can go on",
    "segment": "a part of the graph that is one engine; transfers start and end between segments",
    "engine": "a compiled segment, stored once for all ranks whose code is equal",
}
REUSED = "displaced step that keeps what deep levels or middle blocks gave in the last full step"


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a plan, in sections: model, bits, partition, transfers, engines, memory, passes, quality, words.

    ``str(report)`` is text, ``to_dict()`` plain data, and a rich console prints tables. All byte counts are for one
    call of the model. ``explain`` adds the section that explains the words.
    """

    plan: ExecutionPlan
    explain: bool = True

    def rows(self) -> dict[int, list[int]]:
        """Return the rows that each rank owns, for every height of a sharded map, tallest first."""
        bounds = sorted(((int(n), b) for n, b in self.plan.bounds.items()), reverse=True)
        return {n: [b[r + 1] - b[r] for r in range(self.plan.ranks)] for n, b in bounds}

    def sites(self) -> dict[str, dict[str, Any]]:
        """Return, by purpose, the number of collectives, how many are displaced, and the bytes that each rank sends."""
        found: dict[str, dict[str, Any]] = {}
        differences = self.plan.report.differences
        in_eight_bits = set(differences.values())  # counted as they are in the exact phase
        for c in self.plan.collectives.values():
            if c.name in differences:
                continue
            entry = found.setdefault(
                c.purpose, {"count": 0, "displaced": 0, "bytes": [0] * self.plan.ranks, "patterns": {}}
            )
            entry["count"] += 1
            entry["displaced"] += int(c.displaced or c.name in in_eight_bits)
            pattern = c.pattern if isinstance(c, Exchange) else f"reduce {c.op}"
            entry["patterns"][pattern] = entry["patterns"].get(pattern, 0) + 1
            for r in range(self.plan.ranks):
                entry["bytes"][r] += c.sent_bytes(r)
        return dict(sorted(found.items()))

    def sent(self, phase: Phase) -> list[int]:
        """Return the bytes that each rank sends in one call of ``phase``.

        With collectives inside of engines this is a lower bound: an all-gather there sends everything to every rank.
        """
        names = self._collectives(phase)
        return [sum(self.plan.collectives[n].sent_bytes(r) for n in names) for r in range(self.plan.ranks)]

    def crossing(self, phase: Phase, machines: Sequence[int]) -> dict[int, int]:
        """Return the bytes that each machine sends to the others in one call of ``phase``.

        ``machines`` has the machine of each rank.
        """
        found = dict.fromkeys(machines, 0)
        for name in self._collectives(phase):
            collective = self.plan.collectives[name]
            for src, here in enumerate(machines):
                for dst, there in enumerate(machines):
                    if here != there:
                        found[here] += collective.bytes_between(src, dst)
        return found

    def _collectives(self, phase: Phase) -> list[str]:
        """Return the names of the collectives of one call, each as often as it is started."""
        if phase == "exact" and self.plan.options.collectives == "inside":
            return list(self.plan.collectives)
        return [n for s in self.plan.phases[phase].steps if isinstance(s, Start) for n in s.collectives]

    def sent_in_full(self, phase: Phase) -> list[int]:
        """Return the bytes that :meth:`sent` would be if differences of 8 bits were sent in full."""
        posts = [n for s in self.plan.phases[phase].steps if isinstance(s, Start) for n in s.collectives]
        names = [self.plan.report.differences.get(n, n) for n in posts]
        return [sum(self.plan.collectives[n].sent_bytes(r) for n in names) for r in range(self.plan.ranks)]

    def reuse_line(self) -> str | None:
        """Return what reused steps compute and keep, as a sentence, or None without reuse."""
        reuse, every = self.plan.report.reuse, self.plan.options.reuse
        if reuse is None or every is None:
            return None
        what = (
            f"{reuse.level} level{'s' * (reuse.level > 1)}"
            if reuse.kind == "levels"
            else (f"{reuse.level} block{'s' * (reuse.level > 1)} at either end of each stack")
        )
        names = [k.module_path for k in reuse.kept]
        shown = ", ".join(dict.fromkeys(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        average = (1 + (every - 1) * reuse.share) / every
        return (
            f"reuse: 1 in {every} later steps is full; the others compute {what}, {reuse.share:.1%} of its FLOPs "
            f"({average:.1%} on average), and keep {shown}"
        )

    def waits(self, phase: Phase) -> int:
        """Return how many times a call of ``phase`` waits for other ranks."""
        return sum(isinstance(s, Wait) for s in self.plan.phases[phase].steps)

    def engines(self) -> int:
        """Return the number of distinct engines, over all phases and ranks."""
        return len({e for p in self.plan.phases.values() for s in p.segments.values() for e in s.engines})

    def fallbacks(self) -> list[dict[str, Any]]:
        """Return the operators without a rule, which are computed on gathered inputs: place, reason, bytes."""
        return [dataclasses.asdict(f) for f in self.plan.report.fallbacks]

    def cut_share(self) -> float | None:
        """Return the share of FLOPs that is divided among the ranks, 0 to 1, or None where it was not counted."""
        flops = self.plan.report.flops
        if flops is None or not flops.cut + flops.whole:
            return None
        return flops.cut / (flops.cut + flops.whole)

    def few_rows(self) -> str | None:
        """Return a warning where a rank has so few rows that displaced steps read mostly old values, else None.

        Of the rows that a 3-row window reads on a rank with n rows, 2 of n + 2 are the previous step's.
        """
        displaced = any(
            isinstance(c, Exchange) and c.displaced and c.purpose == "conv" for c in self.plan.collectives.values()
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
        """Return plain data for JSON; docs/cli.md documents the keys."""
        phases = [p for p in PHASES if p in self.plan.phases]
        found = self.plan.report
        return {
            "ranks": self.plan.ranks,
            "options": self.plan.options.to_dict(),
            "inputs": {i.path: {"shape": list(i.spec.shape), "rows": i.rows} for i in self.plan.inputs},
            "rows": {str(n): rows for n, rows in self.rows().items()},
            "bounds": {n: list(b) for n, b in self.plan.bounds.items()},
            "sites": self.sites(),
            "bytes_per_step": {p: self.sent(p) for p in phases},
            **({} if found.reuse is None else {"reuse": dataclasses.asdict(found.reuse)}),
            **({} if not found.differences else {"bytes_in_full": {p: self.sent_in_full(p) for p in phases}}),
            "segments": {p: len(self.plan.phases[p].segments) for p in phases},
            "waits": {p: self.waits(p) for p in phases},
            "engines": self.engines(),
            "weights": {"count": len(self.plan.weights), "bytes": self._weight_bytes()},
            "memory": self.memory(),
            "fallbacks": self.fallbacks(),
            "few_rows": self.few_rows(),
            "no_timestep": self.no_timestep(),
            "quantised": [dataclasses.asdict(x) for x in found.quantised],
            "tokens": None if found.tokens is None else dataclasses.asdict(found.tokens),
            "quality": None if found.quality is None else dataclasses.asdict(found.quality),
            "flops": {**(dataclasses.asdict(found.flops) if found.flops else {}), "cut_share": self.cut_share()},
            "passes": [dataclasses.asdict(p) for p in found.passes],
        }

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._tables()

    def memory(self) -> dict[str, list[int]]:
        """Return bytes per rank: ``weights``, ``received`` (buffers of transfers, each counted once), and ``saved``
        (values of one step for the next). Activations are not included."""
        ranks = range(self.plan.ranks)
        received = [sum(c.results[r].nbytes for c in self.plan.collectives.values()) for r in ranks]
        saved = [0 for _ in ranks]
        seen: set[str] = set()
        for phase in self.plan.phases.values():
            for step in phase.steps:
                if isinstance(step, SaveState) and step.state not in seen and step.value in phase.values:
                    seen.add(step.state)
                    saved = [n + phase.values[step.value][r].nbytes for r, n in enumerate(saved)]
        return {"weights": [self._weight_bytes() for _ in ranks], "received": received, "saved": saved}

    def _weight_bytes(self) -> int:
        return sum(w.nbytes for w in self.plan.weights.values())

    def _tables(self) -> Iterator[RenderableType]:
        sections = (
            ("MODEL", self._model), ("BITS", self._bit_lines), ("PARTITION", self._partition),
            ("TRANSFERS", self._transfers), ("ENGINES", self._engine_lines), ("MEMORY", self._memory_lines),
            ("PASSES", self._pass_lines), ("QUALITY", self._quality_lines), ("WORDS", self._words),
        )  # fmt: skip
        for number, (title, section) in enumerate(sections):
            content = list(section())
            if content:
                yield f"{chr(10) if number else ''}{title}"
                yield from content

    def _model(self) -> Iterator[RenderableType]:
        yield Text("inputs: " + ", ".join(f"{i.path} {tuple(i.spec.shape)}" for i in self.plan.inputs))
        yield Text(f"weights: {len(self.plan.weights)} tensors, {size(self._weight_bytes())}")

    def _bit_lines(self) -> Iterator[RenderableType]:
        layers = self.plan.report.quantised
        if not layers:
            return
        in_f8 = [x for x in layers if x.reason is None]
        stored = sum(self.plan.weights[x.values_name].nbytes for x in in_f8 if x.values_name in self.plan.weights)
        slow = sum(x.reason == NOT_FASTER for x in layers)
        why = f"; {slow} are not faster in 8 bits" if slow else ""
        yield Text(f"{len(in_f8)} of {len(layers)} layers in 8 bits, {size(stored)} of the weights{why}")
        if self.explain:
            table = _table("layers", "module", "in 8 bits", "its own signal to noise", "why not")
            for x in layers:
                snr = "" if x.snr is None else f"{x.snr:.1f} dB"
                table.add_row(escape(x.module), "no" if x.reason else "yes", snr, escape(x.reason or ""))
            yield table

    def _partition(self) -> Iterator[RenderableType]:
        settings = ", ".join(f"{k} {_plain(v)}" for k, v in self.plan.options.to_dict().items() if k not in _UNSHOWN)
        yield Text(f"{self.plan.ranks} ranks" + (f"; {settings}" if settings else ""))
        yield self._row_table()
        share = self.cut_share()
        if share is not None:
            yield Text(f"FLOPs divided among the ranks: {share:.1%}")
        reuse = self.reuse_line()
        if reuse is not None:
            yield Text(reuse)
        if self.plan.report.tokens is not None:
            yield Text(_token_line(self.plan.report.tokens))
        if self.plan.report.fallbacks:
            table = _table("fallbacks", "node", "operator", "bytes", "why", "source")
            for f in self.plan.report.fallbacks:
                table.add_row(*map(escape, (f.node, f.op, size(f.bytes), f.reason, f.source)))
            yield table
        else:
            yield Text("fallbacks: none")
        for note in (self.few_rows(), self.no_timestep()):
            if note is not None:
                yield Text(f"note: {note}")

    def no_timestep(self) -> str | None:
        """Say that all calls are exact because no input is known as the time of a step, though some may be it."""
        small = [i.path for i in self.plan.inputs if i.rows is None and len(i.spec.shape) < 2]
        if not small or self.plan.timestep_path is not None:
            return None
        return (
            f"all calls are exact, as no input is known as the time of a step: if it is {' or '.join(small)}, name it "
            "(--timestep, in Python timestep=)"
        )

    def _transfers(self) -> Iterator[RenderableType]:
        if self.plan.collectives:
            yield self._site_table()
        if self.plan.phases:
            yield self._phase_table()
        if self.plan.report.differences and "displaced" in self.plan.phases:
            sent, full = (max(f("displaced")) for f in (self.sent, self.sent_in_full))
            yield Text(f"differences of 8 bits: a displaced step sends {size(sent)} per rank instead of {size(full)}")

    def _engine_lines(self) -> Iterator[RenderableType]:
        for name in PHASES:
            if name in self.plan.phases:
                count = len(self.plan.phases[name].segments)
                yield Text(f"{name} step: {count} segment{'s' * (count != 1)}")
        if self.plan.phases:
            yield Text(f"{self.engines()} distinct engines")

    def _memory_lines(self) -> Iterator[RenderableType]:
        if not self.plan.phases:
            return
        memory = self.memory()
        yield Text(f"weights: {spread(memory['weights'])} per rank")
        yield Text(f"received from other ranks: {spread(memory['received'])} per rank; some of it is double-buffered")
        yield Text(f"saved for the next step: {spread(memory['saved'])} per rank")
        yield Text("activations are not counted here: districompile bench measures the peak on a GPU")

    def _pass_lines(self) -> Iterator[RenderableType]:
        shown = []
        for p in self.plan.report.passes:
            notes = ([f"{p.phase} phase"] if p.phase else []) + ([] if p.exact else ["changes numerics"])
            shown.append(p.name + (f" ({', '.join(notes)})" if notes else ""))
        if shown:
            yield Text("passes: " + ", ".join(shown))

    def _quality_lines(self) -> Iterator[RenderableType]:
        quality = self.plan.report.quality
        if quality is None:
            return
        yield Text(f"quality floor {quality.floor_db}, {quality.steps} steps; trials, cheapest first:")
        for t in quality.trials:
            exact = "" if t.exact_steps is None else f", {t.exact_steps:.1f} exact steps"
            chosen = "  <- chosen" if t.good else ""
            yield Text(
                f"  {t.candidate}: worst {t.worst_db:.1f} dB ({t.worst}), mean {t.mean_db:.1f} dB{exact}{chosen}"
            )

    def _words(self) -> Iterator[RenderableType]:
        if self.explain:
            reused = {} if self.plan.report.reuse is None else {"reused": REUSED}
            for word, meaning in (WORDS | reused).items():
                yield Text(f"{word}: {meaning}")

    def _row_table(self) -> Table:
        ranks = range(self.plan.ranks)
        table = _table("rows per rank", "map height", *(f"rank {r}" for r in ranks))
        for n, rows in self.rows().items():
            table.add_row(str(n), *(str(k) for k in rows))
        return table

    def _site_table(self) -> Table:
        table = _table("transfers by purpose", "purpose", "number", "displaced", "sent per rank", "patterns")
        for purpose, entry in self.sites().items():
            patterns = ", ".join(f"{n} {p}" for p, n in sorted(entry["patterns"].items()))
            table.add_row(purpose, str(entry["count"]), str(entry["displaced"]), spread(entry["bytes"]), patterns)
        return table

    def _phase_table(self) -> Table:
        table = _table("in one step", "phase", "waits", "sent per rank")
        for name in PHASES:
            if name in self.plan.phases:
                table.add_row(name, str(self.waits(name)), spread(self.sent(name)))
        return table


def size(count: float) -> str:
    """``1536`` -> ``"1.5 kB"``; decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spread(counts: Sequence[int]) -> str:
    """Return the range of byte counts as text: ``1.5 kB``, or ``1.5 kB to 2.0 kB``."""
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


def _token_line(tokens: Tokens) -> str:
    """Describe what became of the tokens beside the image's."""
    names = ", ".join(f"{name} ({count})" for name, count in tokens.sequences.items())
    gain = f"{tokens.flops / 1e9:.3g} GFLOPs less on each rank"
    price = f"{tokens.bytes / 1e6:.3g} MB and {tokens.transfers} transfers more"
    if tokens.divided:
        return f"tokens beside the image's, divided as well: {names}; {gain}, {price} in an exact step"
    return f"tokens beside the image's, on every rank: {names}; divided: {gain}, but {price}"
