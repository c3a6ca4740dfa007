"""On GPUs: every transport gives the bits that all ranks give in lockstep on one GPU, with and without CUDA graphs."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_net import images, make_bundle
from helpers_shapes import SHAPES, image, make, save

import districompile as dc
from districompile.cli import main
from districompile.cuda.driver import call
from districompile.cuda.exchange import kernels
from districompile.cuda.graph_edit import replace_memsets
from districompile.errors import LaunchError
from districompile.runtime.processes.launcher import launch
from districompile.runtime.trace import write_chrome_trace

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu, pytest.mark.multiprocess,
    pytest.mark.skipif(GPUS == 0, reason="there is no NVIDIA GPU here"),
]  # fmt: skip
two_gpus = pytest.mark.skipif(GPUS < 2, reason="there are no two NVIDIA GPUs here")


def worker(bundle: str, transport: str, cuda_graph: bool, trace: str | None = None) -> tuple[str, list[bytes]]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    unet = dc.load(bundle, device=f"cuda:{int(os.environ['LOCAL_RANK']) % GPUS}", transport=transport,
                   cuda_graph=cuda_graph)  # fmt: skip
    outputs = images(unet)
    if trace is not None:
        with unet.trace() as spans:
            images(unet, 4)
        write_chrome_trace(f"{trace}.{os.environ['RANK']}", [spans])
        assert {"run", "post", "wait"} <= {s.kind for _, call in spans.calls for s in call}
        assert all(0 <= s.start <= s.end for _, call in spans.calls for s in call)
    chosen = unet.transport
    unet.close()
    return chosen, outputs


def in_lockstep(bundle: Path) -> list[bytes]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return images(dc.load(bundle, device="cuda:0", lockstep=True))


def on_cpu(bundle: Path) -> list[bytes]:
    return images(dc.load(bundle, device="cpu", lockstep=True))


def test_lockstep_on_one_gpu_equals_the_cpu(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 3)
    for a, b in zip(in_lockstep(bundle), on_cpu(bundle), strict=True):
        x, y = (torch.frombuffer(bytearray(t), dtype=torch.float32) for t in (a, b))
        assert (x - y).abs().max() / y.abs().max() <= 1e-4


def test_ranks_share_one_gpu(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", GPUS + 1)
    results = launch(worker, (str(bundle), "auto", True), GPUS + 1)
    want = in_lockstep(bundle)
    assert all(r == ("gloo", want) for r in results.values())


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert main.main(["convert", "demo", "--gpus", "2", "--backend", "eager", "--out", "b"]) == 0
    assert main.main(["verify", "b", "--device", "cuda", "--steps", "6"]) == 0
    for device in ("cuda", "cpu"):
        words = ["run", "b", "--device", device, "--prompt", "a red circle", "--steps", "6", "--out", f"{device}.png"]
        assert main.main(words) == 0
    pictures = [np.asarray(Image.open(f"{d}.png"), dtype=np.float64) for d in ("cuda", "cpu")]
    assert np.abs(pictures[0] - pictures[1]).mean() < 2  # of 255; matrix products on a GPU may round to TF32


def test_small_memsets_become_kernels() -> None:
    x, y = (torch.full((n,), 7, dtype=torch.int32, device="cuda") for n in (3, 5000))
    own = kernels(x.device)
    assert own is not None
    graph = torch.cuda.CUDAGraph(keep_graph=True)

    def memset(t: torch.Tensor, value: int, count: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call("cuMemsetD32Async", ctypes.c_uint64(t.data_ptr()), value, ctypes.c_size_t(count), stream)

    with torch.cuda.graph(graph):
        x += 1
        memset(x, 5, 2)
        x += 1
        memset(y, 6, 5000)  # large
        y += 1
    assert replace_memsets(graph.raw_cuda_graph(), own.fill_words) == 1
    assert replace_memsets(graph.raw_cuda_graph(), own.fill_words) == 0
    graph.instantiate()
    for i in range(2):
        graph.replay()
        assert x.tolist() == [6, 6, 9 + 2 * i] and set(y.tolist()) == {7}


@pytest.mark.parametrize("sizes", [[], [1], [16, 100, 4096], [3_000_001, 48], [64] * 96])
def test_the_exchange_kernel_copies_and_signals(sizes: list[int]) -> None:
    own = kernels(torch.device("cuda", 0))
    assert own is not None
    words = torch.zeros(2, dtype=torch.int32, device="cuda")
    sources = [torch.randint(256, (n + 1,), dtype=torch.uint8, device="cuda") for n in sizes]
    targets = [torch.zeros_like(s) for s in sources]
    for start in (0, 1):  # aligned, and not
        own.exchange([(s[start:], t[start:]) for s, t in zip(sources, targets, strict=True)],
                     [words.data_ptr(), words.data_ptr() + 4], [words.data_ptr()])  # fmt: skip
        assert words.tolist() == [0, 1]  # the first was waited for, and taken back
        assert all(torch.equal(s[start:], t[start:]) for s, t in zip(sources, targets, strict=True))
    own.exchange([], [], [])
    torch.cuda.synchronize()


@two_gpus
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("transport", ["peer", "nccl", "gloo"])
def test_transports_equal_lockstep(transport: str, cuda_graph: bool, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 2)
    want = in_lockstep(bundle)
    for _ in range(2):  # and again, bit for bit
        for chosen, outputs in launch(worker, (str(bundle), transport, cuda_graph), 2).values():
            assert chosen == transport
            assert [i for i, (a, b) in enumerate(zip(outputs, want, strict=True)) if a != b] == []


def shapes_worker(bundle: str, transport: str, cuda_graph: bool) -> list[bytes]:
    torch.backends.cudnn.deterministic = True
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % GPUS}"
    in_turn = transport == "lockstep"
    module = dc.load(bundle, device=device, lockstep=in_turn, transport="auto" if in_turn else transport,
                     cuda_graph=cuda_graph)  # fmt: skip
    found = []
    for shape in (*SHAPES, *SHAPES):
        with module.image():
            found += [t.cpu().numpy().tobytes() for t in image(module, shape, 9)]
    module.close()
    return found


@two_gpus
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("transport", ["peer", "nccl", "gloo"])
def test_shapes_in_turn(transport: str, cuda_graph: bool, tmp_path: Path) -> None:
    """Shapes share their memory, also that of other GPUs and of captured calls: none sees what another one left."""
    bundle = str(save(tmp_path / "b", make()))
    want = shapes_worker(bundle, "lockstep", False)
    for outputs in launch(shapes_worker, (bundle, transport, cuda_graph), 2).values():
        assert [i for i, (a, b) in enumerate(zip(outputs, want, strict=True)) if a != b] == []


@two_gpus
def test_the_fastest_is_chosen(tmp_path: Path) -> None:
    results = launch(worker, (str(make_bundle(tmp_path / "b", 2)), "auto", True), 2)
    assert {chosen for chosen, _ in results.values()} == {"peer"}


@two_gpus
def test_guidance_halves(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 2, cfg="split")
    want = in_lockstep(bundle)
    assert all(outputs == want for _, outputs in launch(worker, (str(bundle), "auto", True), 2).values())


@two_gpus
def test_inductor(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 2, backend="inductor")
    want = in_lockstep(make_bundle(tmp_path / "eager", 2))
    runs = [launch(worker, (str(bundle), "peer", graph), 2)[rank] for graph in (True, False) for rank in (0, 1)]
    assert all(r == runs[0] for r in runs)
    for a, b in zip(runs[0][1], want, strict=True):
        x, y = (torch.frombuffer(bytearray(t), dtype=torch.float32) for t in (a, b))
        assert (x - y).norm() / y.norm() <= 2e-3  # TF32 where Inductor multiplies in Triton


@two_gpus
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_traces(cuda_graph: bool, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 2)
    launch(worker, (str(bundle), "peer", cuda_graph, str(tmp_path / "trace")), 2)
    events = json.loads((tmp_path / "trace.0").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1}  # compute, transfers


def dying(bundle: str, transport: str) -> None:
    unet = dc.load(bundle, device=f"cuda:{os.environ['LOCAL_RANK']}", transport=transport)
    x = torch.randn(2, 4, 40, 32, device=unet.device)
    for i in range(50):
        if i == 20 and os.environ["RANK"] == "1":
            raise ValueError("the second rank has had enough")
        unet(sample=x, timestep=torch.tensor(100.0 - i))
        unet(sample=x, timestep=torch.tensor(100.0 - i)).cpu()


@two_gpus
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_a_dying_rank_ends_the_run(transport: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", 2)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="rank 1 failed: ValueError: the second rank has had enough"):
        launch(dying, (str(bundle), transport), 2)
    assert time.monotonic() - began < 60


def silent(bundle: str, seconds: float) -> None:
    unet = dc.load(bundle, device=f"cuda:{os.environ['LOCAL_RANK']}", transport="peer", timeout=5)
    x = torch.randn(2, 4, 40, 32, device=unet.device)
    for i in range(10):
        unet(sample=x, timestep=torch.tensor(100.0 - i))
    if os.environ["RANK"] == "1":
        time.sleep(seconds)
    else:  # what the runner would have agreed on is left out: the device itself waits
        runner = unet._runner
        values = {i.value: torch.zeros(i.spec.shape, dtype=i.spec.dtype, device=unet.device) for i in unet.plan.inputs}
        runner.executor.run("displaced", values, runner._states[0][0])
        torch.cuda.synchronize()


@two_gpus
def test_a_silent_rank_ends_the_run(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match="rank 0 lost another rank: nothing arrives from it for"):
        launch(silent, (str(make_bundle(tmp_path / "b", 2)), 120.0), 2)
    assert time.monotonic() - began < 60
