# SPDX-License-Identifier: Apache-2.0
"""Weights are read in the background, by several threads, into the memory that engines read."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from districompile.bundle import upload, weights
from districompile.bundle.upload import Upload
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError
from districompile.ir.spec import TensorSpec

CPU = torch.device("cpu")
LENGTHS = (1, 7, 100, 99, 1000, 64, 0x301)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    monkeypatch.setattr(upload, "_PIECE", 100)
    content = bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).tolist())
    (tmp_path / "file").write_bytes(content)
    return tmp_path / "file", content


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parts_have_the_bytes_of_the_file(data: tuple[Path, bytes], threads: int) -> None:
    path, content = data
    parts = {37 + sum(LENGTHS[:i]) + 5 * i: n for i, n in enumerate(LENGTHS)}
    found = Upload(path, parts, CPU, threads)
    for offset, length in reversed(parts.items()):
        got = found.take(offset)
        assert got is not None and bytes(got.tolist()) == content[offset : offset + length]
        assert found.take(offset) is None  # it was handed over
    assert found.take(0) is None
    found.end()


def test_parts_that_nobody_takes(data: tuple[Path, bytes]) -> None:
    found = Upload(data[0], {0: 2000, 2500: 300}, CPU)
    found.end()
    assert found.take(0) is None


def test_a_file_that_cannot_be_read(data: tuple[Path, bytes], tmp_path: Path) -> None:
    found = Upload(data[0], {0: 100, 4900: 200}, CPU)
    with pytest.raises(OSError, match="ends at byte 5000"):
        found.take(4900)
    missing = Upload(tmp_path / "none", {0: 10}, CPU)
    with pytest.raises(FileNotFoundError):
        missing.take(0)


def test_other_errors_are_not_waited_for(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(upload, "_read_all", fail)
    found = Upload(data[0], {0: 100}, CPU)
    with pytest.raises(RuntimeError, match="out of memory"):
        found.take(0)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WeightFile, dict[str, Tensor]]:
    """A file whose weights are uploaded to a CPU, too: those that are not there in the order of the file."""
    monkeypatch.setattr(weights, "_UPLOADED", {"cpu"})
    monkeypatch.setattr(weights, "_WORTH_THREADS", 100)
    monkeypatch.setattr(upload, "_PIECE", 64)
    tensors = {
        "conv": torch.randn(4, 3, 3, 3), "half": torch.randn(5, 2, 1, 1).half(), "bias": torch.randn(4),
        "tied": torch.randn(6, 2, 3, 1), "twin": torch.empty(0), "empty": torch.empty(0, 2, 3, 3),
    }  # fmt: skip
    tensors["twin"] = tensors["tied"].clone()
    items = [(n, TensorSpec(tuple(t.shape), t.dtype), functools.partial(lambda t: t, t)) for n, t in tensors.items()]
    WeightFile.write(tmp_path / "weights.safetensors", items)
    return WeightFile.open(tmp_path / "weights.safetensors"), tensors


def test_tensors_are_those_of_the_file(file: tuple[WeightFile, dict[str, Tensor]]) -> None:
    opened, tensors = file
    images = [n for n in tensors if n != "bias"]
    with opened.uploading(tensors, CPU):
        found = {n: opened.tensor(n, CPU, torch.channels_last) for n in images}
    again = {n: opened.tensor(n, CPU, torch.channels_last) for n in images}
    for name in images:
        assert torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype
        assert again[name] is found[name]
    assert found["tied"] is found["twin"]
    assert torch.equal(opened.tensor("bias"), tensors["bias"])
    with opened.uploading(images, CPU):  # all are there
        assert opened._upload is None


def test_a_file_that_was_cut_meanwhile(file: tuple[WeightFile, dict[str, Tensor]]) -> None:
    opened, _ = file
    opened.path.write_bytes(opened.path.read_bytes()[:-150])
    with pytest.raises(BundleError, match=r"weights\.safetensors"), opened.uploading(["conv", "tied", "half"], CPU):
        for name in ("conv", "tied", "half"):
            opened.tensor(name, CPU, torch.channels_last)


def test_what_began_ahead_goes_on(file: tuple[WeightFile, dict[str, Tensor]]) -> None:
    path, tensors = file[0].path, file[1]
    weights.upload_ahead(path, [n for n in tensors if n != "half"], CPU)
    opened = weights.open_weights(path)
    begun = opened._upload
    assert begun is not None and weights.open_weights(path)._upload is None  # it is handed over once
    with opened.uploading(tensors, CPU):
        assert opened._upload is begun
        for name in ("conv", "tied", "half"):
            assert torch.equal(opened.tensor(name, CPU, torch.channels_last), tensors[name])
    assert opened._upload is None


def test_a_file_that_was_replaced_after_it_began(file: tuple[WeightFile, dict[str, Tensor]]) -> None:
    path, tensors = file[0].path, file[1]
    weights.upload_ahead(path, tensors, CPU)
    path.unlink()
    spec = TensorSpec((4, 3, 3, 3), torch.float32)
    WeightFile.write(path, [("conv", spec, lambda: torch.zeros(4, 3, 3, 3))])
    opened = weights.open_weights(path)
    assert opened.names() == ["conv"] and opened._upload is None and not opened.tensor("conv").any()
    weights.upload_ahead(path.with_name("none"), ["conv"], CPU)  # opening the file raises it
    with pytest.raises(BundleError, match="cannot read the weight file"):
        weights.open_weights(path.with_name("none"))


def test_few_bytes_and_other_devices(
    file: tuple[WeightFile, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, tensors = file
    monkeypatch.setattr(weights, "_WORTH_THREADS", 1 << 20)
    with opened.uploading(tensors, CPU):
        assert opened._upload is None
    monkeypatch.setattr(weights, "_UPLOADED", {"cuda"})
    with opened.uploading(tensors, CPU):
        assert opened._upload is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_on_a_gpu(tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    tensors = {f"w{i}": torch.randn(64 + i, 128, 3, 3 + 40 * i) for i in range(20)}
    items = [(n, TensorSpec(tuple(t.shape), t.dtype), functools.partial(lambda t: t, t)) for n, t in tensors.items()]
    WeightFile.write(tmp_path / "weights.safetensors", items)
    opened = WeightFile.open(tmp_path / "weights.safetensors")
    assert opened.path.stat().st_size > weights._WORTH_THREADS
    with opened.uploading(tensors, gpu):
        assert opened._upload is not None
        for i, (name, want) in enumerate(tensors.items()):
            memory = torch.channels_last if i % 2 else torch.contiguous_format
            got = opened.tensor(name, gpu, memory)
            assert got.device == gpu and got.is_contiguous(memory_format=memory) and torch.equal(got.cpu(), want)
