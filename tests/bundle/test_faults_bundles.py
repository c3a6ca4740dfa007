"""Bundles with one changed value, their hashes made right again: refused in one line, or as good as before.

Not changed are values that nothing in a bundle could contradict: what rows outside of the image are filled with
(``fill``, ``above`` and ``below``), and what a reduction does (``op``). Whoever changes them makes another model.
Nor are numbers in a graph contradicted, once the engine has the name of its new content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundles import TRIPWIRE, WRONG, Place, change, make, places, set_tripwire, store, value_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import districompile as dc
from districompile.backends.eager import EagerBackend

CHANGES = ("replace", "replace", "replace", "copy", "swap", "delete", "repeat", "rename", "step", "reverse", "add")
UNCONTRADICTED = ("fill", "above", "below", "op")
MOST_SECONDS, MOST_BYTES = 20.0, 1 << 30

Check = Callable[[Any, Any], str | None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Check]]:
    """The plan, the manifest, and what becomes of a bundle with others: what was refused, or None where it is right."""
    folder = tmp_path_factory.mktemp("faults")
    module, args = make(folder / "b", optimise="all")
    fired = set_tripwire(folder)
    sys.path.insert(0, str(folder))
    plan, manifest = (json.loads((folder / "b" / name).read_text()) for name in ("plan.json", "manifest.json"))
    expected = module(*args)["sample"]

    def check(plan: Any, manifest: Any) -> str | None:
        store(folder / "b", plan, manifest)
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            loaded = dc.load(folder / "b", lockstep=True)
            with loaded.exact():
                (actual,) = leaves(loaded(*args))
        except dc.Error as e:
            assert "\n" not in str(e)
            return str(e)
        finally:
            assert not fired.exists() and TRIPWIRE not in sys.modules
            assert time.monotonic() - started < MOST_SECONDS
            assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        return None

    yield plan, manifest, check
    sys.path.remove(str(folder))


def leaves(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from (t for v in x.values() for t in leaves(v))
    elif isinstance(x, list | tuple):
        yield from (t for v in x for t in leaves(v))
    elif hasattr(x, "to_tuple"):
        yield from leaves(x.to_tuple())


def test_the_bundle_is_right_as_it_is(bundle: tuple[Any, Any, Check]) -> None:
    plan, manifest, check = bundle
    assert check(plan, manifest) is None


def draw_change(data: st.DataObject, x: Any) -> Any:
    """``x`` with one value changed."""
    everywhere = [p for p in places(x) if not any(key in UNCONTRADICTED for key in p)]
    place: Place = data.draw(st.sampled_from(everywhere))
    how = data.draw(st.sampled_from(CHANGES))
    value = value_at(x, place)
    if how in ("copy", "swap"):
        apart = [p for p in everywhere if p[: len(place)] != place and place[: len(p)] != p]
        same = [p for p in apart if type(value_at(x, p)) is type(value)]
        other = data.draw(st.sampled_from(same)) if same else place
    elif how == "rename":
        other = data.draw(st.sampled_from(["x", "", "@", *(p[-1] for p in everywhere)]))
    elif how == "step":
        other = data.draw(st.sampled_from([None, 1]))
    else:
        other = data.draw(st.sampled_from(WRONG) | st.integers() | st.floats() | st.text(max_size=5))
    return change(x, place, how, other)


def campaign(examples: int) -> Any:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@campaign(220)
@given(st.data())
def test_a_changed_plan(bundle: tuple[Any, Any, Check], data: st.DataObject) -> None:
    plan, manifest, check = bundle
    check(draw_change(data, plan), manifest)


@campaign(100)
@given(st.data())
def test_a_changed_manifest(bundle: tuple[Any, Any, Check], data: st.DataObject) -> None:
    plan, manifest, check = bundle
    check(plan, draw_change(data, manifest))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[torch.Tensor, ...]]:
    folder = tmp_path_factory.mktemp("graphs")
    return folder / "b", make(folder / "b", optimise="all")[1]


@campaign(60)
@given(st.data())
def test_a_changed_graph_under_its_new_name(graphs: tuple[Path, tuple[torch.Tensor, ...]], data: st.DataObject) -> None:
    """Another model's graph may give other numbers, but fails in one line where it cannot be run."""
    source, args = graphs
    plan, manifest = (json.loads((source / name).read_text()) for name in ("plan.json", "manifest.json"))
    name = data.draw(st.sampled_from(sorted(plan["phases"]["exact"]["segments"])))
    name = plan["phases"]["exact"]["segments"][name]["engines"][0]
    changed = draw_change(data, json.loads((source / "engines" / name).read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(source, Path(scratch) / "b")
        path = folder / "engines" / name
        path.write_text(json.dumps(changed))
        new = name
        with contextlib.suppress(dc.Error):
            new = f"{EagerBackend().content_name(path)}.graph.json"
        path.rename(path.with_name(new))
        digest = hashlib.sha256(path.with_name(new).read_bytes()).hexdigest()
        files = {k: v for k, v in manifest["files"].items() if k != f"engines/{name}"}
        files[f"engines/{new}"] = {"size": path.with_name(new).stat().st_size, "sha256": digest}
        store(folder, json.loads(json.dumps(plan).replace(name, new)), {**manifest, "files": files})
        try:
            loaded = dc.load(folder, lockstep=True)
            with loaded.exact():
                loaded(*args)
        except dc.Error as e:
            assert "\n" not in str(e)


def edited(plan: Any, at: Place, value: Any) -> Any:
    return change(plan, at, "replace", value)


def exchange(plan: Any, purpose: str) -> tuple[str, Any]:
    return next((n, c) for n, c in plan["collectives"].items() if c["purpose"] == purpose)


def test_what_does_not_fit_is_named(bundle: tuple[Any, Any, Check]) -> None:
    plan, manifest, check = bundle
    name, halo = exchange(plan, "conv")
    pieces: Place = ("collectives", name, "pieces", 0)
    take = next(i for i, s in enumerate(plan["phases"]["exact"]["steps"]) if s["@"] == "SliceInput")
    step: Place = ("phases", "exact", "steps", take)
    segment = next(iter(plan["phases"]["exact"]["segments"]))
    value = next(iter(plan["phases"]["exact"]["values"]))
    weight = next(n for n, w in plan["weights"].items() if len(w["shape"]) == 4)
    shape: Place = ("phases", "exact", "values", value, 0, "shape")
    for place, wrong, message in (
        (("ranks",), 1, "options for 2|for 1 ranks"),
        (("ranks",), -2, "ranks is -2"),
        ((*pieces, "src"), 7, "goes from rank 7"),
        ((*pieces, "start"), 1 - halo["pieces"][0]["start"], "other rows of the image"),
        ((*pieces, "rows"), 1 << 60, "does not have"),
        (("collectives", name, "dim"), 9, "no dim 9"),
        (("collectives", name, "source"), "nothing", "before it exists"),
        ((*step, "source"), "timestep", "no input that is divided"),
        ((*step, "stops", 1), 1 << 40, "takes rows"),
        ((*shape,), [1 << 30, 1 << 30], "would take|another dtype|another shape"),
        (("phases", "exact", "segments", segment, "engines", 0), "../plan.json", "engine named"),
        (("phases", "exact", "segments", segment, "inputs"), [], "nothing reads|other inputs"),
        (("weights", weight, "shape", 0), 9, f"the weight {weight} as"),
        (("weights", weight, "dtype"), {"@dtype": "float16"}, f"the weight {weight} as"),
        (("options", "warmup_steps"), 0, r"options\.warmup_steps"),
        (("options", "cfg"), "split", "halves no image"),
        (("output", "kind"), "leaf", "has the keys"),
        (("signature", 0), "a b", "the signature"),
    ):
        found = check(edited(plan, place, wrong), manifest)
        assert found is not None, (place, wrong)
        assert re.search(message, found), (place, found)


def test_steps_out_of_order(bundle: tuple[Any, Any, Check]) -> None:
    """Every step is needed, once, and after what it reads."""
    plan, manifest, check = bundle
    for phase in ("exact", "displaced"):
        steps = plan["phases"][phase]["steps"]
        for number, step in enumerate(steps):
            at: Place = ("phases", phase, "steps", number)
            assert check(change(plan, at, "repeat", None), manifest) is not None, (phase, step)
            harmless = phase == "displaced" and step["@"] == "SaveState"  # the exact phase keeps it as well
            assert check(change(plan, at, "delete", None), manifest) is not None or harmless, (phase, step)
        assert check(change(plan, ("phases", phase, "steps"), "reverse", None), manifest) is not None


def test_a_changed_graph_is_not_the_engine_of_its_name(bundle: tuple[Any, Any, Check], tmp_path: Path) -> None:
    plan, manifest, check = bundle
    assert check(plan, manifest) is None
    make(tmp_path / "b", optimise="all")
    for path in sorted((tmp_path / "b" / "engines").iterdir()):
        text = path.read_text()
        data = json.loads(text)
        data["graph"]["nodes"].append(["aten.neg.default", [data["graph"]["outputs"][0]], {}])
        path.write_text(json.dumps(data))
        with pytest.raises(dc.Error, match="holds another segment than its name says"):
            dc.load(tmp_path / "b", lockstep=True, verify=False)
        path.write_text(text)
