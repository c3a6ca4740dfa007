# SPDX-License-Identifier: Apache-2.0
"""Layers in 8 bits for TensorRT: an engine is built from them, and a version without 8-bit numbers refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxscript")

import districompile as dc
from districompile.backends.tensorrt import TensorRTBackend, library
from districompile.errors import BackendError
from tests import helpers_tensorrt as fakes
from tests.bundle.test_quantised_bundle import LAYERS, net


def test_an_engine_is_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt_rtx is not installed: no engine can be built here")
    module, x = net()
    program = dc.convert(module, (x,), ranks=2, phases="exact", quantise=LAYERS)
    program.save(tmp_path / "bundle", TensorRTBackend(flavour="tensorrt_rtx", target="sm89", weights="bound"))
    assert list((tmp_path / "bundle" / "engines").glob("*.engine"))


def test_tensorrt_8_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt": fakes.library_of(fakes.V8()), "tensorrt_rtx": "not installed"}
    monkeypatch.setattr(library, "_load", found.__getitem__)
    monkeypatch.setattr("districompile.backends.tensorrt.backend.present_gpu", lambda device=None: "sm90")
    module, x = net()
    program = dc.convert(module, (x,), ranks=2, phases="exact", quantise=LAYERS)
    with pytest.raises(BackendError, match="is torch.float8_e4m3fn, which TensorRT 8.6 does not have"):
        program.save(tmp_path / "bundle", "tensorrt")
