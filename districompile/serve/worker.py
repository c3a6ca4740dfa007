# SPDX-License-Identifier: Apache-2.0
"""One resident rank: it waits for drawings at the server's socket, never inside a collective."""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

from districompile.errors import Error, LaunchError, RanksDifferError
from districompile.runtime.processes.control import Control
from districompile.serve.jobs import Drawing, Start


class Orders:
    """What the server has sent to this rank: drawings, and which of them are cancelled."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Drawing | None] = queue.SimpleQueue()  # None: end
        self._cancelled: set[str] = set()

    def take(self, message: dict[str, Any]) -> bool:
        """Take a message. Return False after the last one."""
        kind = message.get("type")
        if kind == "draw":
            self.jobs.put(Drawing.model_validate(message["job"]))
        elif kind == "cancel":
            self._cancelled.add(str(message["id"]))
        elif kind == "end":
            self.jobs.put(None)
        return kind != "end"

    def cancelled(self, job: str) -> bool:
        """Return whether the server has cancelled a drawing."""
        return job in self._cancelled

    def forget(self, job: str) -> None:
        """Forget a drawing that has ended."""
        self._cancelled.discard(job)


def serve_rank(start: str, loras: dict[str, str]) -> None:
    """Load the bundle, and draw until the server says that this is the end. ``start`` is a :class:`Start` as JSON."""
    orders = Start.model_validate_json(start)
    rank = int(os.environ.get("RANK", "0"))
    received = Orders()
    control = Control(orders.address, orders.secret, rank, received.take)

    from districompile.serve.session import Cancelled, DrawingSession

    session = DrawingSession(orders.options, {name: Path(folder) for name, folder in loras.items()}, rank == 0)
    control.send({"type": "ready", "facts": session.facts.model_dump(mode="json")})
    while (job := received.jobs.get()) is not None:
        name = job.id

        def show(number: int, image: str, name: str = name) -> None:
            control.send({"type": "preview", "id": name, "number": number, "image": image})

        outcome: dict[str, Any]
        try:
            drawn = session.draw(job, lambda name=name: received.cancelled(name), show)  # type: ignore[misc]
            outcome = {"outcome": "drawn", "drawn": None if drawn is None else drawn.model_dump(mode="json")}
        except (Cancelled, RanksDifferError) as e:
            outcome = {"outcome": "stopped", "error": str(e)}
        except LaunchError:
            raise
        except Error as e:
            outcome = {"outcome": "refused", "error": " ".join(str(e).split())}
        received.forget(name)
        control.send({"type": "done", "id": name, **outcome})
    session.close()
