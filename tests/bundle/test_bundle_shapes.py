"""Many shapes in one bundle: written at once, added later, and never left half done."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundles import store
from helpers_shapes import NEW, SHAPES, call, error, image, make, names, program, save

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.bundle.bundle import Bundle
from districompile.bundle.refit import refit
from districompile.bundle.weights import WeightFile
from districompile.common.locks import held
from districompile.errors import BackendError, BundleError, ConvertError, InputError
from districompile.plan.shapes import find_shape, shape_name


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return save(tmp_path_factory.mktemp("shapes") / "bundle", make())


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    import shutil

    return Path(shutil.copytree(bundle, tmp_path / "own"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_weights_are_there_once(bundle: Path, tmp_path: Path) -> None:
    alone = save(tmp_path / "alone", make(), SHAPES[:1])
    many, one = WeightFile.open(bundle / "weights.safetensors"), WeightFile.open(alone / "weights.safetensors")
    added = {n for n in many if n not in one}
    assert all("@" in n for n in added), "only constants of other sizes are added"
    assert sum(many.spec(n).nbytes for n in added) < 200
    assert all(torch.equal(many.tensor(n), one.tensor(n)) for n in one)


def test_names_of_shapes(bundle: Path) -> None:
    plans = Bundle.open(bundle).plans
    assert next(iter(plans)) == "1x4x8x6-1x5x6" and len(plans) == len(SHAPES)
    assert find_shape(plans, "1x4x12x6") == "1x4x12x6-1x5x6"
    with pytest.raises(InputError, match="2 shapes begin with '2x4x8x6': the shapes are 2x4x8x6-2x5x6, 2x4x8x6-2x9x6"):
        find_shape(plans, "2x4x8x6")
    with pytest.raises(InputError, match="there is no shape '9x9': the shapes are 1x4x8x6-1x5x6, "):
        find_shape(plans, "9x9")
    assert shape_name(plans["1x4x12x6-1x5x6"], {"1x4x12x6-1x5x6"}) == "1x4x12x6-1x5x6-2"


def test_a_shape_is_added(own: Path) -> None:
    net, before = make(), bytes_of(own)
    assert program(net, NEW).add_to(own) == ["1x4x10x4-1x7x6"]
    assert program(net, NEW).add_to(own) == [], "it is there"
    after = bytes_of(own)
    kept = {n for n in before if n.startswith(("engines/", "plan"))}
    assert all(after[n] == before[n] for n in kept) and len(after) > len(before)
    module = dc.load(own, lockstep=True)
    for shape in (*SHAPES, NEW):
        assert error(image(module, shape, 1)[0], net(**call(shape))) < 1e-5
    with pytest.raises(BundleError, match="give --force"):  # the added shape would be lost
        save(own, net)


def test_added_while_it_is_loaded(own: Path) -> None:
    net = make()
    module = dc.load(own, lockstep=True)
    first = image(module, SHAPES[0])
    program(net, NEW).add_to(own)
    for shape in SHAPES:
        assert error(image(module, shape, 1)[0], net(**call(shape))) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(first, image(module, SHAPES[0]), strict=True))


class Failing(EagerBackend):
    """A backend that fails at its second engine."""

    error: BaseException = BackendError("no such kernel")
    count = 0

    def build(self, *args: Any) -> None:
        self.count += 1
        if self.count == 2:
            raise self.error
        super().build(*args)


@pytest.mark.parametrize("error", [BackendError("no such kernel"), KeyboardInterrupt(), OSError(28, "full")], ids=repr)
def test_a_failure_leaves_the_bundle_as_it_was(own: Path, error: BaseException) -> None:
    before, beside = bytes_of(own), sorted(own.parent.iterdir())
    backend = Failing()
    backend.error = error
    with pytest.raises((BackendError, KeyboardInterrupt, BundleError)):
        program(make(), NEW).add_to(own, backend)
    assert bytes_of(own) == before and sorted(own.parent.iterdir()) == beside


def test_weights_after_a_refit_hold_for_added_shapes(own: Path) -> None:
    other = make(1)
    refit(own, module=other)
    module = dc.load(own, lockstep=True)
    for shape in SHAPES:
        assert error(image(module, shape, 1)[0], other(**call(shape))) < 1e-5
    program(make(0), NEW).add_to(own)  # of the original model: the bundle's weights hold
    module = dc.load(own, lockstep=True)
    for shape in (*SHAPES, NEW):
        assert error(image(module, shape, 1)[0], other(**call(shape))) < 1e-5
    refit(own, module=make(2))
    assert error(image(dc.load(own, lockstep=True), NEW, 1)[0], make(2)(**call(NEW))) < 1e-5


@pytest.mark.parametrize("first", ["", pytest.param("fuse-parallel-linears", marks=pytest.mark.slow)])
def test_joined_weights(tmp_path: Path, first: str) -> None:
    """A shape whose passes join weights, added to one whose passes do not, and the other way round."""
    net, second = make(), "fuse-parallel-linears" if not first else ""
    folder = save(tmp_path / "b", net, SHAPES[:1], optimise=first)
    refit(folder, module=make(3))
    program(net, NEW, optimise=second).add_to(folder)
    module = dc.load(folder, lockstep=True)
    for shape in (SHAPES[0], NEW):
        assert error(image(module, shape, 1)[0], make(3)(**call(shape))) < 1e-5


def test_engines_of_another_model_or_conversion_are_refused(own: Path, tmp_path: Path) -> None:
    before = bytes_of(own)
    with pytest.raises(BundleError, match=r"the weight first\.weight differs between the shapes"):
        program(make(0), SHAPES[0]).save(tmp_path / "b", backend="eager", shapes=[program(make(1), NEW)])
    with pytest.raises(BundleError, match="differ in the number of processes"):
        program(make(), NEW, ranks=3).add_to(own)
    with pytest.raises(BundleError, match="differ in the steps that are exact"):
        program(make(), NEW, warmup_steps=2).add_to(own)
    with pytest.raises(BundleError, match="was built by eager , and new shapes would be by onnxruntime"):
        program(make(), NEW).add_to(own, "onnxruntime")
    with pytest.raises(BundleError, match="are the same"):
        program(make(), NEW).save(tmp_path / "b", backend="eager", shapes=[program(make(), NEW)])
    with pytest.raises(ConvertError, match="stops after a pass"):
        program(make(), NEW, stop_after="partition").add_to(own)
    assert bytes_of(own) == before and not (tmp_path / "b").exists()


def test_plans_that_do_not_belong_together_are_refused(own: Path) -> None:
    manifest, plan = json.loads((own / "manifest.json").read_text()), json.loads((own / "plan.json").read_text())
    plan["options"]["warmup_steps"] = 9
    store(own, plan, manifest)
    with pytest.raises(BundleError, match=r"differ in the steps that are exact: a bundle holds one conversion"):
        Bundle.open(own)


def test_only_one_process_changes_a_bundle(own: Path) -> None:
    done = threading.Event()

    def add() -> None:
        program(make(), NEW).add_to(own)
        done.set()

    with held(own):
        thread = threading.Thread(target=add)
        thread.start()
        program(make(), (1, 6, 6, 5))  # takes as long
        assert not done.wait(0.5)
    thread.join()
    assert done.is_set() and len(Bundle.open(own).plans) == len(SHAPES) + 1


@pytest.mark.slow
def test_onnx_files_find_weights_that_moved(tmp_path: Path) -> None:
    """A constant of another size is added to the weight file, which moves the others."""
    net = make()
    folder = save(tmp_path / "b", net, SHAPES[:2], backend="onnxruntime")
    program(net, NEW).add_to(folder)
    module = dc.load(folder, lockstep=True)
    for shape in (*SHAPES[:2], NEW):
        assert error(image(module, shape, 1)[0], net(**call(shape))) < 1e-4
