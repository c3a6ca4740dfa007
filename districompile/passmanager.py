"""Runs passes: checks what each needs and leaves, records what it did, dumps, stops and skips on request."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import fx

from districompile.errors import ConvertError, Error
from districompile.ir.printer import print_graph
from districompile.ir.verifier import verify
from districompile.unit import Stage, Unit


class Pass(Protocol):
    """A transformation of a unit. A frozen dataclass whose fields are its options; one pass, one file.

    ``name`` is what pipelines, ``--skip`` and ``--stop-after`` call it. ``exact`` says whether results stay the same
    up to rounding. ``needs`` is the stage it works on, ``gives`` the stage it leaves.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[Stage]
    gives: ClassVar[Stage]

    def run(self, unit: Unit) -> None:
        """Transform ``unit`` in place."""


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did: seconds, nodes before and after, and the operators whose number changed."""

    name: str
    phase: str | None
    exact: bool
    seconds: float
    before: int
    after: int
    changed: dict[str, int]


@dataclasses.dataclass
class PassManager:
    """Runs pipelines and keeps their records. ``dump`` is a folder for the graph after every pass."""

    dump: Path | None = None
    stop_after: str | None = None
    skip: tuple[str, ...] = ()
    records: list[PassRecord] = dataclasses.field(default_factory=list)
    stopped: bool = False
    _skipped: set[str] = dataclasses.field(default_factory=set)

    def run(self, unit: Unit, passes: Iterable[Pass]) -> Unit:
        """Run ``passes`` in order, verifying the unit after each. Raises :class:`ConvertError` for a pass out of
        place."""
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

    def _run_one(self, unit: Unit, p: Pass) -> None:
        if unit.stage != p.needs:
            done = ", ".join(r.name for r in self.records) or "none"
            raise ConvertError(
                f"pass {p.name} needs the {p.needs} stage, the graph is {unit.stage} (passes run: {done})"
            )
        counts = _count(unit.graph)
        start = time.perf_counter()
        p.run(unit)
        seconds = time.perf_counter() - start
        unit.stage = p.gives
        try:
            verify(unit)
        except ConvertError as e:
            raise ConvertError(f"after pass {p.name}: {e}") from e
        after = _count(unit.graph)
        changed = {k: after[k] - counts[k] for k in sorted({*counts, *after}) if after[k] != counts[k]}
        record = PassRecord(p.name, unit.phase, p.exact, seconds, sum(counts.values()), sum(after.values()), changed)
        self.records.append(record)
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            phase = f"-{unit.phase}" if unit.phase else ""
            (self.dump / f"{len(self.records):02d}{phase}-{p.name}.txt").write_text(print_graph(unit.graph) + "\n")

    def finish(self) -> None:
        """Raise :class:`ConvertError` where ``stop_after`` or ``skip`` name no pass that was met."""
        met = {r.name for r in self.records} | self._skipped
        for name in (*self.skip, *([self.stop_after] if self.stop_after else [])):
            if name not in met:
                raise ConvertError(f"no pass named {name!r} in this pipeline; there are: {', '.join(sorted(met))}")


def _count(graph: fx.Graph) -> collections.Counter[str]:
    return collections.Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


_ITEM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^}]*)\})?\s*(?:,|$)")


def parse_pipeline(text: str, known: dict[str, type[Any]]) -> list[Pass]:
    """``"drop-noops,segment{parts=4}"`` -> passes. Options are fields of the pass; kinds are joined by ``+``."""
    out: list[Pass] = []
    at = 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if m is None:
            raise ConvertError(
                f"pipeline text cannot be read at {text[at:]!r}: write name or name{{option=value}}, with commas"
            )
        if m[1] not in known:
            raise ConvertError(f"unknown pass {m[1]!r}; there are: {', '.join(sorted(known))}")
        out.append(_construct(known[m[1]], m[2] or ""))
        at = m.end()
    return out


def _construct(cls: type[Any], options: str) -> Pass:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (o.strip() for o in options.split(";"))):
        key, _, value = item.partition("=")
        if key not in fields:
            raise ConvertError(f"pass {cls.name} has no option {key!r}; it has: {', '.join(fields) or 'none'}")
        default = fields[key].default
        if isinstance(default, tuple):
            values[key] = tuple(v for v in value.split("+") if v)
        elif isinstance(default, bool):
            values[key] = value.lower() in ("1", "true", "yes")
        elif isinstance(default, int):
            values[key] = int(value)
        else:
            values[key] = value
    return cast(Pass, cls(**values))


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The text form of a pipeline; options at their defaults are left out."""
    parts = []
    for p in passes:
        options = []
        for f in dataclasses.fields(cast(Any, p)):
            value = getattr(p, f.name)
            if value != f.default:
                options.append(f"{f.name}={'+'.join(value) if isinstance(value, tuple) else value}")
        parts.append(p.name + (f"{{{';'.join(options)}}}" if options else ""))
    return ",".join(parts)


def import_pass(text: str) -> Pass:
    """``"my_pkg.my_pass:MyPass"`` -> an instance. Raises :class:`ConvertError` saying what is wrong with it."""
    module, _, name = text.partition(":")
    if not name:
        raise ConvertError(f"{text!r} names no pass: write module:Class, as in my_pkg.my_pass:MyPass")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as e:
        raise ConvertError(f"pass {text}: {module} cannot be imported ({e})") from e
    except AttributeError:
        raise ConvertError(f"pass {text}: {module} has no {name}") from None
    except (Exception, SystemExit) as e:  # of the user's own code
        raise ConvertError(f"pass {text}: {module} cannot be imported ({type(e).__name__}: {e})") from e
    try:
        found = cls() if isinstance(cls, type) else cls
    except TypeError as e:
        raise ConvertError(f"pass {text} cannot be made without options: {e}") from e
    except Exception as e:  # of the user's own code
        raise ConvertError(f"pass {text} cannot be made: {type(e).__name__}: {e}") from e
    missing = [a for a in ("name", "exact", "needs", "gives", "run") if not hasattr(found, a)]
    if missing:
        raise ConvertError(f"pass {text} lacks {', '.join(missing)}: see docs/writing-a-pass.md")
    return cast(Pass, found)


def import_rules(module: str) -> None:
    """Import a module that registers rules. Raises :class:`ConvertError` if it cannot be."""
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise ConvertError(f"rules {module}: it cannot be imported ({e})") from e
    except Error:
        raise
    except (Exception, SystemExit) as e:  # of the user's own code, or of a name that is none
        raise ConvertError(f"rules {module}: it cannot be imported ({type(e).__name__}: {e})") from e
