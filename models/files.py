# SPDX-License-Identifier: Apache-2.0
"""Read JSON and safetensors files of a model folder, and name the file and the reason of every fault."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from districompile.errors import Error
from districompile.models.inputs import ModelError

DEMO = Path(__file__).resolve().parent / "demo"
"""The folder of the demo's pipeline."""

_INDEX = ".safetensors.index.json"
_LFS = b"version https://git-lfs"
_NOT_FLOATING = ("I", "U", "BOOL", "C")  # how safetensors' names of other types begin


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_reason(error: BaseException) -> str:
    """Return the first line of a message, with the class for exceptions whose text alone is unclear (``KeyError``)."""
    known = isinstance(error, OSError | ValueError | RuntimeError | Error) and not isinstance(error, RecursionError)
    return first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"


def load_fault(error: BaseException, where: Path) -> str:
    """Explain why a library failed to load ``where``: by the file that cannot be read, if there is one.

    The messages of libraries lack the reason, or the name of the file.
    """
    named = [Path(p) for p in re.findall(r"[^'\"\s]+\.safetensors", str(error))]
    for path in dict.fromkeys((*named, *(sorted(where.rglob("*.safetensors")) if where.is_dir() else ()))):
        fault = safetensors_fault(path) if path.is_file() else None
        if fault is not None:
            return f"{path} cannot be read: {fault}"
    return one_reason(error)


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises :class:`ModelError` if the file holds none."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ModelError(f"{path} cannot be read: it is not UTF-8 ({e.reason} at byte {e.start})") from e
    except RecursionError as e:
        raise ModelError(f"{path} cannot be read: its JSON is nested too deeply") from e
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise ModelError(f"{path} cannot be read: {first_line(e)}") from e
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return data


def safetensors_fault(path: Path) -> str | None:
    """Return why a safetensors file cannot be read, from its header alone, or None."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            return "it is a pointer of git-lfs, not the file itself: run git lfs pull"
        with safe_open(str(path), framework="pt"):
            pass
        return _repeated(path)
    except FileNotFoundError:
        return "it is a broken link" if path.is_symlink() else "there is no such file"
    except OSError as e:
        return e.strerror or first_line(e)
    except SafetensorError as e:
        return first_line(e).removeprefix("Error while deserializing header: ")


def _repeated(path: Path) -> str | None:
    """Return a fault if the header names a tensor twice: readers differ in which one they take."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        found.extend(n for n in names if names.count(n) > 1) if len(set(names)) < len(names) else None
        return dict(pairs)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=note)
    return f"its header names {found[0]} twice" if found else None


def check_safetensors(path: Path) -> None:
    """Raise :class:`ModelError` with the file and the reason if it cannot be read."""
    fault = safetensors_fault(path)
    if fault is not None:
        raise ModelError(f"{path} cannot be read: {fault}")


def find_variant(folder: Path, wanted: str | None = None) -> str | None:
    """Return the variant of a component's weights to read, such as ``"fp16"``; None for the plain ones.

    That is the ``wanted`` one, or the only one where there are no plain weights. Raises :class:`ModelError` for a
    variant that there is not, with those that there are.
    """
    names = [p.name for p in folder.glob("*.safetensors")]
    found = {m[1] for n in names if (m := re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$", n))}
    plain = any(re.fullmatch(r"\w+(?:-\d+-of-\d+)?\.safetensors", n) for n in names)
    if wanted is not None:
        if names and wanted not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ModelError(f"{folder} has no weights of the variant {wanted} (variants there: {known})")
        return wanted
    return None if plain or len(found) != 1 else found.pop()


def check_weight_files(folder: Path, variant: str | None) -> None:
    """Check the headers of a component's weight files, and that every file of an index exists.

    Raises :class:`ModelError` that names the file. Weights are not read.
    """
    middle = f".{variant}" if variant else ""
    # Two ways to name the index of a variant: x.fp16.safetensors.index.json, and x.safetensors.index.fp16.json
    plain = [p for p in sorted(folder.glob(f"*{_INDEX}")) if _variant_of(p.name.removesuffix(_INDEX)) == middle]
    indices = [*plain, *(sorted(folder.glob(f"*.safetensors.index{middle}.json")) if middle else ())]
    named = {name for index in indices for name in _indexed(index).values()}
    whole = folder / f"diffusion_pytorch_model{middle}.safetensors"
    for path in [whole] if whole.exists() or whole.is_symlink() else [folder / n for n in sorted(named)]:
        check_safetensors(path)
        _check_types(path)
    if not (whole.exists() or whole.is_symlink()):
        for index in indices:
            _check_index(index)


def _variant_of(stem: str) -> str:
    return "." + stem.partition(".")[2] if "." in stem else ""


def _check_index(index: Path) -> None:
    """Check that each file holds the weights that an index says: diffusers reads a file that lacks some as it is."""
    holds: dict[str, set[str]] = {}
    for weight, name in _indexed(index).items():
        if name not in holds:
            with safe_open(str(index.parent / name), framework="pt") as file:
                holds[name] = set(file.keys())
        if weight not in holds[name]:
            raise ModelError(f"{index} says that {name} holds {weight}, and it does not: download the model again")


def _indexed(index: Path) -> dict[str, str]:
    """Return the file of each weight, as an index says. Raises :class:`ModelError` for files that are not there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f"{index} does not say which file holds which weight (weight_map)")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).exists():
            raise ModelError(f"{index} names {name}, which is missing: download the model again")
    return dict(names)


def _check_types(path: Path) -> None:
    """Refuse weights and biases that are not floating-point."""
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            dtype = file.get_slice(name).get_dtype()
            if re.search(r"(^|\.)(weight|bias)$", name) and dtype.startswith(_NOT_FLOATING):
                raise ModelError(f"{path}: {name} is of type {dtype}; weights must be floating-point")
