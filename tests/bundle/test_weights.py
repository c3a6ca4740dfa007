from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError
from districompile.ir.spec import TensorSpec
from districompile.testing import write_weights
from tests.helpers_segments import spec

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (1, 2, 3), (0, 4)]
    return {
        f"{str(d).removeprefix('torch.')}.{i}": (torch.randn(s, generator=generator) * 3).to(d)
        for d in DTYPES
        for i, s in enumerate(shapes)
    }


def test_round_trip_and_safetensors(tmp_path: Path) -> None:
    given = tensors()
    file = write_weights(tmp_path / "w.safetensors", given)
    theirs = safetensors.torch.load_file(file.path)
    assert sorted(file.names()) == sorted(given)
    for name, tensor in given.items():
        got = file.tensor(name)
        assert file.spec(name) == spec(tensor) == spec(got) and torch.equal(got, tensor)
        if name in theirs:  # not an alias
            assert torch.equal(theirs[name], tensor)
    assert set(given) - set(theirs) <= {n for n, t in given.items() if t.numel() <= 1}


def test_location_is_aligned_and_true(tmp_path: Path) -> None:
    given = tensors()
    file = write_weights(tmp_path / "w.safetensors", given)
    raw = file.path.read_bytes()
    for name, tensor in given.items():
        offset, length = file.location(name)
        assert offset % tensor.dtype.itemsize == 0 and length == tensor.numel() * tensor.dtype.itemsize
        assert raw[offset : offset + length] == tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    assert min(file.location(n)[0] for n in given) % 4096 == 0


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    w = torch.randn(64, 64)
    almost = w.clone()
    almost[32, 0] += 1  # differs in the middle only
    big = torch.randn(300, 300)
    nearly = big.clone()
    nearly[150, 150] += 1
    file = write_weights(
        tmp_path / "w.safetensors",
        {
            "b.tied": w,
            "a": w.clone(),
            "half": w.half(),
            "almost": almost,
            "big": big,
            "nearly": nearly,
            "flat": w.view(-1),
        },
    )
    assert file.location("a") == file.location("b.tied") != file.location("almost")
    assert file.location("big") != file.location("nearly") and torch.equal(file.tensor("nearly"), nearly)
    assert torch.equal(file.tensor("b.tied"), w) and file.tensor("flat").shape == (4096,)
    assert "b.tied" not in safetensors.torch.load_file(file.path)


def test_dtype_is_converted_and_strides_are_resolved(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    path = tmp_path / "w.safetensors"
    progress: list[tuple[int, int]] = []
    items = [
        ("w", TensorSpec((4, 6), torch.float16), lambda: w),
        ("t", TensorSpec((6, 4), torch.float32), lambda: w.t()),
        ("p", TensorSpec((2,), torch.float32), lambda: torch.nn.Parameter(w[0, :2])),
    ]
    digest = WeightFile.write(path, items, lambda *p: progress.append(p))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert progress == [(8, 152), (104, 152), (152, 152)]
    file = WeightFile.open(path)
    assert torch.equal(file.tensor("w"), w.half()) and torch.equal(file.tensor("t"), w.t())


def test_writing_is_deterministic(tmp_path: Path) -> None:
    given = tensors()
    items = [(n, spec(t), lambda t=t: t) for n, t in given.items()]
    assert WeightFile.write(tmp_path / "a", items) == WeightFile.write(tmp_path / "b", reversed(items))


def test_one_copy_on_a_device(tmp_path: Path) -> None:
    w = torch.randn(3)
    file = write_weights(tmp_path / "w.safetensors", {"a": w, "b": w})
    meta = torch.device("meta")
    assert file.tensor("a", meta) is file.tensor("a", meta) is file.tensor("b", meta)
    assert file.tensor("a").data_ptr() == file.tensor("b", torch.device("cpu")).data_ptr()


def test_bad_items(tmp_path: Path) -> None:
    one = TensorSpec((1,), torch.float32)
    with pytest.raises(BundleError, match=r"'a' has shape \(2,\), but \(1,\) was converted"):
        WeightFile.write(tmp_path / "w", [("a", one, lambda: torch.zeros(2))])
    with pytest.raises(BundleError, match="'a' is given twice"):
        WeightFile.write(tmp_path / "w", [("a", one, lambda: torch.zeros(1))] * 2)
    with pytest.raises(BundleError, match="'a' has no data"):
        WeightFile.write(tmp_path / "w", [("a", one, lambda: torch.zeros(1, device="meta"))])
    with pytest.raises(BundleError, match="complex128"):
        WeightFile.write(tmp_path / "w", [("a", TensorSpec((1,), torch.complex128), lambda: torch.zeros(1))])


def _header(entries: object, data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_truncated(length: int, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "w.safetensors", tensors())
    raw = file.path.read_bytes()
    file.path.write_bytes(raw[:length])
    with pytest.raises(BundleError, match=r"weight file .*w.safetensors is truncated or malformed") as caught:
        WeightFile.open(file.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"[]  ",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 5),
        _header({"__metadata__": {"districompile.aliases": '{"b": "a"}'}}, b""),
        _header({"__metadata__": "x"}, b""),
    ],
)  # fmt: skip
def test_malformed(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(raw)
    with pytest.raises(BundleError, match="is truncated or malformed"):
        WeightFile.open(tmp_path / "w")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read the weight file .*nowhere: No such file"):
        WeightFile.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="has no tensor 'x'"):
        write_weights(tmp_path / "w", {}).tensor("x")


def test_foreign_file(tmp_path: Path) -> None:
    """A plain safetensors file, whose tensors may lie unaligned."""
    given = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(3)}
    safetensors.torch.save_file(given, tmp_path / "w")
    file = WeightFile.open(tmp_path / "w")
    assert all(torch.equal(file.tensor(n), t) for n, t in given.items())
