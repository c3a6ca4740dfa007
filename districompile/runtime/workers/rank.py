# SPDX-License-Identifier: Apache-2.0
"""One worker: a rank that loads bundles and computes calls, as the process says that holds their modules.

It waits at a socket, never inside of a collective.
"""

from __future__ import annotations

import contextlib
import os
import queue
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from districompile.errors import Error, LaunchError
from districompile.runtime.processes.control import Control

if TYPE_CHECKING:
    from torch import Tensor

    from districompile.runtime.opening import Opened
    from districompile.runtime.runner import ProcessRunner


def serve_calls(address: str, secret: str) -> None:
    """Answer messages of the owner at ``address`` until it says that this is the end."""
    received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    beats: list[Control] = []

    def take(message: dict[str, Any]) -> bool:
        for control in beats:
            control.beats.set()  # while there is something to do
        received.put(None if message["type"] == "end" else message)
        return bool(message["type"] != "end")

    rank = int(os.environ["RANK"])
    control = Control(address, secret, rank, take, beats=False)
    beats.append(control)
    worker = _Worker(rank, Path(address).parent)
    while (message := received.get()) is not None:
        control.beats.set()  # also for a message that came before
        reply: dict[str, Any]
        try:
            reply = {"type": "done", **worker.answer(message)}
        except LaunchError:
            raise  # ranks are not in step any more, or one is gone
        except Error as e:
            reply = {"type": "failed", "kind": type(e).__name__, "error": " ".join(str(e).split())}
        if received.empty():
            control.beats.clear()
        control.send({**reply, "id": message["id"]})
    worker.close()


class _Worker:
    """The bundles that one rank has loaded."""

    def __init__(self, rank: int, folder: Path) -> None:
        from districompile.runtime.workers.memory import TensorReceiver, TensorSender

        self._first = rank == 0
        self._receiver = TensorReceiver()
        self._sender = TensorSender(folder if folder.is_dir() else Path(gettempdir()), "out")
        self._loaded: dict[int, _Loaded] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a message says, and return the fields of the reply."""
        kind, number = message["type"], int(message["module"])
        if kind == "load":
            self._loaded[number] = loaded = _Loaded(message["bundle"], message["options"])
            return {"transport": loaded.runner.transport}
        if kind == "close":
            with contextlib.suppress(KeyError):
                self._loaded.pop(number).runner.close()
            return {}
        loaded = self._loaded[number]
        if kind == "add":
            loaded.add(str(message["shape"]))
            return {}
        leaves = loaded.call(message, [] if message["tensors"] is None else self._receiver.get(message["tensors"]))
        return {"tensors": self._sender.put(leaves)} if self._first else {}

    def close(self) -> None:
        """Close all bundles together with the other ranks."""
        for loaded in self._loaded.values():
            loaded.runner.close()
        self._sender.close()


class _Loaded:
    """A bundle on one rank. The owner decides of the image that a call belongs to, and of its phase."""

    def __init__(self, bundle: str, options: dict[str, Any]) -> None:
        from districompile.runtime.load import join
        from districompile.runtime.opening import open_for_load

        joining = {name: options.pop(name) for name in ("start_timeout", "cuda_graph", "grows")}
        both = {name: options[name] for name in ("transport", "timeout")}
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._opened: Opened = open_for_load(bundle, local_rank=local_rank, **options)
        self.runner: ProcessRunner = join(self._opened, **both, **joining)[0]
        self._kept: dict[int, dict[str, Tensor]] = {}  # stream -> conditioning of its last call

    def call(self, message: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Compute one call. ``tensors`` are the inputs that are named there; the others stay as they were."""
        import torch

        from districompile.runtime.calls.agreement import Proposal
        from districompile.runtime.calls.call_tracker import Decision

        phase, stream, reset = message["decision"]
        decision = Decision(phase, stream, reset)
        if reset:
            self._kept.clear()
        # Copies: the memory is overwritten by the next call, and the state of an image may refer to its inputs.
        device = self._opened.device
        inputs = {n: t.to(device, copy=True) for n, t in zip(message["names"], tensors, strict=True)}
        kept = self._kept.setdefault(stream, {})
        kept.update({n: inputs[n] for n in message["keep"]})
        timestep = None if message["timestep"] is None else float.fromhex(message["timestep"])
        proposal = Proposal(decision, {**kept, **inputs}, timestep, message["fresh"], message["shape"])
        with torch.inference_mode(False), torch.no_grad():
            return self.runner.call(proposal)[1]

    def add(self, name: str) -> None:
        """Add the shape ``name``, which the owner has put into the bundle's folder."""
        from districompile.bundle.bundle import Bundle

        bundle = Bundle.open(self._opened.bundle.path, "quick")
        plan = bundle.plans[name]
        self._opened.loader.adopt(bundle, plan)
        self.runner.add(plan, self._opened.loader.engines(plan, self._opened.own_rank))
