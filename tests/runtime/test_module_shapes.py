"""Calls of several shapes of one bundle: each exact, none with state of another, and shapes that are added by need."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_shapes import NEW, SHAPES, call, error, image, make, program, save, worker

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.errors import InputError
from districompile.runtime.calls.shapes import ShapeSelector
from districompile.runtime.processes.launcher import launch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return save(tmp_path_factory.mktemp("shapes") / "bundle", make())


def test_shapes_in_turn(bundle: Path) -> None:
    """Each image is that of a module with its shape alone, bit for bit, also in the displaced phase."""
    net = make()
    alone = {s: dc.load(bundle, lockstep=True, shapes=[n]) for s, n in zip(SHAPES, _names(bundle), strict=True)}
    wanted = {}
    for shape, module in alone.items():
        with module.image():
            wanted[shape] = image(module, shape)
        assert module.image_calls == {"exact": 4, "displaced": 2}
    module = dc.load(bundle, lockstep=True)
    for shape in (*SHAPES, *reversed(SHAPES), *SHAPES[::2]):
        with module.image():
            found = image(module, shape)
        assert module.image_calls == {"exact": 4, "displaced": 2}
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[shape], strict=True))
        assert error(found[0], net(**call(shape))) < 1e-5


def _names(bundle: Path) -> list[str]:
    plans = Bundle.open(bundle).plans
    wanted = [f"{b}x4x{h}x{w}-{b}x{t}x6" for b, h, w, t in SHAPES]
    assert set(wanted) == set(plans)
    return wanted


def test_another_shape_in_the_middle_begins_an_image(bundle: Path) -> None:
    net, module = make(), dc.load(bundle, lockstep=True)
    with module.image():
        for i in range(6):
            module(**call(SHAPES[0], i))
        assert module.image_calls["displaced"] == 2
        assert error(module(**call(SHAPES[1], 6)), net(**call(SHAPES[1], 6))) < 1e-5
        assert module.image_calls == {"exact": 1, "displaced": 0}
        assert error(module(**call(SHAPES[0], 7)), net(**call(SHAPES[0], 7))) < 1e-5
        assert module.image_calls == {"exact": 1, "displaced": 0}


def test_shapes_share_their_memory(bundle: Path) -> None:
    """The memory of all shapes is that of the largest one."""
    module: Any = dc.load(bundle, lockstep=True)
    for shape in SHAPES:
        image(module, shape, 1)
    executors = [by_half[0][0] for by_half in module._runner._executors]
    assert len({e._arena.data_ptr() for e in executors}) == 1
    assert executors[0]._arena.numel() == max(e.memory.arena_bytes for e in executors)
    assert len({e._shared.local.data_ptr() for e in executors}) == 1
    states = module._runner._states.values()
    assert len(states) == len(SHAPES) and len({by_rank[0].buffer.local.data_ptr() for by_rank in states}) == 1


def test_an_unknown_shape_is_refused_with_the_way_to_add_it(bundle: Path) -> None:
    module = dc.load(bundle, lockstep=True)
    with pytest.raises(InputError) as caught:
        module(**call(NEW))
    says = str(caught.value)
    assert says.startswith("sample is 1x4x10x4, and there is no such shape; there are: 1x4x8x6-1x5x6 (sample 1x4x8x6, ")
    assert f"convert --add {bundle} --input sample=1x4x10x4,text=1x7x6`, or load the bundle with shapes='auto'" in says
    with pytest.raises(InputError, match=r"text is 1x9x6, and there is no such shape"):
        module(**{**call(SHAPES[0]), "text": torch.zeros(1, 9, 6)})
    with pytest.raises(InputError, match=r"input 'text' is missing"):
        module(call(SHAPES[0])["sample"], 3.0)
    with pytest.raises(InputError, match=r"sample was converted as float32, but is float16"):
        module(**{**call(SHAPES[1]), "sample": call(SHAPES[1])["sample"].half()})
    assert error(module(**call(SHAPES[1])), make()(**call(SHAPES[1]))) < 1e-5


def test_some_shapes_are_loaded(bundle: Path) -> None:
    module = dc.load(bundle, lockstep=True, shapes=["1x4x12x6"])
    assert module.shapes == ("1x4x12x6-1x5x6",) and module.plan is module.plans["1x4x12x6-1x5x6"]
    with pytest.raises(InputError, match="sample: converted for 12x6, called with 8x6"):
        module(**call(SHAPES[0]))
    for shapes, problem in (
        (["7"], "there is no shape '7'"),
        ([], "shapes is empty"),
        ("some", "no such source"),
    ):
        with pytest.raises(InputError, match=problem):
            dc.load(bundle, lockstep=True, shapes=shapes)


# Shapes that are added by need


def test_added_at_the_first_call(tmp_path: Path) -> None:
    net, folder = make(), save(tmp_path / "b", make(), SHAPES[:1])
    module = dc.load(folder, lockstep=True, shapes=dc.AddShapes(module=net))
    other = dc.load(folder, lockstep=True)
    for shape in (NEW, SHAPES[0], SHAPES[3], NEW):
        with module.image():
            assert error(image(module, shape)[0], net(**call(shape))) < 1e-5
    assert len(module.shapes) == 3 and list(Bundle.open(folder).plans) == [*other.shapes, *sorted(module.shapes[1:])]
    assert error(other(**call(SHAPES[0])), net(**call(SHAPES[0]))) < 1e-5
    again = dc.load(folder, lockstep=True)
    assert error(again(**call(NEW)), net(**call(NEW))) < 1e-5
    with pytest.raises(InputError, match="input 'text' is missing"):
        module(call((1, 6, 6, 5))["sample"], 3.0)
    with pytest.raises(InputError, match="sample: converted for shape"):
        module(**{**call(NEW), "sample": torch.zeros(4, 6, 6)})


def test_a_shape_that_another_process_added_is_loaded(tmp_path: Path) -> None:
    class Never(dc.AddShapes):
        def add(self, *args: Any) -> None:
            raise AssertionError("it is there")

    net, folder = make(), save(tmp_path / "b", make(), SHAPES[:1])
    module = dc.load(folder, lockstep=True, shapes=Never(module=net))
    program(net, NEW).add_to(folder)
    assert error(module(**call(NEW)), net(**call(NEW))) < 1e-5


def test_a_shape_that_cannot_be_added(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            raise ValueError("not this size")

    net, folder = make(), save(tmp_path / "b", make(), SHAPES[:1])
    module = dc.load(folder, lockstep=True, shapes=dc.AddShapes(module=Broken()))
    with pytest.raises(InputError, match=r"the shape of this call cannot be added: .*not this size"):
        module(**call(NEW))
    assert error(module(**call(SHAPES[0])), net(**call(SHAPES[0]))) < 1e-5
    assert len(module.shapes) == 1 == len(Bundle.open(folder).plans)


def test_refused_before_the_work(bundle: Path) -> None:
    with pytest.raises(InputError, match=re.escape("give shapes=AddShapes('no.such.package:factory') if you trust it")):
        dc.load(bundle, lockstep=True, shapes="auto")


# Processes

DIFFER = "rank 1 has inputs of other shapes than rank 0: all ranks make the same calls"


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes(tmp_path: Path, ranks: int) -> None:
    """Several shapes in turn, with fewer rows than ranks in one of them, are those of ranks in lockstep, bit for bit.

    Ranks that are called with different shapes raise the same error, and go on."""
    shapes = [SHAPES[0], SHAPES[3], (1, ranks, 6, 5)]  # at half the size, the last one has one row
    folder = save(tmp_path / "b", make(), shapes, ranks)
    results = launch(worker, (str(folder), shapes, False), ranks)
    module = dc.load(folder, lockstep=True)
    for number, shape in enumerate((*shapes, *shapes, shapes[1])):
        with module.image():
            wanted = [t.numpy().tobytes() for t in image(module, shape)]
        assert all(results[r][0][number] == wanted for r in range(ranks))
        assert error(tensor_of(wanted[0]), make()(**call(shape)).flatten()) < 1e-5
    assert {said for _, said in results.values()} == {DIFFER}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_add_shapes(tmp_path: Path) -> None:
    folder = save(tmp_path / "b", make(), SHAPES[:1])
    results = launch(worker, (str(folder), [SHAPES[0], NEW], True), 2)
    (found, said), (other, _) = results[0], results[1]
    assert found == other and said == DIFFER and len(Bundle.open(folder).plans) == 2
    for number, shape in enumerate((SHAPES[0], NEW)):
        assert error(tensor_of(found[number][0]), make()(**call(shape)).flatten()) < 1e-5
        assert found[number] == found[number + 2]


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float32).copy())


# Guidance that stops midway: the batch is that of one half


@pytest.mark.parametrize("cfg", ["none", "split"])
def test_a_call_without_its_guidance_half_names_the_way_that_works(cfg: str) -> None:
    plan = program(make(), SHAPES[2], cfg=cfg).plan
    guided = dataclasses.replace(plan.options, guidance="split" if cfg == "split" else "batch")
    plan = dataclasses.replace(plan, options=guided)
    for grows in (False, True):
        shapes = ShapeSelector({"both": plan}, torch.device("cpu"), "B", grows)
        if cfg == "none" and grows:
            assert shapes.bind((), call(SHAPES[0])) is None  # it is added
            continue
        with pytest.raises(InputError) as caught:
            shapes.bind((), call(SHAPES[0]))
        says = str(caught.value)
        assert "--add" not in says and "load the bundle with shapes='auto'" in says
        assert ("an odd batch has no halves" in says) == (cfg == "split")
    four = {k: torch.cat([v, v]) if v.ndim else v for k, v in call(SHAPES[2]).items()}
    with pytest.raises(InputError, match="convert --add B --input sample=4x4x8x6"):
        ShapeSelector({"both": plan}, torch.device("cpu"), "B").bind((), four)
