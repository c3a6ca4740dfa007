# SPDX-License-Identifier: Apache-2.0
"""Pipelines around a transformer: example inputs are those of the pipeline, and its picture is one device's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from torch import Tensor

import districompile as dc
from districompile.cli import main
from districompile.cli.common import UsageError
from districompile.cli.generate import Request, check_guidance, draw
from districompile.models.inputs import ModelError, SizeError
from districompile.models.sources import load_pipeline, load_source, network_name
from districompile.plan.options import PlanOptions
from tests import helpers_transformers as folders

SIZE = {"height": 128, "width": 96}
MAKE: dict[str, Callable[[Path], Path]] = {"flux": folders.flux, "sd3": folders.sd3}


@pytest.fixture(scope="module", params=sorted(MAKE))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKE[request.param](tmp_path_factory.mktemp("models") / request.param)


def drawn(folder: Path, network: Any) -> Tensor:
    pipe = load_pipeline(str(folder))
    setattr(pipe, network_name(pipe), network)
    options = PlanOptions(ranks=2, guidance=load_source(str(folder)).cfg, **SIZE)
    pixels = draw(pipe, Request("a red cat", None, 3, None, 5, options)).pixels
    assert pixels is not None and pixels.std() > 0.01
    return pixels


def test_example_inputs_are_what_the_pipeline_passes(folder: Path) -> None:
    loaded = load_source(str(folder))
    example = loaded.example(**SIZE)
    seen: list[dict[str, Any]] = []
    loaded.module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    drawn(folder, loaded.module)
    passed = {k: v for k, v in seen[0].items() if isinstance(v, Tensor)}
    assert sorted(passed) == sorted(example.kwargs)
    for name, tensor in passed.items():
        assert (tensor.shape, tensor.dtype) == (example.kwargs[name].shape, example.kwargs[name].dtype), name
        if name.endswith("_ids"):
            assert torch.equal(tensor, example.kwargs[name])


def test_the_picture_of_exact_steps_is_one_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_source(str(folder))
    example = loaded.example(**SIZE)
    program = dc.convert(loaded.module, kwargs=example.kwargs, ranks=2, rows=example.rows)
    assert program.plan.report.tokens is not None and program.plan.report.tokens.divided

    expected = drawn(folder, loaded.module)

    def forward(**kwargs: Any) -> Any:
        return program.simulate(phase="exact", **{k: v for k, v in kwargs.items() if isinstance(v, Tensor | bool)})

    monkeypatch.setattr(loaded.module, "forward", forward)
    assert (drawn(folder, loaded.module) - expected).abs().max() <= 1e-4


def test_a_size_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(SizeError, match="height 130 does not work"):
        load_source(str(folder)).example(130, 128)
    if folder.name == "sd3":
        with pytest.raises(ModelError, match="knows 24 positions a side, which are 384 pixels"):
            load_source(str(folder)).example(512, 128)


def test_a_pipeline_of_several_networks_is_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for more, says in (
        ({"transformer_2": ["diffusers", "X"]}, "several networks"),
        ({"transformer": [None, None]}, "no unet"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **more}))
        with pytest.raises(ModelError, match=says):
            load_source(str(tmp_path))


def test_a_guidance_that_is_an_input_may_be_any() -> None:
    options = PlanOptions(ranks=2, guidance="none")
    check_guidance(options, 7.0, is_input=True)
    with pytest.raises(UsageError, match="--cfg none"):
        check_guidance(options, 7.0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_run_draws_on_two_processes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--gpus", "2", "--backend", "eager", "--height", "128", "--width", "96", "--warmup-steps", "3"]
    out = tmp_path / "out.png"
    assert (
        main.main(
            ["run", str(folder), *options, "--steps", "3", "--seed", "5", "--prompt", "a red cat", "--out", str(out)]
        )
        == 0
    )
    expected = (drawn(folder, load_source(str(folder)).module)[0].clamp(0, 1) * 255).round().permute(1, 2, 0)
    import numpy as np

    got = torch.from_numpy(np.asarray(Image.open(out)).astype("float32"))
    assert (got - expected).abs().max() <= 1
