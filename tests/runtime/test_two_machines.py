"""One image by two machines: two network namespaces with a cable between them, torchrun in each, and gloo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from helpers_serve import tiny_pipeline
from PIL import Image

import districompile as dc
from districompile.cli.generate import Request, draw
from districompile.models.sources import load_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # inside the namespaces alone
STEPS = 6


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two namespaces whose interfaces ``cable`` are connected. Neither reaches anything else."""
    names = [f"dc{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command here")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
    except subprocess.CalledProcessError as e:
        remove(names)
        pytest.skip(f"no network namespaces can be made here: {e.stderr.decode().strip()}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def test_torchrun_on_two_machines_draws_the_image_of_one(machines: list[str], tmp_path: Path) -> None:
    from districompile.cli.main import main

    model, bundle = tiny_pipeline(tmp_path / "tiny"), tmp_path / "bundle"
    assert main(["convert", str(model), "--gpus", "2", "--backend", "eager", "--out", str(bundle), "--json"]) == 0
    command = ["-m", "districompile", "run", str(bundle), "-p", "a star", "--steps", str(STEPS), "--seed", "3"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
             str(rank), "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29500",
             *command, "--transport", "gloo", "--out", str(tmp_path / "two.png")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, name in enumerate(machines)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    pipe = load_pipeline(str(model))
    pipe.unet = dc.load(bundle, lockstep=True)
    want = draw(pipe, Request("a star", None, STEPS, None, 3, pipe.unet.plan.options)).pixels
    assert want is not None
    found = torch.as_tensor(numpy.array(Image.open(tmp_path / "two.png"))).permute(2, 0, 1) / 255
    # Half a level of rounding to 8 bits, and sums that are rounded otherwise with another number of threads.
    assert float((found - want[0].clamp(0, 1)).abs().max()) <= 1.5 / 255
