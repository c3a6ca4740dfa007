# SPDX-License-Identifier: Apache-2.0
"""Predict the time of a step, of an image, and the memory of a GPU, before anything is compiled.

A kernel takes the longer of two times: its arithmetic in whole waves of thread blocks over the multiprocessors, and
its bytes; and a fixed time beside. Exchanges of the exact phase add up. Those of the displaced phase overlap, and only
slow the memory. The coefficients were fitted to SDXL's steps on one, two and four H100s (docs/measurements); for other
GPUs the same shares of their published figures are assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from districompile.cost.gpus import Efficiency, Gpu, Network
from districompile.cost.work import KernelWork
from districompile.ir.spec import Phase

# Fitted by tools/fit_cost.py to docs/measurements/four-h100.jsonl
EFFICIENCY = Efficiency(
    matmul=0.839, conv=0.993, attention=0.52, memory=0.399, kernel_us=1.011, wait_us=9.332, link=1.0, overlap=0.008
)
# Output tiles of library kernels, and the share of the best rate that a tile of the size reaches: small tiles read each
# operand more often.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.92), (128, 64, 0.8), (64, 64, 0.6), (64, 32, 0.4))
_FILL = 32  # elements of the inner dim that filling and draining the pipeline of a tile costs
_SPLITS = (1, 2, 4)  # parts of the inner dim, where a product has too few tiles for all multiprocessors
_NETWORK = 0.85  # share of a network's figure that NCCL reaches: assumed, not measured
_QUERIES = 128  # rows of queries of a thread block of attention


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """The predicted time of one call: ``compute_ms`` of the slowest rank, and what transfers add (``exposed_ms``).

    ``transfer_ms`` is how long its bytes are on the link.
    """

    compute_ms: float
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0

    @property
    def ms(self) -> float:
        """The time of the call in ms."""
        return self.compute_ms + self.exposed_ms


def kernel_seconds(work: KernelWork, gpu: Gpu, share: Efficiency = EFFICIENCY) -> float:
    """Predict the seconds of one kernel."""
    moved = work.nbytes / (gpu.bandwidth * 1e9 * share.memory)
    peak = (gpu.tensor_tflops if work.itemsize <= 2 else gpu.float32_tflops) * 1e12
    one = peak / gpu.multiprocessors  # FLOPs a second of one multiprocessor
    computed = 0.0
    if work.kind == "attention":
        blocks = math.ceil(work.m / _QUERIES) * work.batch
        block = work.flops / max(1, work.m * work.batch) * _QUERIES
        computed = math.ceil(blocks / gpu.multiprocessors) * block / (one * share.attention)
    elif work.kind != "memory":
        rate = one * (share.conv if work.kind == "conv" else share.matmul)
        computed = min(_tiled_seconds(work, tile, gpu.multiprocessors, rate) for tile in _TILES)
    return max(moved, computed) + share.kernel_us * 1e-6


def _tiled_seconds(work: KernelWork, tile: tuple[int, int, float], multiprocessors: int, rate: float) -> float:
    rows, columns, quality = tile
    tiles = math.ceil(work.m / rows) * math.ceil(work.n / columns) * work.batch
    found = math.inf
    for split in _SPLITS:
        if split == 1 or tiles * split <= 2 * multiprocessors:
            waves = math.ceil(tiles * split / multiprocessors)
            found = min(found, waves * 2.0 * rows * columns * (work.k / split + _FILL) / (rate * quality))
    return found


def compute_ms(kernels: Iterable[KernelWork], gpu: Gpu, share: Efficiency = EFFICIENCY) -> float:
    """Predict the time in ms of a rank's kernels, one after the other."""
    counts = Counter(kernels)  # most layers of a network repeat
    return sum(n * kernel_seconds(k, gpu, share) for k, n in counts.items()) * 1e3


def estimate_step(
    computed: Sequence[float], sent: Sequence[int], waits: int, phase: Phase, gpu: Gpu, share: Efficiency = EFFICIENCY,
    network: Network | None = None, crossing: int = 0,
) -> StepEstimate:  # fmt: skip
    """Predict a call of ``phase`` from each rank's ``computed`` ms and ``sent`` bytes, and the number of ``waits``.

    ``crossing``: the bytes that the busiest machine sends over ``network``. They travel beside those within machines.
    """
    slowest, bytes_sent = max(computed), max(sent, default=0)
    transfer = bytes_sent / (gpu.link * share.link * 1e9) * 1e3
    wait_us = share.wait_us
    if network is not None and crossing:
        transfer = max(transfer, crossing / (network.rate * _NETWORK * 1e9) * 1e3)
        wait_us += network.wait_us
    if phase == "exact":
        exposed = transfer + waits * wait_us * 1e-3
    else:
        exposed = max(transfer - slowest, 0.0) + share.overlap * min(transfer, slowest)
    return StepEstimate(slowest, transfer, exposed if len(computed) > 1 else 0.0)
