# SPDX-License-Identifier: Apache-2.0
"""A supervisor of two ranks that have every picture at once, for ``bench_serve.py --null``: they import no PyTorch.

What a request takes with them is what the server, its sockets and its messages take.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import sys
import threading
from typing import Any

from PIL import Image

from districompile.runtime.processes.control import Control
from districompile.runtime.processes.supervisor import supervise
from districompile.serve.jobs import Drawn, Facts, Start

FACTS = Facts(
    world_size=2, backend="null", sizes=((256, 256),), images=1, guidance="batch", most_steps=1000, text=True,
    negative=True, edits=False, inpaints=False, previews=False,
)  # fmt: skip


def launch(orders: str) -> None:
    """Answer as both ranks until the server says that this is the end."""
    start = Start.model_validate_json(orders)
    data = io.BytesIO()
    Image.frombytes("RGB", (182, 182), os.urandom(3 * 182 * 182)).save(data, format="PNG")  # about 100 kB
    drawn = Drawn(images=(base64.b64encode(data.getvalue()).decode(),), seconds=0.0, encoding=0.0)
    ended = [threading.Event(), threading.Event()]
    controls: dict[int, Control] = {}

    def take(rank: int, message: dict[str, Any]) -> bool:
        if message["type"] == "draw":
            found = drawn.model_dump(mode="json") if rank == 0 else None
            controls[rank].send({"type": "done", "id": message["job"]["id"], "outcome": "drawn", "drawn": found})
        elif message["type"] == "end":
            ended[rank].set()
        return bool(message["type"] != "end")

    for rank in range(2):
        controls[rank] = Control(start.address, start.secret, rank, functools.partial(take, rank))
        controls[rank].send({"type": "ready", "facts": FACTS.model_dump(mode="json")})
    for event in ended:
        event.wait()


if __name__ == "__main__":
    sys.exit(supervise(launch))
