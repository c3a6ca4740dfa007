"""A server over artists that draw at once, in a thread of its own; and a small pipeline for real ranks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from districompile.serve.api import Limits
from districompile.serve.app import ServeOptions, create_app
from districompile.serve.group import GroupLost, Preview, Refused, Stopped
from districompile.serve.jobs import Drawing, Drawn, Facts
from districompile.serve.server import _Server, bind

FACTS = Facts(
    world_size=2, backend="eager", sizes=((64, 48),), images=1, guidance="batch", most_steps=1000, text=True,
    negative=True, edits=True, inpaints=True, previews=True,
)  # fmt: skip
PATH = "/v1/images/generations"
LIMITS = Limits("toy", steps=4, most_steps=100, loras=("style",))


def colour(data: str) -> int:
    return int(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((0, 0))[0])  # type: ignore[index]


def error(response: Any, status: int) -> dict[str, Any]:
    """Check that a response is an error in OpenAI's shape, and return it."""
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"] and "\n" not in found["message"]
    return dict(found)


def file_of(seed: int, kind: str = "png", size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    """Return a picture of one colour, which shows the seed."""
    data = io.BytesIO()
    Image.new(mode, size, tuple([seed % 256] * len(mode))).save(data, format=kind)
    return data.getvalue()


class Artists:
    """Draw pictures of one colour. ``hold`` lets drawings wait until :meth:`release`."""

    def __init__(self, facts: Facts | None = FACTS) -> None:
        self.facts = facts
        self.problem: str | None = None
        self.ready, self.troubled = facts is not None, False
        self.jobs: list[Drawing] = []
        self.stopped: list[str] = []
        self.fault: Exception | None = None
        self.hold = False
        self.memory, self.pids = {0: 1000, 1: 2000}, {0: 10, 1: 11}
        self.restarts = 0

    async def draw(
        self, job: Drawing, preview: Preview, cancel: asyncio.Event, free: asyncio.Event | None = None
    ) -> Drawn:
        self.jobs.append(job)
        for step in range(job.steps):
            while self.hold and not cancel.is_set():
                await asyncio.sleep(0.005)
            if cancel.is_set():
                self.stopped.append(job.id)
                raise Stopped("cancelled")
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
            if step < job.previews:
                preview(step, base64.b64encode(file_of(step)).decode())
        assert self.facts is not None
        images = [base64.b64encode(file_of(job.seed + i, job.format)).decode() for i in range(self.facts.images)]
        return Drawn(images=tuple(images), seconds=0.01, encoding=0.001, exact=job.steps, displaced=0)


lost, refused = GroupLost("rank 1 ended"), Refused("no such token")


@dataclasses.dataclass
class Running:
    """A server that runs: its address, artists and application."""

    url: str
    artists: Artists
    app: Any
    call: Callable[[Callable[[], Any]], Any]  # inside the server's loop


@contextlib.contextmanager
def running(artists: Artists | None = None, **options: Any) -> Iterator[Running]:
    """Run a server on a free port of the loopback interface."""
    artists = artists or Artists()
    chosen = ServeOptions(**{"limits": LIMITS, "queue": 3, **options})
    started = threading.Event()
    state: dict[str, Any] = {}

    def work() -> None:
        async def main() -> None:
            state["loop"] = asyncio.get_running_loop()
            state["app"] = create_app(chosen, artists)
            listener = bind("127.0.0.1", 0, None)
            state["port"] = listener.getsockname()[1]
            config = uvicorn.Config(state["app"], log_level="error", timeout_graceful_shutdown=1, ws="none")
            state["server"] = _Server(config)
            started.set()
            await state["server"].serve([listener])
            listener.close()

        asyncio.run(main())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(30)
    while not state["server"].started:
        time.sleep(0.005)

    def call(function: Callable[[], Any]) -> Any:
        async def inside() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(inside(), state["loop"]).result(10)

    try:
        yield Running(f"http://127.0.0.1:{state['port']}", artists, state["app"], call)
    finally:
        artists.hold = False
        state["server"].should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it does not become true"
        time.sleep(0.005)


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the server-sent events of a stream: their names and data."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def tiny_pipeline(folder: Path) -> Path:
    """Write a pipeline of the demo's text encoder and VAE with a small random UNet, of pictures of 64 x 64."""
    import diffusers
    import torch

    from districompile.models.sources import DEMO

    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("unet", "README.md"))
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=128, attention_head_dim=4,
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    return folder
