"""A loaded bundle is called like the module it was made from: in lockstep, as processes, inside a pipeline."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_toy import Reference, ToyBackend, make_plan

from districompile.bundle.bundle import BundleWriter
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError, InputError, LaunchError
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule
from districompile.runtime.processes.launcher import launch


def save(path: Path, plan: ExecutionPlan, config: dict[str, Any] | None = None, device: str = "cpu") -> Path:
    def zeros(spec: TensorSpec) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(spec.shape, dtype=spec.dtype)

    with BundleWriter(path) as writer:
        items = [(name, spec, zeros(spec)) for name, spec in plan.weights.items()]
        writer.known("weights.safetensors", WeightFile.write(writer.path("weights.safetensors"), items))
        for phase in plan.phases.values():
            for segment in phase.segments.values():
                for engine in segment.engines:
                    writer.text(f"engines/{engine}.toy", engine)
        writer.finish(plan, "", backend="toy", device=device, config=config)
    return path


def lockstep(path: Path, plan: ExecutionPlan, **config: Any) -> DistributedModule:
    return load(save(path, plan, config), lockstep=True, backend=ToyBackend(plan))  # type: ignore[arg-type]


def sample(i: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 7, generator=torch.Generator().manual_seed(i))


def test_two_images_with_two_calls_a_step(tmp_path: Path) -> None:
    """Phases, streams and new images follow the timesteps; every call gives what the reference gives."""
    plan = make_plan(3)
    unet = lockstep(tmp_path / "b", plan)
    for image in range(2):
        references = [Reference(plan), Reference(plan)]
        with unet.image():  # samples drawn by lot
            for i, t in enumerate((9, 7, 5, 3)):
                for stream in (0, 1):
                    x = sample(image * 100 + i * 2 + stream)
                    want = references[stream](x, float(t), "exact" if i < 2 else "displaced")
                    torch.testing.assert_close(unet(x, t, scale=2)["sample"], want)


def test_reset_exact_and_phase(tmp_path: Path) -> None:
    plan = make_plan(2)
    unet, reference = lockstep(tmp_path / "b", plan), Reference(plan)

    def check(i: int, t: float, phase: str) -> None:
        torch.testing.assert_close(unet(sample(i), t, 2)["sample"], reference(sample(i), t, phase))

    with unet.image():  # samples drawn by lot
        for i, phase in enumerate(("exact", "exact", "displaced")):
            check(i, 10.0 - i, phase)
        with unet.exact():
            check(3, 7.0, "exact")
        check(4, 6.0, "displaced")
        unet.reset()
        check(5, 5.0, "exact")
        unet.phase = "displaced"
        check(6, 4.0, "displaced")
        unet.phase = None
    with pytest.raises(
        InputError, match="there is no phase 'fast': use one of 'exact', 'displaced', 'reused', or None"
    ):
        unet.phase = "fast"  # type: ignore[assignment]


def test_steady_first_says_what_to_do_and_harms_nothing(tmp_path: Path) -> None:
    plan = make_plan(2)
    unet = lockstep(tmp_path / "b", plan)
    unet.phase = "displaced"
    with pytest.raises(InputError, match="Run the exact phase first"):
        unet(sample(0), 3, 2)
    unet.phase = None
    torch.testing.assert_close(unet(sample(0), 3, 2)["sample"], Reference(plan)(sample(0), 3.0, "exact"))


def test_both_guidance_halves(tmp_path: Path) -> None:
    plan = make_plan(2, batch=1, cfg="split")
    unet, reference = lockstep(tmp_path / "b", plan), Reference(plan)
    with unet.image():
        for i, phase in enumerate(("exact", "exact", "displaced", "displaced")):
            got = unet(sample(i), 9 - i, 2)["sample"]
            torch.testing.assert_close(got, reference(sample(i), 9.0 - i, phase))
    with pytest.raises(InputError, match="sample: converted for batch 2, called with 1"):
        unet(sample(0, 1), 9, 2)


def test_calls_inside_and_outside_of_inference_mode(tmp_path: Path) -> None:
    unet = lockstep(tmp_path / "b", make_plan(2))
    with torch.inference_mode():
        first = unet(sample(0), 9, 2)["sample"]
    second = unet(sample(1), 8, 2)["sample"]
    assert not second.requires_grad and not first.is_inference()
    first.add_(1)


@pytest.mark.parametrize(
    "timestep",
    [
        5, 5.0, np.int64(5), np.float32(5), torch.tensor(5), torch.tensor([5.0]), torch.tensor([5, 5]),
        torch.tensor([5.0, 5.0], dtype=torch.float64),
    ],
)  # fmt: skip
def test_timesteps_of_any_kind(tmp_path: Path, timestep: Any) -> None:
    plan = make_plan(2)
    want = Reference(plan)(sample(0), 5.0, "exact")
    torch.testing.assert_close(lockstep(tmp_path / "b", plan)(sample(0), timestep, scale=2)["sample"], want)


def test_integral_timestep_inputs_take_integral_floats_only(tmp_path: Path) -> None:
    plan = make_plan(1)
    spec = dataclasses.replace(plan.inputs[1], spec=TensorSpec((2,), torch.int64))
    unet = lockstep(tmp_path / "b", dataclasses.replace(plan, inputs=(plan.inputs[0], spec)))
    assert torch.equal(unet(sample(0), 5.0, 2)["sample"], unet(sample(0), 5, 2)["sample"])
    with pytest.raises(InputError, match=r"timestep was converted as int64, but is 5.5 in this call"):
        unet(sample(0), 5.5, 2)


BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "batch": ((sample(0, 1), 1, 2), {}, "sample: converted for batch 2, called with 1: convert again with"),
    "rows": ((torch.zeros(2, 9), 1, 2), {}, "sample: converted for 7 rows, called with 9 rows: convert again"),
    "dims": ((torch.zeros(2, 7, 1), 1, 2), {}, r"converted for shape \[2, 7\], called with \[2, 7, 1\]"),
    "dtype": ((sample(0).half(), 1, 2), {}, r"converted as float32, but is float16 in this call: cast it with"),
    "missing": ((sample(0),), {"scale": 2}, "input 'timestep' is missing"),
    "None": ((sample(0), None, 2), {}, "input 'timestep' is missing"),
    "kind": ((sample(0), "5", 2), {}, "input 'timestep' must be a tensor like float32.2., not a str"),
    "several timesteps": ((sample(0), torch.zeros(3), 2), {}, "timestep: converted for batch 2, called with 3"),
    "constant": ((sample(0), 1, 3), {}, "scale was 2 at conversion and is built in, but is 3 in this call"),
    "constant left out": ((sample(0), 1), {}, "scale was 2 at conversion and is built in: pass scale=2"),
    "unknown": ((sample(0), 1, 2), {"mask": 1}, "unknown argument 'mask'"),
    "new input": ((), {"sample": {"a": 1}, "timestep": 1, "scale": 2}, "input 'sample.a' was not given at conversion"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_do_not_fit(tmp_path: Path, name: str) -> None:
    args, kwargs, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=message) as caught:
        lockstep(tmp_path / "b", make_plan(1))(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_return_dict(tmp_path: Path) -> None:
    unet = lockstep(tmp_path / "b", make_plan(1))
    assert isinstance(unet(sample(0), 1, 2, return_dict=False), tuple)
    assert set(unet(sample(0), 1, 2, return_dict=True)) == {"sample"}
    assert set(unet(sample(0), 1, 2)) == {"sample"}


def test_what_pipelines_ask_for(tmp_path: Path) -> None:
    plan = make_plan(2)
    plan = dataclasses.replace(
        plan, weights={**plan.weights, "add_embedding.linear_1.weight": TensorSpec((3, 5), torch.float16)}
    )
    unet = lockstep(tmp_path / "b", plan, in_channels=4, sample_size=8, block_out_channels=[1, 2])
    assert unet.config.in_channels == 4 and unet.config["sample_size"] == 8 and "other" not in unet.config
    assert getattr(unet.config, "time_cond_proj_dim", None) is None
    assert unet.dtype == torch.float32 and unet.device == torch.device("cpu")
    assert unet.add_embedding.linear_1.in_features == 5
    assert unet.add_embedding.linear_1.weight.dtype == torch.float16
    assert not hasattr(unet, "down_blocks") and not hasattr(unet, "_hf_hook")
    assert unet.to("cpu", torch.float32) is unet
    with pytest.raises(AttributeError, match="nothing"):
        _ = unet.nothing


def test_inside_an_unmodified_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    tiny = diffusers.UNet2DModel(
        sample_size=7, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=2,
    )  # fmt: skip
    unet = lockstep(tmp_path / "b", make_plan(1, batch=1), **tiny.config)
    pipe = diffusers.DDIMPipeline(tiny, diffusers.DDIMScheduler())
    pipe.unet = unet
    assert pipe.unet is unet and pipe.device == unet.device and pipe.dtype == unet.dtype
    assert type(unet.config) is type(tiny.config) and unet.config.sample_size == 7
    assert pipe.to("cpu").components["unet"] is unet


def test_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(2, batch=1, cfg="split")
    path = save(tmp_path / "b", plan)
    backend: Any = ToyBackend(plan)
    with pytest.raises(LaunchError, match="converted for 4 processes, but this is one of 1: .* --nproc-per-node 4"):
        load(path, backend=backend)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LaunchError, match="this is one of 3"):
        load(path, backend=backend)


def test_one_rank_needs_no_launcher(tmp_path: Path) -> None:
    plan = make_plan(1)
    backend: Any = ToyBackend(plan)
    unet = load(save(tmp_path / "b", plan), backend=backend)
    torch.testing.assert_close(unet(sample(0), 1, 2)["sample"], Reference(plan)(sample(0), 1.0, "exact"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bundle_for_a_gpu_without_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="was made for a GPU, and there is none here"):
        load(save(tmp_path / "b", make_plan(1), device="cuda"))


def test_a_missing_engine(tmp_path: Path) -> None:
    plan = make_plan(1)
    path = save(tmp_path / "b", plan)
    (path / "engines/all-0.toy").unlink()
    backend: Any = ToyBackend(plan)
    with pytest.raises(BundleError, match="all-0.toy is missing"):
        load(path, backend=backend)


def draw(path: Path, plan: ExecutionPlan) -> list[torch.Tensor]:
    """Several images on this rank, whose own inputs are wrong unless it is rank 0."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    backend: Any = ToyBackend(plan)
    unet = load(path, lockstep="RANK" not in os.environ, backend=backend, timeout=30)
    batch = 2 * plan.inputs[0].spec.shape[0] if plan.options.cfg == "split" else 2
    outputs = []
    for image in range(2):
        for i, t in enumerate((9, 7, 7, 5, 5, 3, 3)):  # as Heun calls
            x = sample(10 * image + i, batch) if rank == 0 else torch.zeros(batch, 7)
            if rank != 0 and image == 1:
                unet.reset()  # rank 0 decides
            outputs.append(unet(x, t, 2)["sample"])
    unet.close()
    return [o.numpy() for o in outputs]  # type: ignore[misc]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "cfg"), [pytest.param(2, "none", marks=pytest.mark.slow), (2, "split")])
def test_processes_equal_lockstep_bitwise(tmp_path: Path, ranks: int, cfg: str) -> None:
    plan = make_plan(ranks, batch=1 if cfg == "split" else 2, cfg=cfg)
    path = save(tmp_path / "b", plan)
    want = draw(path, plan)
    world = ranks * (2 if cfg == "split" else 1)
    results = launch(draw, (path, plan), world)
    assert len(results) == world
    for outputs in results.values():
        assert all(np.array_equal(a, b) for a, b in zip(outputs, want, strict=True))
