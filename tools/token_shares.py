# SPDX-License-Identifier: Apache-2.0
"""Count how much of a transformer's work is divided among the ranks, at full size and without weights.

    python tools/token_shares.py > shares.jsonl       print a line of JSON for each model, size and number of ranks
    python tools/token_shares.py --only flux-1024     some models
    python tools/token_shares.py --table shares.jsonl print the table of docs/benchmarks.md, and count nothing

Models are made and captured on the meta device, so that a network of 14 billion parameters needs no memory for them.
The passes run as in a conversion, up to the partitioned graph, with and without the pass shard-tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch
from rich.console import Console
from rich.progress import Progress

import districompile as dc
from districompile.ir.captured import CapturedModule
from districompile.ir.flops import flops_of
from districompile.ir.unit import CompilationUnit, Options
from districompile.passes import pipelines
from districompile.passes.manager import PassManager
from districompile.passes.shard_tokens import ShardTokens, costs_of

DTYPE = torch.bfloat16
Made = tuple[torch.nn.Module, dict[str, Any], dict[str, int]]


def _tensor(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def flux(pixels: int) -> Made:
    """FLUX.1 dev: 19 blocks of two streams and 38 of one, with 512 tokens of text."""
    n = (pixels // 16) ** 2
    kwargs = {
        "hidden_states": _tensor(1, n, 64), "encoder_hidden_states": _tensor(1, 512, 4096),
        "pooled_projections": _tensor(1, 768), "timestep": _tensor(1), "img_ids": _tensor(n, 3),
        "txt_ids": _tensor(512, 3), "guidance": _tensor(1, dtype=torch.float32),
    }  # fmt: skip
    return diffusers.FluxTransformer2DModel(guidance_embeds=True), kwargs, {"hidden_states": 1, "img_ids": 0}


def sd35(pixels: int) -> Made:
    """Stable Diffusion 3.5 large: 38 blocks, with 77 + 256 tokens of text, both guidance halves."""
    module = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=38, attention_head_dim=64, num_attention_heads=38,
        joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=192, qk_norm="rms_norm",
    )  # fmt: skip
    side = pixels // 8
    kwargs = {
        "hidden_states": _tensor(2, 16, side, side), "encoder_hidden_states": _tensor(2, 333, 4096),
        "pooled_projections": _tensor(2, 2048), "timestep": _tensor(2),
    }  # fmt: skip
    return module, kwargs, {"hidden_states": 2}


def qwen_image(pixels: int) -> Made:
    """Qwen-Image: 60 blocks, with 256 tokens of text."""
    side = pixels // 16
    kwargs = {
        "hidden_states": _tensor(1, side * side, 64), "encoder_hidden_states": _tensor(1, 256, 3584),
        "timestep": _tensor(1), "img_shapes": [[(1, side, side)]],
    }  # fmt: skip
    return diffusers.QwenImageTransformer2DModel(), kwargs, {"hidden_states": 1}


def wan(height: int) -> Made:
    """Wan 2.1 and 2.2 14B: 40 blocks, 81 frames of 480 x 832, with 512 tokens of text in cross-attention alone."""
    width = {480: 832, 720: 1280}[height]
    kwargs = {
        "hidden_states": _tensor(1, 16, 21, height // 8, width // 8), "encoder_hidden_states": _tensor(1, 512, 4096),
        "timestep": _tensor(1, dtype=torch.int64),
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(), kwargs, {"hidden_states": 3}


MODELS: dict[str, tuple[str, Callable[[int], Made], int]] = {
    "flux-1024": ("FLUX.1, 1024 px", flux, 1024),
    "flux-2048": ("FLUX.1, 2048 px", flux, 2048),
    "sd35-1024": ("SD 3.5 large, 1024 px", sd35, 1024),
    "qwen-1024": ("Qwen-Image, 1024 px", qwen_image, 1024),
    "qwen-2048": ("Qwen-Image, 2048 px", qwen_image, 2048),
    "wan-480": ("Wan 2.x 14B, 480 x 832, 81 frames", wan, 480),
}


def main() -> int:
    """Count for the selected models, or print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {', '.join(MODELS)}, separated by commas [default: all]")
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks [default: %(default)s]")
    parser.add_argument("--table", type=Path, help="a file of JSON lines: print their table")
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines() if line.startswith("{")]))
        return 0
    names = options.only.split(",") if options.only else list(MODELS)
    ranks = [int(r) for r in options.ranks.split(",")]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("models", total=len(names))
        for name in names:
            bar.update(task, description=name)
            for found in count(name, ranks):
                print(json.dumps(found), flush=True)
            bar.advance(task)
    return 0


def count(name: str, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what becomes of a model on each number of ranks.

    ``share`` is the part of all FLOPs that is divided. ``busiest`` is the work of the busiest rank beside an even
    share. ``megabytes`` are received by it in an exact step, by ``transfers`` collectives.
    """
    text, make, size = MODELS[name]
    with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):
        module, kwargs, rows = make(size)
        captured = dc.capture(module.to(DTYPE).eval(), kwargs=kwargs)
    total = sum(map(flops_of, captured.graph.nodes))
    for r in ranks:
        found: dict[str, Any] = {"model": text, "ranks": r, "tflops": total / 1e12}
        for key, skip in (("with", ()), ("without", (ShardTokens.name,))):
            unit = _partitioned(captured, rows, r, skip)
            costs = costs_of(unit.graph, r)
            work = sum(flops_of(n, i) for n in unit.graph.nodes for i in range(r))
            found[key] = {
                "share": 1 - max(0.0, work - total) / (r - 1) / total,
                "busiest": costs.flops * r / total,
                "megabytes": costs.bytes / 1e6,
                "transfers": costs.transfers,
            }
        yield found


def _partitioned(captured: CapturedModule, rows: dict[str, int], ranks: int, skip: tuple[str, ...]) -> CompilationUnit:
    by_value = {i.value: rows[i.path] for i in captured.inputs if i.path in rows}
    unit = CompilationUnit(captured.copy_graph(), "global", captured, Options(ranks), by_value)
    passes = pipelines.cut(unit.options)
    names = [p.name for p in passes]
    return PassManager(skip=skip).run(unit, passes[: names.index("partition") + 1])


def table(lines: list[dict[str, Any]]) -> str:
    """Return the counts as a Markdown table."""
    out = [
        "| model | TFLOP | ranks | divided | before | work of the busiest rank | before | received, MB | before "
        "| collectives | before |",
        "|" + " --- |" * 11,
    ]
    for found in lines:
        a, b = found["with"], found["without"]
        out.append(
            f"| {found['model']} | {found['tflops']:.1f} | {found['ranks']} | {a['share']:.1%} | {b['share']:.1%} "
            f"| {a['busiest']:.3f} | {b['busiest']:.3f} | {a['megabytes']:.0f} | {b['megabytes']:.0f} "
            f"| {a['transfers']} | {b['transfers']} |"
        )
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
