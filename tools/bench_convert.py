# SPDX-License-Identifier: Apache-2.0
"""Time, peak memory and size of converting full-size networks with random weights; no GPU needed.

    python tools/bench_convert.py [--cases sdxl-1024,sdxl-832x1216,sd15-512x768] [--backend onnxruntime] [--keep FOLDER]
    python tools/bench_convert.py --cases sdxl-1024 --backend tensorrt --target sm89 [--collectives inside]

One JSON line a case. ``convert_s`` is ``dc.convert`` plus ``save``; loading the module is not in it. Every case runs
in a process of its own; ``peak_gb`` is the largest resident size of that process, the module's weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {  # configuration, height, width, ranks
    "sdxl-1024": (SDXL, 1024, 1024, 8),
    "sdxl-832x1216": (SDXL, 832, 1216, 8),
    "sdxl-1216x832": (SDXL, 1216, 832, 8),
    "sd15-512x768": (SD15, 512, 768, 3),
}


def network(config: dict[str, Any]) -> torch.nn.Module:
    """The UNet in float16, its weights random."""
    from diffusers import UNet2DConditionModel

    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        module: torch.nn.Module = UNet2DConditionModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    module.to_empty(device="cpu")
    for p in module.parameters():
        p.data.uniform_(-0.02, 0.02)
    return module


def example(module: torch.nn.Module, height: int, width: int) -> dict[str, Any]:
    """One guided call: both halves of one image."""
    config: Any = module.config

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).half()

    kwargs: dict[str, Any] = {
        "sample": half(2, 4, height // 8, width // 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": half(2, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": half(2, 1280), "time_ids": half(2, 6)}
    return kwargs


def measure(case: str, options: argparse.Namespace, target: Path) -> dict[str, Any]:
    import districompile as dc
    from districompile.backends.registry import get_backend
    from districompile.bundle.bundle import Bundle

    chosen = {"target": options.target, "weights": options.engine_weights}
    backend = get_backend(options.backend, **{k: v for k, v in chosen.items() if v is not None})

    config, height, width, ranks = CASES[case]
    module = network(config)
    kwargs = example(module, height, width)
    start = time.perf_counter()
    program = dc.convert(module, kwargs=kwargs, ranks=ranks)
    converted = time.perf_counter()
    program.save(target, backend=backend, collectives=options.collectives)
    done = time.perf_counter()
    engines = list((target / "engines").glob(f"*{backend.suffix}"))
    describe = getattr(backend, "describe", dict)
    weights = sum(spec.nbytes for spec in program.plan.weights.values())
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    report = program.report()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    return {
        "case": case, "ranks": ranks, "backend": options.backend, "engine": describe(),
        "collectives": options.collectives, "cpus": os.cpu_count(), "torch": torch.__version__,
        "convert_s": round(done - start, 1), "compile_s": round(converted - start, 1),
        "save_s": round(done - converted, 1),
        "peak_gb": round(peak * 1024 / 1e9, 2),
        "weights_gb": round(weights / 1e9, 3), "bundle_gb": round(size / 1e9, 3),
        "bundle_over_weights": round(size / weights, 4),
        "engines": len(engines), "engines_gb": round(sum(f.stat().st_size for f in engines) / 1e9, 3),
        "cut_share": report.cut_share(),
        "segments": {p: len(q.segments) for p, q in Bundle.open(target, verify=False).plan.phases.items()},
        "sent_mb_per_step": round(max(report.sent(program.phases[-1])) / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--target", help="tensorrt: the GPUs to build for")
    parser.add_argument("--engine-weights", help="tensorrt: bound, refit or inside")
    parser.add_argument("--collectives", default="between", choices=("between", "inside"))
    parser.add_argument("--keep", type=Path, help="keep the bundles in this folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args, args.keep / args.one)))
        return
    for case in args.cases.split(","):
        with tempfile.TemporaryDirectory(dir=args.keep) as scratch:
            folder = args.keep or Path(scratch)
            command = [sys.executable, __file__, "--one", case, "--backend", args.backend, "--keep", str(folder)]
            command += ["--collectives", args.collectives]
            for flag, value in (("--target", args.target), ("--engine-weights", args.engine_weights)):
                command += [flag, value] if value else []
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
