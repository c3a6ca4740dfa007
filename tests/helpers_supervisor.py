"""A supervisor whose two ranks are threads that do what the prompt says, to test a group without PyTorch."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from districompile.runtime.processes.frames import receive, send
from districompile.serve.jobs import Drawing, Drawn, Facts, Start

FACTS = Facts(
    world_size=2, backend="eager", sizes=((64, 48),), images=1, guidance="batch", most_steps=1000, text=True,
    negative=True, edits=True, inpaints=True, previews=True,
)  # fmt: skip


def rank(start: Start, number: int) -> None:
    """Connect as one rank, and draw until the server says that this is the end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(start.address)
    quiet, cancelled, lock = threading.Event(), threading.Event(), threading.Lock()
    making = threading.Event()

    def say(**message: Any) -> None:
        with lock:
            send(connection, message)

    def beat() -> None:
        while not quiet.wait(0.05):
            say(type="beat", memory=1000 + number)

    say(type="hello", rank=number, pid=os.getpid(), secret=start.secret)
    threading.Thread(target=beat, daemon=True).start()
    say(type="ready", facts=FACTS.model_dump(mode="json"))

    def draw(job: Drawing) -> None:
        outcome: dict[str, Any] = {"outcome": "drawn", "drawn": None}
        if job.prompt == "long" and cancelled.wait(20):
            outcome = {"outcome": "stopped", "error": "cancelled"}
        elif job.prompt == "refuse":
            outcome = {"outcome": "refused", "error": "no such token"}
        elif number == 1 and job.prompt == "die":
            connection.shutdown(socket.SHUT_RDWR)
        elif number == 1 and job.prompt == "fall silent":
            quiet.set()
            return
        elif number == 1 and job.prompt == "nonsense":
            say(type="done")
            say(unknown=True)
        elif number == 1 and job.prompt == "supervisor":  # one thread: lines of two would mix
            print('{"error": "rank 1 failed: no memory"}', flush=True)
            os._exit(2)
        elif number == 0:
            say(type="preview", id=job.id, number=0, image="early")
            outcome["drawn"] = Drawn(images=(f"{job.prompt} {job.seed}",), seconds=0.1, encoding=0.1).model_dump()
            if job.prompt == "large":  # its file is made when "next" comes
                making.clear()
                say(type="free", id=job.id)
                making.wait(20)
            elif job.prompt == "next":
                making.set()
        say(type="done", id=job.id, **outcome)

    while (message := receive(connection)) is not None and message["type"] != "end":
        if message["type"] == "draw":
            cancelled.clear()
            threading.Thread(target=draw, args=(Drawing.model_validate(message["job"]),), daemon=True).start()
        elif message["type"] == "cancel":
            cancelled.set()
    if message is not None:
        os._exit(0)


def main() -> None:
    """Run two ranks. With a file as argument: fail as long as it exists."""
    start = Start.model_validate_json(sys.stdin.readline())
    if len(sys.argv) > 1 and Path(sys.argv[1]).exists():
        print('{"error": "no memory"}', flush=True)
        os._exit(2)
    for number in range(2):
        threading.Thread(target=rank, args=(start, number), daemon=True).start()
    while sys.stdin.readline():
        pass
    time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    main()
