"""What is exact and how much is cut, family by family: runs small configurations of many networks on all ranks in this
process and writes ``docs/coverage.md``.

    python tools/coverage.py                          all families on 2, 3, 4 and 8 ranks
    python tools/coverage.py --ranks 2,3 --only sdxl,svd --out /tmp/coverage.md
    python tools/coverage.py --json                   one JSON line a measurement, too
    python tools/coverage.py --write a.json b.json    the page of several runs

Exits with 1 where something is not exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from districompile.errors import Error  # noqa: E402
from tests.families.base import Family  # noqa: E402
from tests.families.measure import Measured, load_families, measure  # noqa: E402

HEADER = """# Coverage

Written by `tools/coverage.py`: small configurations of networks that people use, with random parameters, all ranks in
one process, float32, on a CPU. One line a family and number of ranks.

- **exact**: relative error of the exact phase against the network itself; 1e-5 is the limit.
- **steady**: relative error of the displaced phase after so many calls on unchanging inputs, having
  started from others.
- **cut**: the part of the FLOPs (convolutions, matrix products, attention) that is divided among the ranks. What every
  rank does counts as not cut: rows computed twice, text tokens beside the image's, maps with fewer rows than ranks.
- **few rows**: operators computed on every rank because their map has fewer rows than there are ranks. These networks
  are tiny (a deepest map of 4 to 8 rows); most real ones have 8 rows or more there.
- **fallbacks**: operators computed on gathered inputs, and why.
"""


def main() -> int:
    """Run what was asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,3,4,8")
    parser.add_argument("--steady", default="3", help="for which numbers of ranks the displaced phase runs, too")
    parser.add_argument("--only", default="", help="families, with commas")
    parser.add_argument("--even", action="store_true", help="the size whose rows divide evenly")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--write", type=Path, nargs="+", help="run nothing: write the page of these files of JSON lines"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    options = parser.parse_args()
    if options.write:
        lines = [line for file in options.write for line in file.read_text().splitlines()]
        found = [_read(line) for line in lines if line.startswith("{")]  # networks print, too
        order = {name: i for i, name in enumerate(load_families())}
        _write(options.out, page(sorted(found, key=lambda r: order.get(r.family, len(order))), []))
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ranks = [int(r) for r in options.ranks.split(",")]
    steady = [int(r) for r in options.steady.split(",") if r]
    known = load_families()
    chosen = [known[n] for n in options.only.split(",")] if options.only else list(known.values())
    results: list[Measured] = []
    refused: list[tuple[str, str]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("families", total=len(chosen))
        for family in chosen:
            bar.update(task, description=family.name)
            try:
                for result in measure(family, _size(family, options.even), ranks, steady):
                    results.append(result)
                    if options.json:
                        print(json.dumps(dataclasses.asdict(result)), flush=True)
            except Error as e:
                refused.append((family.name, str(e)))
            bar.advance(task)
    _write(options.out, page(results, refused))
    wrong = [r for r in results if not r.exact <= 1e-5]
    for r in wrong:
        print(f"{r.family} on {r.ranks} ranks is off by {r.exact:.1e}")
    return 1 if wrong else 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _read(line: str) -> Measured:
    found = json.loads(line)
    return Measured(**{**found, "size": tuple(found["size"])})


def _size(family: Family, even: bool) -> tuple[int, int]:
    return family.sizes[-1 if even else 0]


def page(results: Sequence[Measured], refused: Sequence[tuple[str, str]]) -> str:
    """The page, as Markdown."""
    lines = [HEADER]
    worst = max((r.exact for r in results), default=0.0)
    names = {r.family for r in results}
    lines.append(
        f"{len(names)} families, {len(results)} measurements; the largest error of an exact phase is {worst:.1e}.\n"
    )
    short = [r for r in results if r.share < r.required]
    if short:
        lines.append(
            "Where less is cut than it should be (98 % for diffusers' UNets and autoencoders, 95 % for others):\n"
        )
        for r in short:
            why = "see its fallbacks" if r.fallbacks else "rows that two ranks compute, at the borders of tiny maps"
            if r.replicated:
                why = f"{r.replicated} operators on maps with fewer rows than ranks"
            lines.append(f"- {r.family} on {r.ranks} ranks: {r.share:.1%} ({why})")
        lines.append("")
    for name, reason in refused:
        lines.append(f"- {name}: refused: {reason}")
    for group, members in itertools.groupby(results, key=lambda r: r.group):
        lines += [
            f"\n## {group}\n",
            "| family | rows x columns | ranks | exact | steady | cut | few rows | fallbacks |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for r in members:
            converged = "" if r.steady is None else f"{r.steady:.1e} after {r.steps}"
            falls = "; ".join(f"{n} {why}" if n > 1 else why for why, n in r.fallbacks.items())
            lines.append(
                f"| {r.family} | {r.size[0]} x {r.size[1]} | {r.ranks} | {r.exact:.1e} | {converged} | {r.share:.1%} "
                f"| {r.replicated or ''} | {falls} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
