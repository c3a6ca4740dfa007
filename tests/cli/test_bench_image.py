"""``bench --image``: the parts of a picture add up to it, on every rank, and the trace shows them."""

from __future__ import annotations

import itertools
import json
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import failing
from helpers_serve import tiny_pipeline

from districompile.cli import main
from districompile.cli.commands.bench_image import figures_of
from districompile.cli.picture_clock import Part, PictureClock, chrome_events, totals
from districompile.runtime.trace import Span


class Sampler:
    def step(self, x: int, eta: float = 0.0) -> int:
        time.sleep(0.002)
        return x


class Vae(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self(x)  # inside of the decoding, and no part of its own
        return found


def test_parts_cover_a_picture_and_nothing_is_left_on_the_pipeline() -> None:
    unet, text, vae, scheduler = torch.nn.Identity(), torch.nn.Identity(), Vae(), Sampler()
    parts = {"unet": unet, "text_encoder": text, "vae": vae, "scheduler": scheduler, "tokenizer": None}
    pipe = types.SimpleNamespace(components=parts, **parts)
    x = torch.zeros(1)
    began = time.perf_counter()
    with PictureClock(pipe, torch.device("cpu")).record() as found:
        text(x)
        for _ in range(3):
            unet(x)
            assert scheduler.step(1, eta=0.5) == 1
        vae.decode(x)
        with pytest.raises(TypeError):
            unet()  # its part ends all the same
        time.sleep(0.001)
    took = 1e3 * (time.perf_counter() - began)
    kinds = [p.kind for p in found if p.kind != "host"]
    assert kinds[:8] == ["text_encoder", *["step", "sampler"] * 3, "decode"] and kinds.count("step") == 4
    assert all(a.end == pytest.approx(b.start) for a, b in itertools.pairwise(found)) and found[0].start >= 0
    sums = totals(found)
    assert sum(sums.values()) == pytest.approx(found[-1].end) and found[-1].end <= took
    assert sums["sampler"] >= 6 and sums["host"] >= 1
    assert "step" not in vars(scheduler) and "decode" not in vars(vae)
    assert not unet._forward_hooks and not unet._forward_pre_hooks


def test_a_trace_places_calls_in_their_steps() -> None:
    parts = [Part("text_encoder", 0, 2), Part("step", 2, 5), Part("host", 5, 6), Part("step", 6, 9)]
    spans = [Span("run", "a", "compute", 0.5, 2.0), Span("post", "x", "transfer", 1.0, 1.5, 8)]
    events = chrome_events(1, parts, [("exact", spans), ("displaced", spans)])
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in events} == {1}
    assert [e["ts"] for e in slices if e["name"] == "run a"] == [2500.0, 6500.0]
    assert [e["args"].get("phase") for e in slices if e["tid"] == 1] == ["exact", "displaced"]
    assert [e["dur"] for e in slices if e["tid"] == 2] == [2000.0, 3000.0, 1000.0, 3000.0]


def test_figures_compare_the_first_picture_with_the_others() -> None:
    rank: dict[str, Any] = {
        "rank": 0, "seconds": [3.0, 1.0, 1.2, 1.1], "steps": 4, "calls": {"exact": 3, "displaced": 1}, "load_s": 2.0,
        "load_parts_s": {"pipeline": 1.0, "bundle": 1.0, "warm-up": 0.0},
        "parts": {"step": 100.0, "host": 5.0}, "run_ms": 70.0, "exposed_ms": 20.0,
    }  # fmt: skip
    found = figures_of([rank, {**rank, "rank": 1, "load_s": 2.5, "load_parts_s": {"pipeline": 2.5}}])
    assert found["load_parts_s"] == {"pipeline": 2.5}  # of the slowest rank
    assert (found["first_s"], found["seconds"], found["first_over_others"]) == (3.0, 1.1, 2.727)
    assert found["step_host_ms"] == 10.0 and found["load_s"] == 2.5 and len(found["ranks"]) == 2
    alone = figures_of([{**rank, "seconds": [1.0], "run_ms": None, "exposed_ms": None}])
    assert alone["seconds"] == 1.0 and "step_host_ms" not in alone


@pytest.mark.slow
@pytest.mark.multiprocess
def test_whole_pictures_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, bundle, trace = tiny_pipeline(tmp_path / "tiny"), tmp_path / "bundle", tmp_path / "trace.json"
    assert main.main(["convert", str(model), "--gpus", "2", "--backend", "eager", "--out", str(bundle), "--json"]) == 0
    capsys.readouterr()
    words = ["bench", str(bundle), "--image", "--steps", "5", "--pictures", "2", "--warm-up"]
    assert main.main([*words, "--trace", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["image"]
    assert found["processes"] == 2 and sum(found["calls"].values()) == 5
    assert {"text_encoder", "step", "sampler", "decode", "host", "file"} <= set(found["parts_ms"])
    assert found["run_ms"] > 0 and found["run_ms"] + found["exposed_ms"] <= 1.1 * found["parts_ms"]["step"]
    assert "decode" not in found["ranks"][1]["parts_ms"]  # rank 0 alone decodes
    events = json.loads(trace.read_text())["traceEvents"]
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} >= {(r, t) for r in (0, 1) for t in (0, 2)}
    assert main.main(words) == 0
    text = capsys.readouterr().out
    for word in ("VAE, decoding", "exposed transfers", "the first:", "host, all else"):
        assert word in text
    assert failing(capsys, "bench", str(bundle), "--image", "--original").startswith("--image times whole pictures")
