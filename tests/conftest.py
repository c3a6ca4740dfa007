"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._export import utils as export_utils

# Tests run side by side, one process a core: more threads than cores wait for each other, by spinning, which made
# calls of small networks take ten times as long
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks", type=int, default=240, help="how many random networks test_fuzz.py cuts")


@pytest.fixture(scope="session", autouse=True)
def operators_are_listed_once() -> Iterator[None]:
    """``torch.export`` asks PyTorch's dispatcher for all operators of C++ anew each time, a fifth of what it
    takes to export a network of two layers; libraries in C++ are not loaded between two tests."""
    listing = export_utils._materialize_cpp_cia_ops
    listing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", lambda: None)
        yield
