"""Flattening of calls, and outputs described, stored as JSON and put together again."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch

from districompile.errors import CaptureError, InputError
from districompile.frontend.call_tree import (
    OutputNamespace,
    describe_output,
    flatten_call,
    leaves_of,
    packages_of,
    rebuild_output,
)


@dataclasses.dataclass
class Record:
    sample: Any
    extra: Any = None


class Point(NamedTuple):
    x: Any
    y: Any


def round_trip(tree: Any, return_dict: bool | None = None) -> Any:
    described = describe_output(tree)
    return rebuild_output(json.loads(json.dumps(described)), leaves_of(tree), return_dict, packages_of(described))


def test_paths_follow_nesting_and_signature_order() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    signature = ("sample", "timestep", "cond", "residuals", "flag")
    got = flatten_call(signature, (a, 5), {"flag": True, "residuals": [b, (c,)], "cond": {"ids": b, "r": Record(c)}})
    assert list(got) == [
        "sample", "timestep", "cond.ids", "cond.r.sample", "cond.r.extra", "residuals.0", "residuals.1.0", "flag",
    ]  # fmt: skip
    assert got["sample"] is a and got["cond.r.sample"] is c and got["residuals.0"] is b
    assert got["timestep"] == 5 and got["cond.r.extra"] is None and got["flag"] is True


def test_starred_parameters() -> None:
    got = flatten_call(("x", "*rest", "**more"), (1, 2, 3), {"z": {"k": 4}})
    assert got == {"x": 1, "rest.0": 2, "rest.1": 3, "z.k": 4}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2, 3), {}, "3 positional arguments given, but forward takes 2: x, y"),
        ((1,), {"x": 2}, "argument 'x' is given twice"),
        ((1,), {"z": 2}, "unknown argument 'z'; forward takes: x, y"),
        (({"a.b": 1, "a": {"b": 2}},), {}, "same path 'x.a.b'"),
    ],
)
def test_calls_that_do_not_bind(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        flatten_call(("x", "y"), args, kwargs)


def test_outputs_come_back_as_they_were() -> None:
    t = [torch.full((1,), float(i)) for i in range(4)]
    tree = (t[0], [t[1], None, 3, "s"], {"k": t[2], 7: (t[3],)}, 0.5, True)
    got = round_trip(tree)
    assert got == (t[0], [t[1], None, 3, "s"], {"k": t[2], 7: (t[3],)}, 0.5, True)
    assert [int(x) for x in leaves_of(tree)] == [0, 1, 2, 3]


def test_dataclass_and_namedtuple() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    record = round_trip(Record(a, [b]))
    assert type(record) is Record and record.sample is a and record.extra[0] is b
    point = round_trip(Point(a, None))
    assert type(point) is Point and point.x is a and point.y is None


def test_return_dict() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert round_trip(Record(a), False) == (a,)  # None fields are dropped, as by to_tuple
    assert round_trip(Record(a, b), False) == (a, b)
    assert round_trip({"sample": a}, False) == (a,)
    assert type(round_trip(Record(a), True)) is Record
    assert round_trip((a, b), True) == (a, b)
    assert round_trip((a, None), False) == (a, None)


def test_model_output_of_diffusers() -> None:
    unet = pytest.importorskip("diffusers.models.unets.unet_2d_condition")
    a = torch.zeros(2)
    got = round_trip(unet.UNet2DConditionOutput(sample=a))
    assert type(got) is unet.UNet2DConditionOutput
    assert got.sample is a and got[0] is a and got["sample"] is a
    assert round_trip(unet.UNet2DConditionOutput(sample=a), False) == (a,)


def test_class_that_cannot_be_imported() -> None:
    Local = dataclasses.make_dataclass("Local", ["sample", "other"])
    a, b = torch.zeros(1), torch.ones(1)
    got = round_trip(Local(a, b))
    assert isinstance(got, OutputNamespace)
    assert got.sample is a and got[1] is b and got["other"] is b and got[:1] == (a,)
    assert round_trip(Local(a, None), False) == (a,)
    with pytest.raises(AttributeError):
        _ = got.missing


def test_named_class_must_be_a_record() -> None:
    """A bundle cannot make the runtime call an arbitrary function."""
    items = [["command", {"kind": "constant", "value": "true"}]]
    description = {"kind": "object", "class": "os:system", "items": items}
    for trusted in ((), ("os",)):
        assert isinstance(rebuild_output(description, [], trusted=trusted), OutputNamespace)


def test_output_that_cannot_be_stored() -> None:
    with pytest.raises(CaptureError, match=r"output\.0 is a builtins\.object"):
        describe_output((object(),))


def test_ordered_dict_is_a_dict() -> None:
    a = torch.zeros(1)
    assert round_trip(collections.OrderedDict(y=a)) == {"y": a}
