# SPDX-License-Identifier: Apache-2.0
"""The pass manager: run passes, check stages, verify the graph, keep records, write dumps, stop and skip on request."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import fx

from districompile.errors import ConvertError, Error
from districompile.ir.dump import GraphDump
from districompile.ir.unit import CompilationUnit, Stage
from districompile.ir.verifier import verify
from districompile.plan.plan_report import PassRecord


class Pass(Protocol):
    """A transformation of a compilation unit: a frozen dataclass whose fields are its options.

    Each pass has a file of its own. ``name`` is its name for ``--passes``, ``--skip`` and ``--stop-after``. ``exact``
    states that results stay the same up to rounding. ``needs`` is the stage that it works on, ``gives`` the stage that
    it leaves.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    def run(self, unit: CompilationUnit) -> None:
        """Transform ``unit`` in place."""


@dataclasses.dataclass
class PassManager:
    """A runner of passes that keeps their records. ``dump`` is a folder for the graph after every pass."""

    dump: Path | None = None
    stop_after: str | None = None
    skip: tuple[str, ...] = ()
    records: list[PassRecord] = dataclasses.field(default_factory=list)
    stopped: bool = False
    _skipped: set[str] = dataclasses.field(default_factory=set)
    _dumper: GraphDump | None = None

    def run(self, unit: CompilationUnit, passes: Iterable[Pass]) -> CompilationUnit:
        """Run ``passes`` in order, and verify the unit after each.

        Raise :class:`ConvertError` for a pass at the wrong stage, for a pass that leaves an invalid graph, and for any
        exception in a pass of the user's own, which is its cause.
        """
        for p in passes:
            if self.stopped:
                break
            if p.name in self.skip:
                if p.needs != p.gives:
                    raise ConvertError(f"pass {p.name} cannot be skipped: later passes need the {p.gives} stage")
                self._skipped.add(p.name)
                continue
            self._run_one(unit, p)
            self.stopped = p.name == self.stop_after
        return unit

    def _run_one(self, unit: CompilationUnit, p: Pass) -> None:
        if unit.stage != p.needs:
            done = ", ".join(r.name for r in self.records) or "none"
            raise ConvertError(
                f"pass {p.name} needs the {p.needs} stage, the graph is {unit.stage} (passes run: {done})"
            )
        if self.dump is not None and self._dumper is None:
            self._dumper = GraphDump(self.dump)
            self._dumper.captured(unit)
        counts = _count(unit.graph)
        start = time.perf_counter()
        try:
            p.run(unit)
        except Error:
            raise
        except Exception as e:
            if is_built_in(p):
                raise
            raise ConvertError(f"pass {pass_text(p)} failed: {type(e).__name__}: {e}") from e
        seconds = time.perf_counter() - start
        unit.stage = p.gives
        try:
            verify(unit)
        except ConvertError as e:
            raise ConvertError(f"after pass {p.name}: {e}") from e
        after = _count(unit.graph)
        changed = {k: after[k] - counts[k] for k in sorted({*counts, *after}) if after[k] != counts[k]}
        sizes = sum(counts.values()), sum(after.values())
        record = PassRecord(p.name, unit.phase, p.exact, seconds, *sizes, changed, pass_text(p), is_built_in(p))
        self.records.append(record)
        if self._dumper is not None:
            self._dumper.after(p.name, unit)

    def finish(self) -> None:
        """Raise :class:`ConvertError` where ``stop_after`` or ``skip`` names a pass that is not in the pipeline."""
        known = {r.name for r in self.records} | self._skipped
        for name in (*self.skip, *([self.stop_after] if self.stop_after else [])):
            if name not in known:
                raise ConvertError(f"no pass named {name!r} in this pipeline; there are: {', '.join(sorted(known))}")


def _count(graph: fx.Graph) -> collections.Counter[str]:
    return collections.Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


def pass_text(p: Pass) -> str:
    """Return a pass as text, with the options that differ from their defaults: ``choose-displaced{purposes=conv}``."""
    options = []
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cast(Any, p)) if dataclasses.is_dataclass(p) else ()
    for f in fields:
        value = getattr(p, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if value != default:
            options.append(f"{f.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return p.name + (f"{{{';'.join(options)}}}" if options else "")


def is_built_in(p: Pass) -> bool:
    """Return whether a pass ships with the package."""
    return type(p).__module__.startswith("districompile.passes.")
