"""A module whose ranks are in processes of their own: the caller is no rank, and the module is called as before."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_images import Image, make, noise, text

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.errors import BundleError, InputError, LaunchError
from districompile.runtime.module import DistributedModule
from districompile.runtime.workers import group as module
from districompile.runtime.workers.memory import TensorReceiver, TensorSender

ROOT = Path(__file__).resolve().parents[2]
STEPS = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("workers") / "bundle", 2)[1]


@pytest.fixture(scope="module")
def workers() -> Iterator[dc.Workers]:
    found = dc.Workers(2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def unet(bundle: Path, workers: dc.Workers) -> DistributedModule:
    return dc.load(bundle, workers=workers)


def gone(pid: int, seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def drawn(unet: DistributedModule, seed: int, steps: list[float] = STEPS) -> list[torch.Tensor]:
    return [out for _, out in Image(noise(seed), text(seed), list(steps)).draw(unet)]


@pytest.mark.multiprocess
def test_calls_give_the_bits_of_ranks_in_this_process(unet: DistributedModule, bundle: Path) -> None:
    here = dc.load(bundle, lockstep=True)
    for seed in (1, 2):  # the second image has another text, which has to be sent anew
        assert all(map(torch.equal, drawn(unet, seed), drawn(here, seed)))
        assert unet.image_calls == here.image_calls == {"exact": 3, "displaced": 3}
    assert unet.drift_rates == here.drift_rates and unet.transport == "gloo" and unet.leads
    with unet.exact(), here.exact():
        assert torch.equal(drawn(unet, 3)[-1], drawn(here, 3)[-1]) and unet.image_calls["displaced"] == 0
    with dc.image(unet), dc.image(here):
        assert torch.equal(drawn(unet, 4, STEPS[::-1])[-1], drawn(here, 4, STEPS[::-1])[-1])
    assert unet.config == here.config and list(dict(unet.named_parameters())) == list(dict(here.named_parameters()))


@pytest.mark.multiprocess
def test_a_call_that_does_not_fit_reaches_no_worker(unet: DistributedModule) -> None:
    want = drawn(unet, 1)
    with pytest.raises(InputError, match="converted for 12x8, called with 9x9"):
        unet(sample=torch.zeros(1, 4, 9, 9), timestep=torch.tensor(5.0), text=text(0))
    unet.stop()
    assert all(map(torch.equal, drawn(unet, 1), want))
    with pytest.raises(InputError, match="not one rank"), unet.trace():
        pass


@pytest.mark.multiprocess
def test_several_bundles_share_the_processes(
    unet: DistributedModule, workers: dc.Workers, bundle: Path, tmp_path: Path
) -> None:
    _, other = make(tmp_path / "other", 2, seed=5)
    second, pids = dc.load(other, workers=workers), workers.pids
    first, want = drawn(unet, 1), drawn(dc.load(other, lockstep=True), 1)
    assert all(map(torch.equal, drawn(second, 1), want))
    assert all(map(torch.equal, drawn(unet, 1), first))
    del second
    gc.collect()  # it is closed on the workers before the next call
    assert all(map(torch.equal, drawn(unet, 1), first)) and workers.pids == pids and workers._forgotten == []
    third = dc.load(other, workers=workers)
    assert all(map(torch.equal, drawn(third, 1), want))
    third.close()
    with pytest.raises(InputError, match="was closed"):
        drawn(third, 1)
    with pytest.raises(BundleError):
        dc.load(tmp_path / "nothing", workers=workers)
    assert workers.alive and all(map(torch.equal, drawn(unet, 1), first))


@pytest.mark.multiprocess
def test_an_interrupted_call_is_followed_by_a_new_image(unet: DistributedModule, workers: dc.Workers) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    want = drawn(unet, 1)
    steps = Image(noise(1), text(1), list(STEPS)).draw(unet)
    for _ in range(4):
        next(steps)
    earlier = signal.signal(signal.SIGALRM, interrupt)
    stopped = workers.pids[1]
    try:
        os.kill(stopped, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    finally:
        signal.signal(signal.SIGALRM, earlier)
        os.kill(stopped, signal.SIGCONT)
    assert all(map(torch.equal, drawn(unet, 1), want)) and unet.image_calls["exact"] == 3


@pytest.mark.multiprocess
def test_a_shape_is_added_by_the_caller(tmp_path: Path, workers: dc.Workers) -> None:
    net, folder = make(tmp_path / "grows", 2)
    grows = dc.load(folder, workers=workers, shapes=dc.AddShapes(module=net))
    tall = {"sample": torch.randn(1, 4, 16, 8), "timestep": torch.tensor(5.0), "text": text(0)}
    with torch.no_grad():
        assert torch.allclose(grows(**tall), net(**tall), rtol=1e-5, atol=1e-5)
        assert len(grows.shapes) == 2
        small = {**tall, "sample": noise(0)}
        assert torch.allclose(grows(**small), net(**small), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_lost_worker_is_named_and_ends_the_others(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 1.5)
    unet = dc.load(bundle, workers=2)
    workers = unet._runner._workers  # type: ignore[attr-defined]
    pids = dict(workers.pids)
    drawn(unet, 1)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"rank 1 failed: it was ended by SIGKILL.*load the bundle again"):
        drawn(unet, 1)
    assert time.monotonic() - began < 10 and not workers.alive
    with pytest.raises(LaunchError, match="load the bundle again"):
        drawn(unet, 1)
    assert gone(pids[0]) and not workers._resources.folder.exists()

    stopped = dc.load(bundle, workers=2)
    workers = stopped._runner._workers  # type: ignore[attr-defined]
    pids = dict(workers.pids)
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(LaunchError, match="rank 0 has given no sign of life"):
        drawn(stopped, 1)
    assert all(map(gone, pids.values()))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_end_with_the_caller(bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"  # with no guard of __main__
    script.write_text(
        textwrap.dedent("""
        import sys, time, torch
        import districompile as dc
        unet = dc.load(sys.argv[1], workers=2)
        out = unet(sample=torch.zeros(1, 4, 12, 8), timestep=torch.tensor(5.0), text=torch.zeros(1, 5, 6))
        workers = unet._runner._workers
        print(tuple(out.shape), *workers.pids.values(), workers._resources.folder, flush=True)
        del workers
        if sys.argv[2] == "wait":
            time.sleep(60)
        elif sys.argv[2] == "drop":
            del unet
            input()
        """)
    )
    for how in ("end", "drop", "wait"):
        process = subprocess.Popen(
            [sys.executable, str(script), str(bundle), how], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        assert said.startswith("(1, 4, 12, 8) "), said + process.stderr.read()
        *pids, folder = said.split()[4:]
        if how == "wait":
            process.kill()
        assert all(gone(int(pid)) for pid in pids), how
        if how == "drop":
            assert process.poll() is None
        process.communicate("\n", timeout=30)
        limit = time.monotonic() + 5
        while Path(folder).exists() and time.monotonic() < limit:
            time.sleep(0.02)
        assert not Path(folder).exists(), how


def test_what_workers_cannot_do_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="load it with workers=2"):
        dc.load(bundle, workers=3)
    with pytest.raises(InputError, match="at least 1"):
        dc.Workers(0)
    with pytest.raises(InputError, match="by name, not as an object"):
        dc.load(bundle, workers=2, backend=EagerBackend())
    with pytest.raises(InputError, match="leave lockstep"):
        dc.load(bundle, workers=2, lockstep=True)
    with pytest.raises(LaunchError, match="workers=2"):
        dc.load(bundle)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="without workers"):
        dc.load(bundle, workers=2)


def test_tensors_go_through_shared_memory(tmp_path: Path) -> None:
    sender, receiver = TensorSender(tmp_path, "in"), TensorReceiver()
    sent = [
        torch.randn(3, 5), torch.empty(0, 4), torch.tensor(7), torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True, False]), torch.arange(6).reshape(2, 3).t(),
    ]  # fmt: skip
    assert all(map(torch.equal, receiver.get(sender.put(sent)), sent))
    large = torch.randn(1 << 20)  # for which the file is too short
    described = sender.put([large])
    assert torch.equal(receiver.get(described)[0], large) and len(list(tmp_path.iterdir())) == 1
    wrong = {**described, "tensors": [{"dtype": "float32", "shape": [1 << 22], "at": 0}]}
    with pytest.raises(LaunchError, match="does not lie in the memory"):
        receiver.get(wrong)
    with pytest.raises(LaunchError, match="shorter than it says"):
        TensorReceiver().get({**described, "size": 1 << 40})
    assert TensorReceiver(last=True).get(described)[0].shape == large.shape
    assert not list(tmp_path.iterdir())


def test_without_room_tensors_go_through_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    roomy.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(roomy))

    def allocate(number: int, start: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").startswith(str(full)):
            raise OSError(28, "No space left on device")
        os.ftruncate(number, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    sender = TensorSender(full, "in")
    assert torch.equal(TensorReceiver().get(sender.put([torch.ones(3)]))[0], torch.ones(3))
    assert len(list(roomy.iterdir())) == 1 and not list(full.iterdir())
    sender.close()
    assert not list(roomy.iterdir())
