"""Calls of a module are replayed, and a call that may be of another kind is not. A recorder for the CPU stands in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from districompile.live import graphed_module
from districompile.live.graphed_module import GraphedModule, graph_calls


class Encoder(nn.Module):
    """A text encoder in small. It counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.runs = 0

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        """Return hidden states as encoders do."""
        self.runs += 1
        hidden = self.inner(self.table(ids)) * scale
        if mask is not None:
            hidden = hidden * mask[..., None]
        return {"last": hidden, "all": (hidden, hidden.sum(-1)), "none": None}


class Recorder:
    """Record by running a call once more, and repeat it by running it into the same results, as a graph would."""

    def __init__(self, refuses: bool = False) -> None:
        self.recorded, self.refuses = 0, refuses

    def __call__(self, queue: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        result = queue()

        def replay() -> None:
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(queue()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, result


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval().requires_grad_(False)


def ids(seed: int, length: int = 5) -> Tensor:
    return torch.randint(0, 9, (2, length), generator=torch.Generator().manual_seed(seed))


def equal(got: Any, want: Any) -> bool:
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@torch.no_grad()
def test_results_are_those_of_the_module(encoder: Encoder) -> None:
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder)
    results = [graphed(ids(i)) for i in range(6)]
    assert recorder.recorded == 1
    assert all(equal(got, encoder.forward(ids(i))) for i, got in enumerate(results))  # also those of earlier calls
    assert len({got["last"].data_ptr() for got in results}) == len(results)


@torch.no_grad()
@pytest.mark.parametrize(("on_first_call", "calls"), [(False, 2), (True, 1)])
def test_when_a_call_is_recorded(encoder: Encoder, on_first_call: bool, calls: int) -> None:
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder, on_first_call)
    for _ in range(calls):
        assert recorder.recorded == 0
        graphed(ids(0))
    assert recorder.recorded == 1


@torch.no_grad()
def test_kinds_of_calls_have_recordings_of_their_own(encoder: Encoder) -> None:
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder, on_first_call=True)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids(0),), {}), ((ids(1, 7),), {}), ((ids(2),), {"mask": mask}), ((ids(3),), {"scale": 2.0}),
        ((ids(4),), {"scale": 2}), ((ids(5), mask), {}),
    ]  # fmt: skip
    for _ in range(3):
        for args, kwargs in calls:
            assert equal(graphed(*args, **kwargs), encoder.forward(*args, **kwargs))
    assert recorder.recorded == len(calls)


@torch.no_grad()
def test_weights_that_change_are_followed(encoder: Encoder) -> None:
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder, on_first_call=True)
    graphed(ids(0))
    encoder.inner.weight.mul_(2)  # in place
    assert equal(graphed(ids(1)), encoder.forward(ids(1))) and recorder.recorded == 1
    encoder.inner = nn.Linear(4, 4).eval().requires_grad_(False)  # elsewhere
    assert equal(graphed(ids(2)), encoder.forward(ids(2))) and recorder.recorded == 2


class Quantised(nn.Parameter):
    """A weight of another class, whose values lie elsewhere."""

    def data_ptr(self) -> int:
        raise RuntimeError("there is no address")


class Adapted(nn.Linear):
    """A layer that stands for one with an adapter of PEFT's around it."""


def test_calls_that_are_made_as_they_are(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_module, "is_adapted", lambda module: isinstance(module, Adapted))
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder, on_first_call=True)
    graphed(ids(0))  # with gradients
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        graphed(ids(0))
    with torch.inference_mode():
        graphed(ids(0))
    with torch.no_grad():
        graphed(ids(0), mask=torch.nn.Parameter(torch.ones(2, 5)))  # of no plain type
        hook = encoder.inner.register_forward_hook(lambda *_: None)
        graphed(ids(0))
        hook.remove()
        encoder.train()
        graphed(ids(0))
        encoder.eval()
        encoder.inner = Adapted(4, 4).eval()
        graphed(ids(0))
        encoder.inner = nn.Linear(4, 4).eval()
        encoder.inner.weight = Quantised(torch.ones(4, 4))
        graphed(ids(0))
    assert recorder.recorded == 0


@torch.no_grad()
def test_what_cannot_be_recorded_is_not_tried_again(encoder: Encoder) -> None:
    graphed = GraphedModule(encoder, Recorder(refuses=True), on_first_call=True)
    for i in range(3):
        assert equal(graphed(ids(i)), encoder.forward(ids(i)))
    assert encoder.runs == 6


@torch.no_grad()
def test_a_result_that_cannot_be_copied(encoder: Encoder) -> None:
    @dataclasses.dataclass
    class Cache:
        keys: Tensor

    class Cached(Encoder):
        def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(ids)["last"], Cache(ids)

    recorder = Recorder()
    graphed = GraphedModule(Cached().eval(), recorder, on_first_call=True)
    first, second = graphed(ids(0)), graphed(ids(1))
    assert recorder.recorded == 0 and torch.equal(first[1].keys, ids(0)) and torch.equal(second[1].keys, ids(1))


@torch.no_grad()
def test_recordings_are_bounded(encoder: Encoder) -> None:
    recorder = Recorder()
    graphed = GraphedModule(encoder, recorder, on_first_call=True)
    for length in range(1, 21):
        graphed(ids(0, length))
    assert len(graphed._recorded) == 8
    assert equal(graphed(ids(1, 3)), encoder.forward(ids(1, 3)))


@torch.no_grad()
def test_the_module_stays_what_it_is(encoder: Encoder) -> None:
    names = list(inspect.signature(encoder.forward).parameters)
    graph_calls(encoder, Recorder(), on_first_call=True)
    assert list(inspect.signature(encoder.forward).parameters) == names
    seen = []
    encoder.register_forward_hook(lambda *_: seen.append(1))  # of the module itself
    encoder(ids(0))
    runs = encoder.runs
    encoder(ids(1))
    assert len(seen) == 2 and encoder.runs == runs + 1  # by the recorder's replay alone
