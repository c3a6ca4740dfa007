# SPDX-License-Identifier: Apache-2.0
"""One file of weights for all phases, segments and ranks of a bundle.

``weights.safetensors`` has two uses: it is a valid safetensors file, and the external data of every ONNX file of the
bundle (which needs only a location, an offset and a length). Tensors follow each other without a gap, as safetensors
requires, with the widest elements first, so that each one is aligned to its element size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from districompile.bundle.hashes import State, state_of
from districompile.bundle.upload import Upload
from districompile.common.tensors import not_finite
from districompile.errors import BundleError, ValueWarning
from districompile.ir.spec import TensorSpec, dtype_name

Item = tuple[str, TensorSpec, Callable[[], Tensor]]

_PAGE = 4096  # the data starts at a page, so that it can be mapped
_MAX_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 24
_SAMPLE = 1 << 16
_WORTH_THREADS = 64 << 20  # bytes
_UPLOADED = {"cuda"}  # kinds of devices
_ALIASES = "districompile.aliases"

_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class WeightFile:
    """A weight file opened for reading.

    Tensors are views of one private mapping of the file. A tensor is copied only when it is moved to another device,
    once for all users.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> None:
        self.path = path
        self._specs = dict(specs)
        self._offsets = dict(offsets)
        self._data: Tensor | None = None
        self._moved: dict[tuple[str, torch.device, torch.memory_format], Tensor] = {}
        self._upload: tuple[torch.device, Upload] | None = None

    @staticmethod
    def write(path: Path, items: Iterable[Item], progress: Callable[[int, int], None] | None = None) -> str:
        """Write ``items`` (name, spec, function that makes the tensor). Return the file's sha256 in hex.

        One tensor is held at a time; it is converted to its spec's dtype. Tensors of equal spec and equal bytes are
        stored once (tied weights; the other names become aliases). ``progress`` gets the bytes done and in all. Raises
        :class:`BundleError` for a tensor of another shape, a name given twice or a dtype that cannot be stored.
        """
        ordered = sorted(items, key=lambda item: (-item[1].dtype.itemsize, item[0]))
        specs = {name: spec for name, spec, _ in ordered}
        _check_items(ordered, specs)
        total = sum(spec.nbytes for spec in specs.values())
        # Aliases are only known once the tensors are written, so the header is written last. The space for it suffices
        # in the worst case: each name with its own entry and an alias as well.
        room = len(_header(specs, dict.fromkeys(specs, total), {})) + sum(2 * len(json.dumps(n)) + 90 for n in specs)
        start = -(-(8 + room) // _PAGE) * _PAGE
        offsets: dict[str, int] = {}
        aliases: dict[str, str] = {}
        candidates: dict[tuple[TensorSpec, bytes], list[str]] = {}
        faults: list[str] = []
        done = end = 0
        with path.open("w+b") as file:
            file.seek(start)
            for name, spec, make in ordered:
                tensor = make()
                data = _bytes_of(name, spec, tensor)
                fault = not_finite(tensor.to(spec.dtype))
                if fault is not None:
                    faults.append(f"{name} ({fault})")
                del tensor
                same = candidates.setdefault((spec, _sample(data)), [])
                twin = next((n for n in same if _equals(file, start + offsets[n], data)), None)
                if twin is None:
                    file.write(data)
                    offsets[name] = end
                    end += len(data)
                    same.append(name)
                else:
                    aliases[name] = twin
                done += len(data)
                del data
                if progress is not None:
                    progress(done, total)
            header = _header({n: specs[n] for n in offsets}, offsets, aliases)
            file.seek(0)
            file.write(struct.pack("<Q", start - 8) + header.ljust(start - 8))
            file.flush()
            file.truncate(start + end)
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            warnings.warn(f"weights hold values that are no numbers: {', '.join(faults[:3])}{more}", ValueWarning, 2)
        return digest.hexdigest()

    @staticmethod
    def open(path: Path) -> WeightFile:
        """Open ``path``. Raises :class:`BundleError` if it is missing, truncated or malformed."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                specs, offsets = _read_header(file, size)
        except OSError as e:
            raise BundleError(f"cannot read the weight file {path}: {e.strerror or e}") from e
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as e:
            raise BundleError(f"the weight file {path} is truncated or malformed: {e}") from e
        return WeightFile(path, specs, offsets)

    def names(self) -> list[str]:
        """Return every name, aliases included, in the order of the data."""
        return list(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype of a tensor. Raises :class:`BundleError` if there is none of that name."""
        try:
            return self._specs[name]
        except KeyError:
            raise BundleError(f"the weight file {self.path} has no tensor {name!r}") from None

    def location(self, name: str) -> tuple[int, int]:
        """Return where a tensor lies: (offset from the beginning of the file, length), both in bytes."""
        return self._offset(name), self.spec(name).nbytes

    def tensor(
        self,
        name: str,
        device: torch.device | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Return a tensor: a view of the mapped file (not to be written to), or its one copy on ``device``.

        In another ``memory_format`` than the file's, it is a separate copy on any device, also held once.
        """
        device = device or torch.device("cpu")
        plain = memory_format == torch.contiguous_format
        if device.type == "cpu" and plain:
            return self._view(name)
        key = (f"{self._offset(name)}:{self.spec(name)}", device, memory_format)  # aliases share the copy
        if key not in self._moved:
            view = self._uploaded(name, device)
            self._moved[key] = view.to(device) if plain else _copied(view, device, memory_format)
        return self._moved[key]

    @contextlib.contextmanager
    def uploading(self, names: Iterable[str], device: torch.device) -> Iterator[None]:
        """Read tensors into the memory of a GPU in the background, for :meth:`tensor` inside. Elsewhere do nothing.

        Few bytes are not worth the threads. What :func:`upload_ahead` began goes on.
        """
        if self._upload is None or self._upload[0] != device:
            self._begin_upload(names, device)
        try:
            yield
        finally:
            self._end_upload()

    def _begin_upload(self, names: Iterable[str], device: torch.device) -> None:
        self._end_upload()
        there = {key for key, where, _ in self._moved if where == device}
        parts = dict(self.location(n) for n in names if f"{self._offset(n)}:{self.spec(n)}" not in there)
        if device.type in _UPLOADED and sum(parts.values()) >= _WORTH_THREADS:
            upload = Upload(self.path, {offset: length for offset, length in parts.items() if length}, device)
            self._upload = device, upload

    def _end_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            with contextlib.suppress(Exception):  # of what nobody asked for
                upload[1].end()

    def _uploaded(self, name: str, device: torch.device) -> Tensor:
        """Return a tensor as it was read in the background, or else as a view of the mapped file."""
        if self._upload is None or self._upload[0] != device:
            return self._view(name)
        try:
            raw = self._upload[1].take(self._offset(name))
        except OSError as e:
            raise BundleError(f"cannot read the weight file {self.path}: {e.strerror or e}") from e
        spec = self._specs[name]
        return self._view(name) if raw is None else raw.view(spec.dtype).reshape(spec.shape)

    def sharing(self, name: str) -> list[str]:
        """Return the other names of the memory of ``name``."""
        offset = self._offset(name)
        return [n for n, o in self._offsets.items() if o == offset and n != name and self._specs[n].nbytes]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` over ``name`` in this process, in every copy that :meth:`tensor` returned. The file stays.

        The mapping is private: pages that are written to become this process's own.
        """
        key = f"{self._offset(name)}:{self.spec(name)}"
        copies = [t for (k, _, _), t in self._moved.items() if k == key]
        for copy in (*copies, self._view(name)):
            copy.copy_(tensor)

    def _offset(self, name: str) -> int:
        self.spec(name)
        return self._offsets[name]

    def _view(self, name: str) -> Tensor:
        offset, length = self.location(name)
        spec = self._specs[name]
        if not length:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if self._data is None:
            self._data = torch.from_file(str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8)
        raw = self._data[offset : offset + length]
        if offset % spec.dtype.itemsize:  # never so in a file that districompile writes
            raw = raw.clone()
        return raw.view(spec.dtype).reshape(spec.shape)


_AHEAD: dict[Path, tuple[State | None, WeightFile]] = {}


def upload_ahead(path: Path, names: Iterable[str], device: torch.device) -> None:
    """Begin to read tensors into the memory of a GPU, for the next :func:`open_weights` of the file ``path``.

    A process has other work before it loads a bundle, such as imports. Nothing is raised here."""
    with contextlib.suppress(Exception):  # loading the bundle raises it
        state, file = state_of(path), WeightFile.open(path)
        file._begin_upload(names, device)
        _AHEAD[path.resolve()] = state, file


def open_weights(path: Path) -> WeightFile:
    """Open ``path`` as :meth:`WeightFile.open` does, with what :func:`upload_ahead` began, once."""
    state, file = _AHEAD.pop(path.resolve(), (None, None))
    if file is not None and state == state_of(path):
        return file
    if file is not None:
        file._end_upload()
    return WeightFile.open(path)


def _check_items(items: list[Item], specs: Mapping[str, TensorSpec]) -> None:
    if len(specs) != len(items):
        seen: set[str] = set()
        twice = next(name for name, _, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BundleError(f"the weight {twice!r} is given twice")
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise BundleError(f"the weight {name!r} has dtype {dtype_name(spec.dtype)}, which cannot be stored")


def _bytes_of(name: str, spec: TensorSpec, tensor: Tensor) -> memoryview:
    if tuple(tensor.shape) != spec.shape:
        raise BundleError(f"the weight {name!r} has shape {tuple(tensor.shape)}, but {spec.shape} was converted")
    if tensor.device.type == "meta":
        raise BundleError(f"the weight {name!r} has no data (meta tensor): give the values of the module's weights")
    flat = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.resolve_conj().resolve_neg().view(torch.uint8).numpy().data


def _sample(data: memoryview) -> bytes:
    """Return a hash of both ends of the data, which is equal for equal tensors and rarely for different ones."""
    return hashlib.sha256(bytes(data[:_SAMPLE]) + bytes(data[-_SAMPLE:])).digest()


def _equals(file: BinaryIO, offset: int, data: memoryview) -> bool:
    file.flush()
    for at in range(0, len(data), _CHUNK):
        part = data[at : at + _CHUNK]
        if os.pread(file.fileno(), len(part), offset + at) != part:
            return False
    return True


def _copied(view: Tensor, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """Copy with channels innermost and batch outermost, also if sizes of 1 would leave the order of strides open."""
    order = (0, *range(2, view.ndim), 1)
    inner = view.to(device).permute(order).clone(memory_format=torch.contiguous_format)
    assert memory_format in (torch.channels_last, torch.channels_last_3d)
    return inner.permute(0, view.ndim - 1, *range(1, view.ndim - 1))


def _header(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], aliases: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _ALIASES: json.dumps(aliases, sort_keys=True)}}
    for name, spec in specs.items():
        begin = offsets[name]
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    return json.dumps(entries, separators=(",", ":")).encode()


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Return specs and offsets by name: stored tensors, then aliases. Raises ``ValueError`` for anything invalid."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{size} bytes are too few for a header")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header would take {length} bytes, the file has {size}")
    entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", {})
    start = 8 + length
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda e: tuple(e[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
        spec = TensorSpec(tuple(int(s) for s in entry["shape"]), _DTYPES[entry["dtype"]])
        if begin != expected or any(s < 0 for s in spec.shape) or end - begin != spec.nbytes:
            raise ValueError(f"{name!r} does not lie where its shape says")
        specs[name], offsets[name] = spec, start + begin
        expected = end
    if start + expected != size:
        raise ValueError(f"its tensors end at byte {start + expected}, the file at {size}")
    for alias, name in json.loads(metadata.get(_ALIASES, "{}")).items():
        if alias in specs:
            raise ValueError(f"{alias!r} is there twice")
        specs[alias], offsets[alias] = specs[name], offsets[name]
    return specs, offsets
