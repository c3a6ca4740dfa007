# SPDX-License-Identifier: Apache-2.0
"""Write ``docs/kernels.md``: where the custom kernels are faster than libraries, of the lines of ``bench_kernels.py``.

python tools/bench_kernels.py > FILE
python tools/kernels_page.py docs/measurements/kernels-h200.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
GAIN = 0.03  # a custom kernel stays where it takes this much less time than the best library
LIBRARIES = ("default", "cuDNN", "FlashAttention-2", "efficient", "flex", "FlashAttention-3", "FlashAttention-4")
Line = dict[str, Any]

Wanted = Callable[[Line], bool]
KERNELS: dict[
    str, tuple[str, Wanted, str]
] = {  # by the name in the table: part of bench_kernels.py, which of its lines, and what it is compared with
    "attention to few keys": ("attention", lambda d: d["keys"] <= 128, "every library of attention"),
    "attention to many keys": ("attention", lambda d: d["keys"] > 128, "every library of attention"),
    "projection of queries and attention": ("projection", lambda _: True, "the same as two kernels, the best of each"),
    "product whose columns go to two places": ("split", lambda _: True, "one product and a copy, or two products"),
    "gated linear layer": ("gated", lambda _: True, "a product and a pointwise kernel"),
    "convolution": ("convolutions", lambda _: True, "cuDNN, and a product of a written matrix"),
    "linear layer in 8 bits": ("fp8", lambda d: "rows" in d and not d["gated"], "the library's in 8 bits, and 16 bits"),
    "gated linear layer in 8 bits": (
        "fp8",
        lambda d: bool(d.get("gated")),
        "the library's in 8 bits, and the best in 16",
    ),
    "convolution in 8 bits": ("fp8", lambda d: "in" in d, "cuDNN and the best in 16 bits"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines of bench_kernels.py")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.file.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{args.file} has no line of bench_kernels.py")
    args.out.write_text("\n".join(page(lines)) + "\n")


def times(line: Line) -> tuple[dict[str, float], dict[str, float]]:
    """Return the microseconds of libraries, and those of the custom kernel by configuration."""
    attention = line["part"] == "attention"
    library: dict[str, float] = {}
    custom: dict[str, float] = {}
    for name, us in line["us"].items():
        if name in ("baseline", "sixteen", "()") or (attention and not name.startswith("custom")):
            library["default" if attention and name == "baseline" else name] = us
        else:
            custom[name.removeprefix("custom ")] = us
    return library, custom


def gains(lines: Iterable[Line]) -> list[float]:
    """Return by how much less time the custom kernel takes than the best library, for each size that it computes."""
    found = [times(line) for line in lines]
    return [1 - min(custom.values()) / min(library.values()) for library, custom in found if custom]


def page(lines: Sequence[Line]) -> Iterator[str]:
    where = sorted({f"{line['gpu']}, torch {line['torch']}" for line in lines})
    yield from (
        "# Kernels and libraries", "",
        "Written by `tools/kernels_page.py` of what `tools/bench_kernels.py` prints. float16, microseconds in CUDA",
        "graphs, all ways of a size in turns, the least of twelve. Each table is of one call of the tool, on one",
        f"{'; '.join(where)}.", "",
        "A conversion times each size of a network on its own GPU, and takes what is fastest there. So a custom kernel",
        f"is used where it takes {GAIN:.0%} less time than everything else. This page says where that was.", "",
        "| custom kernel | faster than the best library by more than 3 % | gain there | compared with |",
        "| --- | --- | --- | --- |",
    )  # fmt: skip
    for name, (part, wanted, others) in KERNELS.items():
        found = gains(line for line in lines if line["part"] == part and wanted(line))
        won = [g for g in found if g > GAIN]
        if found:
            span = f"{min(won):.0%} to {max(won):.0%}" if won else "-"
            yield f"| {name} | {len(won)} of {len(found)} sizes | {span} | {others} |"
    attention = [line for line in lines if line["part"] == "attention"]
    if attention:
        yield from _attention(attention)
    for part, title in (("fp8", "Layers in 8 bits"), ("gated", "Gated linear layers"), ("convolutions", "Convolutions"),
                        ("split", "Products whose columns go to two places"),
                        ("projection", "Projection of queries and attention to a text")):  # fmt: skip
        chosen = [line for line in lines if line["part"] == part]
        if chosen:
            yield from ("", f"## {title}", "", *_layers(chosen, part))


def _attention(lines: Sequence[Line]) -> Iterator[str]:
    shown = [name for name in LIBRARIES if any(name in times(line)[0] for line in lines)]
    yield from (
        "", "## Attention", "",
        "Of one of two ranks, unless the name says otherwise: its queries, and the keys of all ranks. `default` is",
        "what PyTorch chooses by itself, `efficient` its memory-efficient kernel, `flex` compiled FlexAttention.",
        "Empty: it does not compute this. The fastest is in bold.", "",
        f"| size | queries x keys, heads x width | {' | '.join(shown)} | custom |",
        "| --- | --- |" + " --- |" * (len(shown) + 1),
    )  # fmt: skip
    for line in lines:
        library, custom = times(line)
        row = {**library, **({"custom": min(custom.values())} if custom else {})}
        best = min(row.values())
        cells = (_number(row.get(name), best) for name in (*shown, "custom"))
        heads = f"{line['heads']} x {line['width']}" + (f", {line['groups']} of keys" if line["groups"] else "")
        mask = "" if line["mask"] == "none" else f", {line['mask']}"
        size = f"{line['batch']} x {line['queries']} x {line['keys']}, {heads}{mask}"
        yield f"| {line['name']} | {size} | {' | '.join(cells)} |"


def _layers(lines: Sequence[Line], part: str) -> Iterator[str]:
    names = {"baseline": "library", "()": "im2col" if part == "convolutions" else "two products", "sixteen": "16 bits"}
    shown = [name for name in names if any(name in line["us"] for line in lines)]
    yield f"| size | {' | '.join(names[n] for n in shown)} | custom |"
    yield "| --- |" + " --- |" * (len(shown) + 1)
    for line in lines:
        library, custom = times(line)
        row = {**library, **({"custom": min(custom.values())} if custom else {})}
        best = min(row.values())
        yield f"| {_size(line)} | {' | '.join(_number(row.get(name), best) for name in (*shown, 'custom'))} |"


def _size(line: Line) -> str:
    if "in" in line:
        return f"{line['in']} to {line['out']} channels, {line['height']} x {line['width']} pixels"
    if "queries" in line:
        return f"{line['queries']} queries, {line['heads']} heads of 64, {line['keys']} keys"
    columns = f" to {line['columns']}" if "columns" in line else ""
    return f"{line['rows']} rows, {line['inner']}{columns}" + (", gated" if line.get("gated") else "")


def _number(us: float | None, best: float) -> str:
    if us is None:
        return ""
    text = f"{us:.1f}" if us < 100 else f"{us:.0f}"
    return f"**{text}**" if us == best else text


if __name__ == "__main__":
    main()
