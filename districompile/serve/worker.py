# SPDX-License-Identifier: Apache-2.0
"""One resident rank: it waits for drawings at the server's socket, never inside a collective."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from districompile.errors import Error, LaunchError, RanksDifferError
from districompile.runtime.processes.control import Control
from districompile.serve.jobs import Drawing, Drawn, Start


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

    def done(job: str, **outcome: Any) -> None:
        control.send({"type": "done", "id": job, **outcome})

    def finish(job: str, drawn: Callable[[], Drawn]) -> None:
        try:
            outcome = {"outcome": "drawn", "drawn": drawn().model_dump(mode="json")}
        except Exception as e:  # of the library for pictures: it is this drawing that fails
            outcome = {"outcome": "refused", "error": f"the file cannot be made: {type(e).__name__}: {e}"}
        done(job, **outcome)

    # A PNG file takes as long as several steps: the ranks draw the next picture meanwhile
    with ThreadPoolExecutor(1, "districompile-files") as files:
        while (job := received.jobs.get()) is not None:
            name = job.id

            def show(number: int, image: str, name: str = name) -> None:
                control.send({"type": "preview", "id": name, "number": number, "image": image})

            try:
                drawn = session.draw(job, lambda name=name: received.cancelled(name), show)  # type: ignore[misc]
                if drawn is None:
                    done(name, outcome="drawn", drawn=None)
                else:
                    control.send({"type": "free", "id": name})
                    files.submit(finish, name, drawn)
            except (Cancelled, RanksDifferError) as e:
                done(name, outcome="stopped", error=str(e))
            except LaunchError:
                raise
            except Error as e:
                done(name, outcome="refused", error=" ".join(str(e).split()))
            received.forget(name)
    session.close()
