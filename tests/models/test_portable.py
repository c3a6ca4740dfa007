"""Test functions that stand for those of libraries while a model is captured."""

from __future__ import annotations

import pytest
import torch

from districompile.models.portable import fourier_filter, portable_functions

utils = pytest.importorskip("diffusers.utils.torch_utils")


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 7, 12), (1, 1, 5, 4), (1, 2, 1, 6), (1, 1, 3, 4)])
@pytest.mark.parametrize("threshold, scale", [(1, 0.2), (2, 1.5)])
def test_fourier_filter_is_that_of_diffusers(shape: tuple[int, ...], threshold: int, scale: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = utils.fourier_filter(x, threshold=threshold, scale=scale)
    torch.testing.assert_close(fourier_filter(x, threshold=threshold, scale=scale), want, rtol=1e-5, atol=1e-5)


def test_the_library_keeps_its_own() -> None:
    held = utils.fourier_filter
    with portable_functions():
        assert utils.fourier_filter is fourier_filter
    assert utils.fourier_filter is held
