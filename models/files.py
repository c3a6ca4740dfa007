"""Files of a model folder: JSON and safetensors, read so that every fault has a name and a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from districompile.errors import Error
from districompile.models.inputs import ModelError

_INDEX = ".safetensors.index.json"
_LFS = b"version https://git-lfs"
_NOT_FLOATING = ("I", "U", "BOOL", "C")  # how safetensors' names of other types begin


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_reason(error: BaseException) -> str:
    """As :func:`first_line`, with the class where the text alone is a riddle, as that of a ``KeyError``."""
    known = isinstance(error, OSError | ValueError | RuntimeError | Error) and not isinstance(error, RecursionError)
    return first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"


def load_fault(error: BaseException, where: Path) -> str:
    """Why a library could not load what is in ``where``: the file that cannot be read, if one is at fault.

    Libraries drop the reason, or the name of the file.
    """
    named = [Path(p) for p in re.findall(r"[^'\"\s]+\.safetensors", str(error))]
    for path in dict.fromkeys((*named, *(sorted(where.rglob("*.safetensors")) if where.is_dir() else ()))):
        fault = safetensors_fault(path) if path.is_file() else None
        if fault is not None:
            return f"{path} cannot be read: {fault}"
    return one_reason(error)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises :class:`ModelError` for a file that is none."""
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
    """Why a safetensors file cannot be read, from its header alone; None where it can."""
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
    """A tensor that the header names twice: readers take either one."""
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
    """Raise :class:`ModelError` that names the file and the reason where it cannot be read."""
    fault = safetensors_fault(path)
    if fault is not None:
        raise ModelError(f"{path} cannot be read: {fault}")


def check_weight_files(folder: Path, variant: str | None) -> None:
    """Check the headers of a component's weight files, and that all files exist which an index names.

    Raises :class:`ModelError` that names the file. Weights are not read.
    """
    middle = f".{variant}" if variant else ""
    indices = [p for p in sorted(folder.glob(f"*{_INDEX}")) if _variant_of(p.name.removesuffix(_INDEX)) == middle]
    named = {name for index in indices for name in _indexed(index)}
    whole = folder / f"diffusion_pytorch_model{middle}.safetensors"
    for path in [whole] if whole.exists() or whole.is_symlink() else [folder / n for n in sorted(named)]:
        check_safetensors(path)
        _check_types(path)


def _variant_of(stem: str) -> str:
    return "." + stem.partition(".")[2] if "." in stem else ""


def _indexed(index: Path) -> Iterable[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(f"{index} does not say which file holds which weight (weight_map)")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).exists():
            raise ModelError(f"{index} names {name}, which is missing: download the model again")
    return names.values()


def _check_types(path: Path) -> None:
    """Weights are numbers with a fraction: a layer cannot compute with another type."""
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            dtype = file.get_slice(name).get_dtype()
            if re.search(r"(^|\.)(weight|bias)$", name) and dtype.startswith(_NOT_FLOATING):
                raise ModelError(f"{path}: {name} is of type {dtype}; weights must be floating-point")
