"""Test what a call is converted for: its key, the numbers among its arguments, and its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from districompile.errors import InputError
from districompile.live.call import bind, rows_of_call


def forward(sample: Any, timestep: Any, states: Any = None, scale: float = 1.0, guess: bool = False,
            attention_kwargs: Any = None, return_dict: bool = True) -> Any:  # fmt: skip
    raise AssertionError


def call(*args: Any, adapted: bool = False, numbers: bool = True, **kwargs: Any) -> Any:
    return bind(forward, args, kwargs, adapted, numbers)


SAMPLE = torch.zeros(2, 4, 8, 8)


def test_values_of_tensors_and_fractions_do_not_count() -> None:
    first = call(SAMPLE, 5, scale=0.5)
    assert first.key == call(SAMPLE + 1, torch.tensor(7.0), scale=0.25).key
    assert first.numbers and torch.equal(first.arguments["scale"], torch.tensor(0.5))
    assert not call(SAMPLE, torch.tensor(5)).numbers


def test_shapes_presence_and_switches_count() -> None:
    keys = [
        call(SAMPLE, 5), call(SAMPLE[:1], 5), call(SAMPLE, 5, states=torch.zeros(2, 7, 3)),
        call(SAMPLE, 5, states=torch.zeros(2, 9, 3)), call(SAMPLE, 5, guess=True), call(SAMPLE.half(), 5),
    ]  # fmt: skip
    assert len({c.key for c in keys}) == len(keys)


def test_fractions_count_where_they_are_constants() -> None:
    assert call(SAMPLE, 5, scale=0.5, numbers=False).key != call(SAMPLE, 5, scale=0.25, numbers=False).key


def test_return_dict_is_passed_on_and_does_not_count() -> None:
    found = call(SAMPLE, 5, return_dict=False)
    assert found.key == call(SAMPLE, 5).key and "return_dict" not in found.arguments
    assert found.passed()["return_dict"] is False and "return_dict" not in call(SAMPLE, 5).passed()


def test_scale_of_adapters_is_not_an_input() -> None:
    found = call(SAMPLE, 5, adapted=True, attention_kwargs={"scale": 0.3})
    assert found.adapter_scale == 0.3 and found.key == call(SAMPLE, 5).key
    assert call(SAMPLE, 5, attention_kwargs={"scale": 0.3}).adapter_scale == 1.0


def test_objects_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="states is a object, which cannot be an input"):
        call(SAMPLE, 5, states=object())
    with pytest.raises(InputError, match="unexpected keyword argument 'other'"):
        call(SAMPLE, 5, other=1)


def test_rows_are_those_of_images_of_one_picture() -> None:
    arguments = {
        "sample": SAMPLE, "t": torch.tensor(1.0), "states": torch.zeros(2, 7, 3),
        "image_embeds": torch.zeros(2, 1, 4, 9),
        "residuals": [torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 64, 64)], "mask": torch.zeros(2, 1, 8, 8).bool(),
    }  # fmt: skip
    assert rows_of_call(arguments) == {"sample": 2, "residuals.0": 2, "residuals.1": 2}
    odd = {"sample": torch.zeros(1, 4, 9, 5), "down": torch.zeros(1, 8, 5, 3)}
    assert rows_of_call(odd) == {"sample": 2, "down": 2}


def test_rows_of_video_and_of_tokens() -> None:
    assert rows_of_call({"sample": torch.zeros(1, 4, 3, 8, 6)}) == {"sample": 3}
    assert rows_of_call({"hidden_states": torch.zeros(1, 64, 32), "states": torch.zeros(1, 7, 3)}) == {
        "hidden_states": 1
    }
    assert rows_of_call({"x": torch.zeros(2, 7), "states": torch.zeros(1, 7, 3)}) is None
