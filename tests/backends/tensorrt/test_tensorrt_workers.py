# SPDX-License-Identifier: Apache-2.0
"""Several engines built at once, by processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxscript")
pytest.importorskip("tensorrt_rtx")

from districompile.backends.build import build_segments
from districompile.backends.tensorrt import TensorRTBackend, worker
from districompile.backends.tensorrt.library import find_library
from districompile.cli import backend_options
from districompile.errors import BackendError
from districompile.ir.segment import SegmentGraph
from districompile.testing import make_segment, write_weights


def segments(count: int) -> dict[int, SegmentGraph]:
    def net(k: int) -> SegmentGraph:
        def f(x: Tensor) -> Tensor:
            return torch.relu(x) * (k + 2)

        return make_segment(f, {"x": torch.randn(4, 8)})

    return {k: net(k) for k in range(count)}


def test_processes_write_the_engines_of_one(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights.safetensors", {})
    seen: list[tuple[int, int]] = []
    files = {}
    for workers in (1, 2):
        backend = TensorRTBackend(flavour="tensorrt_rtx", target="sm89", workers=workers)
        assert backend.builds_at_once == workers
        folder = tmp_path / str(workers)
        files[workers] = build_segments(
            backend, segments(3).items(), weights, folder, lambda done, of: seen.append((done, of))
        )
        assert all((folder / file).stat().st_size > 1000 for file in files[workers].values())
    assert files[1] == files[2] and len({*files[1].values()}) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_an_error_of_a_process_is_that_of_the_build(tmp_path: Path) -> None:
    library = find_library("tensorrt_rtx")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    write_weights(tmp_path / "weights.safetensors", {})
    options = TensorRTBackend(flavour="tensorrt_rtx", target="sm89").options
    pool = worker.worker_pool(library, 1)
    files = tmp_path / "x.onnx", tmp_path / "weights.safetensors", tmp_path / "x.engine"
    (future,) = pool.submit([worker.job(library, *files, options, {})])
    with pytest.raises(BackendError, match=r"tensorrt_rtx cannot read x\.onnx"):
        future.result(120)
    pool.close()
    assert not files[2].exists()


def test_an_engine_takes_less_effort(tmp_path: Path) -> None:
    backend = TensorRTBackend(flavour="tensorrt_rtx", target="sm89", effort=0, workers=1)
    assert backend.options.effort == 0 and "effort=0" in backend.version
    weights = write_weights(tmp_path / "weights.safetensors", {})
    files = build_segments(backend, segments(1).items(), weights, tmp_path / "engines")
    assert (tmp_path / "engines" / files[0]).exists()
    assert backend_options.parse_options("tensorrt", ["effort=2"]) == {"effort": 2}


@pytest.mark.parametrize("options", [{"effort": 6}, {"effort": -1}, {"workers": 0}])
def test_numbers_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(BackendError, match=f"{next(iter(options))}=.*: give"):
        TensorRTBackend(**options)  # type: ignore[arg-type]
