# SPDX-License-Identifier: Apache-2.0
"""One rank of distrifuser's patch parallelism, for ``bench_gpu.py``: SDXL's UNet with random weights.

    torchrun --nproc-per-node N tools/bench_distrifuser.py CHECKOUT LATENT none|batch|split

Guidance as ``bench_gpu.py`` has it: none, both halves as a batch, or each on half of the ranks.

Uses what distrifuser's own pipeline uses: buffers for all sites, and three CUDA graphs (exact, first and later
displaced calls). Rank 0 prints one JSON line a figure.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist


@torch.no_grad()
def main() -> None:
    checkout, latent, guidance = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.path.insert(0, checkout)
    import huggingface_hub

    if not hasattr(huggingface_hub, "cached_download"):  # asked for by the diffusers it needs, and gone since
        huggingface_hub.cached_download = None
    from distrifuser.models.distri_sdxl_unet_pp import DistriUNetPP  # type: ignore[import-not-found]
    from distrifuser.utils import DistriConfig, PatchParallelismCommManager  # type: ignore[import-not-found]
    from gpu_parts import example, network, peak_gib

    from districompile.cost.timing import median_ms

    config = DistriConfig(
        height=latent * 8, width=latent * 8, mode="corrected_async_gn",
        do_classifier_free_guidance=guidance != "none", split_batch=guidance == "split",
    )  # fmt: skip
    device = torch.device(config.device)
    module = DistriUNetPP(network("sdxl", device), config)
    images = 1 if guidance == "none" else 2
    kwargs = example(module, device, latent, latent, images)
    kwargs["timestep"] = kwargs["timestep"].repeat(images)  # one for each image

    def call(counter: int, record: bool = False) -> Any:
        module.set_counter(counter)
        given = {
            **kwargs,
            "added_cond_kwargs": dict(kwargs["added_cond_kwargs"]),
        }  # it keeps its half there
        return module(**given, return_dict=False, record=record)[0]

    manager = PatchParallelismCommManager(config)
    module.set_comm_manager(manager)
    call(0, True)
    if manager.numel > 0:
        manager.create_buffer()
    call(0, True)
    manager.clear()
    outputs, graphs = [], []
    displaced = config.warmup_steps + 1
    for counter in (0, displaced, displaced + 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(call(counter, True))
        graphs.append(graph)
    module.setup_cuda_graph(outputs, graphs)
    count = 20 if latent < 400 else 5

    def say(**figure: Any) -> None:
        if dist.get_rank() == 0:
            print(json.dumps({**figure, "device": torch.cuda.get_device_name(), "peak_gib": peak_gib()}), flush=True)

    dist.barrier()
    say(figure="distrifuser exact step", ms=median_ms(lambda: call(0), count))
    call(0)
    call(displaced)
    dist.barrier()
    say(figure="distrifuser displaced step", ms=median_ms(lambda: call(displaced + 1), count))
    dist.barrier()
    os._exit(0)  # its communicators do not take part in an orderly end


if __name__ == "__main__":
    main()
