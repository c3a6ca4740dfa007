# SPDX-License-Identifier: Apache-2.0
"""Measure exactness and sharding of many networks, and write ``docs/coverage.md``.

Small configurations of the networks are converted and run, all ranks in this process.

    python tools/coverage.py                          all families on 2, 3, 4 and 8 ranks
    python tools/coverage.py --ranks 2,3 --only sdxl,svd --out /tmp/coverage.md
    python tools/coverage.py --json                   print a line of JSON for each measurement as well
    python tools/coverage.py --write a.json b.json    write the page of several runs, and run nothing

The exit code is 1 if a family is not exact.
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

Written by `tools/coverage.py`. Networks that people use, in small configurations with random parameters, are converted
and run in float32 on a CPU, all ranks in one process. The tables have one line for each family and number of ranks.

- **exact**: the relative error of the exact phase against the network itself. The limit is 1e-5.
- **displaced**: the relative error of the displaced phase, and the number of calls with constant inputs that it took.
  The calls before had other inputs.
- **cut**: the part of the FLOPs (convolutions, matrix products, attention) that is divided among the ranks. Work that
  every rank does counts as not divided: rows that two ranks compute, maps with fewer rows than ranks, and tokens
  beside the image's where there are fewer of them than ranks.
- **few rows**: the number of operators that every rank computes, because their map has fewer rows than there are ranks.
  The lowest maps of these small networks have 4 to 8 rows. Most real networks have 8 rows or more there.
- **fallbacks**: operators that are computed on gathered inputs, with the reason.
"""


def main() -> int:
    """Measure the selected families and write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,3,4,8", help="numbers of ranks [default: %(default)s]")
    parser.add_argument(
        "--displaced",
        default="3",
        help="numbers of ranks for which the displaced phase runs, too [default: %(default)s]",
    )
    parser.add_argument("--only", default="", help="names of families, separated by commas [default: all]")
    parser.add_argument("--even", action="store_true", help="use the size whose rows divide evenly")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each measurement")
    parser.add_argument("--write", type=Path, nargs="+", help="files of JSON lines: write their page, and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md", help="the page to write")
    options = parser.parse_args()
    if options.write:
        lines = [line for file in options.write for line in file.read_text().splitlines()]
        found = [_read(line) for line in lines if line.startswith("{")]  # some networks print lines of their own
        order = {name: i for i, name in enumerate(load_families())}
        _write(options.out, page(sorted(found, key=lambda r: order.get(r.family, len(order))), []))
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ranks = [int(r) for r in options.ranks.split(",")]
    displaced = [int(r) for r in options.displaced.split(",") if r]
    known = load_families()
    chosen = [known[n] for n in options.only.split(",")] if options.only else list(known.values())
    results: list[Measured] = []
    refused: list[tuple[str, str]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("families", total=len(chosen))
        for family in chosen:
            bar.update(task, description=family.name)
            try:
                for result in measure(family, _size(family, options.even), ranks, displaced):
                    results.append(result)
                    if options.json:
                        print(json.dumps(dataclasses.asdict(result)), flush=True)
            except Error as e:
                refused.append((family.name, str(e)))
            bar.advance(task)
    _write(options.out, page(results, refused))
    wrong = [r for r in results if not r.exact <= 1e-5]
    for r in wrong:
        print(f"{r.family} on {r.ranks} ranks has an error of {r.exact:.1e}")
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
    """Return the page as Markdown. ``refused`` are families that cannot be converted, with the reason."""
    lines = [HEADER]
    worst = max((r.exact for r in results), default=0.0)
    names = {r.family for r in results}
    lines.append(
        f"{len(names)} families, {len(results)} measurements; the largest error of an exact phase is {worst:.1e}.\n"
    )
    short = [r for r in results if r.share < r.required]
    if short:
        lines.append(
            "Less is divided than the limit (98 % for diffusers' UNets and autoencoders, 95 % for others) here:\n"
        )
        for r in short:
            why = "see its fallbacks" if r.fallbacks else "rows that two ranks compute, at the borders of small maps"
            if r.replicated:
                why = f"{r.replicated} operators on maps with fewer rows than ranks"
            lines.append(f"- {r.family} on {r.ranks} ranks: {r.share:.1%} ({why})")
        lines.append("")
    for name, reason in refused:
        lines.append(f"- {name} cannot be converted: {reason}")
    for group, members in itertools.groupby(results, key=lambda r: r.group):
        lines += [
            f"\n## {group}\n",
            "| family | rows x columns | ranks | exact | displaced | cut | few rows | fallbacks |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for r in members:
            converged = "" if r.displaced is None else f"{r.displaced:.1e} after {r.steps}"
            falls = "; ".join(f"{n} {why}" if n > 1 else why for why, n in r.fallbacks.items())
            lines.append(
                f"| {r.family} | {r.size[0]} x {r.size[1]} | {r.ranks} | {r.exact:.1e} | {converged} | {r.share:.1%} "
                f"| {r.replicated or ''} | {falls} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
