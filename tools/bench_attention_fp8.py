# SPDX-License-Identifier: Apache-2.0
"""Time attention in 8 bits by cuDNN, beside what 16 bits have. Prints one JSON line for each size of attention.

    pip install nvidia-cudnn-frontend
    python tools/bench_attention_fp8.py

cuDNN has it for Hopper GPUs (``sdpa_fp8``), and its package ``nvidia-cudnn-frontend`` a Python interface. Queries, keys
and values are float8_e4m3fn with one scale each, and so is the result on these. What rounding them takes is a time of
its own. Times are in microseconds, of replayed CUDA graphs, medians of 20. ``error`` is against float32, in the 2-norm.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

from bench_attention import SIZES, Size

from districompile.backends.inductor import flash_attention
from districompile.cost.timing import captured, median_ms

_WIDTHS = (64, 128)  # of heads
_FEWEST = 512  # keys: attention to a text is short in 16 bits already
_COMPARED = 2048  # queries
_SHARES = 256.0  # the scale of the shares, which are at most 1; the largest number of the type is 448
_F8 = torch.float8_e4m3fn


def main() -> None:
    """Print a line for each size that cuDNN computes in 8 bits."""
    versions = flash_attention.select_libraries("auto", "cuda")
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for size in SIZES:
        if size.mask == "none" and not size.groups and size.width in _WIDTHS and size.keys >= _FEWEST:
            times, error = measure(size, torch.float16, versions)
            print(json.dumps({**dataclasses.asdict(size), "us": times, "error": round(error, 4), **where}), flush=True)


def measure(size: Size, dtype: torch.dtype, versions: tuple[int, ...]) -> tuple[dict[str, float], float]:
    """Return the microseconds of each way, and the error of attention in 8 bits against float32."""
    torch.manual_seed(0)
    shapes = [(size.batch, n, size.heads, size.width) for n in (size.queries, size.keys, size.keys)]
    q, k, v = operands = [torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes]
    scale = 1 / math.sqrt(size.width)
    rounded = [x.to(_F8) for x in operands]
    run, result = by_cudnn(rounded, scale)
    ways: dict[str, Callable[[], object]] = {
        "default": lambda: scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        ),
        "cuDNN, 8 bits": run,
        "rounding": lambda: [x.to(_F8) for x in operands],
    }
    for version in versions:
        ways[f"FlashAttention-{version}"] = partial(flash_attention.by_library, q, k, v, scale, version, 1)
    times = {name: round(1e3 * median_ms(captured(way)), 1) for name, way in ways.items()}
    run()
    first = min(size.queries, _COMPARED)
    wide = [x.transpose(1, 2).float() for x in (q[:, :first], k, v)]
    want = scaled_dot_product_attention(wide[0], wide[1], wide[2], scale=scale).transpose(1, 2)
    return times, float((result[:, :first].float() - want).norm() / want.norm())


def by_cudnn(operands: list[Tensor], scale: float) -> tuple[Callable[[], object], Tensor]:
    """Return what computes attention of (batch, length, heads, width), and the tensor that it writes."""
    cudnn: Any = importlib.import_module("cudnn")
    kinds = cudnn.data_type
    q, k, _ = operands
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT, handle=handle
    )

    def dims(x: Tensor) -> tuple[list[int], list[int]]:
        turned = x.transpose(1, 2)
        return list(turned.shape), list(turned.stride())

    def tensor(number: int, x: Tensor) -> Any:
        shape, stride = dims(x)
        return graph.tensor(uid=number, dim=shape, stride=stride, data_type=kinds.FP8_E4M3)

    def number(uid: int) -> Any:
        return graph.tensor(uid=uid, dim=[1] * 4, stride=[1] * 4, data_type=kinds.FLOAT)

    scales = ("descale_q", "descale_k", "descale_v", "scale_s", "descale_s", "scale_o")
    numbers = {name: number(i) for i, name in enumerate(scales, 4)}
    given = {name: tensor(i, x) for i, (name, x) in enumerate(zip("qkv", operands, strict=True), 1)}
    out, _, *largest = graph.sdpa_fp8(**given, **numbers, generate_stats=False, attn_scale=scale, use_causal_mask=False)
    result = torch.empty_like(q)
    shape, stride = dims(result)
    out.set_uid(10).set_output(True).set_dim(shape).set_stride(stride).set_data_type(kinds.FP8_E4M3)
    for uid, value in enumerate(largest, 11):
        value.set_uid(uid).set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    held: dict[int, Tensor] = {i: torch.ones(1, 1, 1, 1, device=k.device) for i in (*range(4, 10), 11, 12)}
    held[7].fill_(_SHARES)
    held[8].fill_(1 / _SHARES)
    held |= {i: x for i, x in enumerate(operands, 1)} | {10: result}
    workspace = torch.empty(max(1, graph.get_workspace_size()), device=k.device, dtype=torch.uint8)

    def run() -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(held, workspace, handle=handle)

    return run, result


if __name__ == "__main__":
    main()
