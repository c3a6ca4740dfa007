# SPDX-License-Identifier: Apache-2.0
"""In which type the weights of a model are shipped, and whether it is guided: from its files, without loading it."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from districompile.models.origin import Origin

Dtype = Literal["float32", "float16", "bfloat16"]

_DEMO = Path(__file__).resolve().parent / "demo"
_TYPES: dict[str, Dtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_VARIANTS: dict[str | None, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}
_PATIENCE = 10.0  # seconds
_LARGEST_HEADER = 100_000_000  # bytes
_PARTS = ("unet", "transformer")


@dataclasses.dataclass(frozen=True)
class Shipped:
    """``dtype`` of most weights. ``upcast``: an autoencoder that asks not to be computed in float16. ``guided``: calls
    have two guidance halves."""

    dtype: Dtype
    upcast: bool = False
    guided: bool = False


def shipped(model: str, hub: Any = None) -> Shipped | None:
    """Read what is shipped of a folder, of ``demo``, or of a hub id; None for anything else.

    Of a hub id that is not in the local cache, the names of files, configurations and the header of one weight file
    are asked from ``hub``, by default the module ``huggingface_hub``.
    """
    given = Origin.of(model)
    model = given.path
    folder = _DEMO if model == "demo" else Path(model).expanduser()
    if folder.is_dir():
        return _of_folder(folder, given.variant)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) or ":" in model:
        return None
    try:
        return _of_hub(model, hub or importlib.import_module("huggingface_hub"), given.variant)
    except Exception:  # of the network, and of the hub's client: what loads the model reports it
        return None


def _of_folder(folder: Path, wanted: str | None = None) -> Shipped | None:
    index = _json(folder / "model_index.json")
    part = folder if index is None else next((folder / name for name in _PARTS if name in index), None)
    config = None if part is None else _json(part / "config.json")
    if part is None or config is None:
        return None
    return _described(index, config, _dtype(part, wanted))


def _of_hub(model: str, hub: Any, wanted: str | None = None) -> Shipped | None:
    cached = hub.try_to_load_from_cache(model, "model_index.json")
    if isinstance(cached, str) and (found := _of_folder(Path(cached).parent, wanted)) is not None:
        return found
    names = [file.rfilename for file in hub.HfApi().model_info(model, timeout=_PATIENCE).siblings]
    index = _json(Path(hub.hf_hub_download(model, "model_index.json")))
    part = next((name for name in _PARTS if name in (index or {})), None)
    if part is None:
        return None
    config = _json(Path(hub.hf_hub_download(model, f"{part}/config.json"))) or {}
    weights = [Path(name) for name in names if name.startswith(f"{part}/") and name.endswith(".safetensors")]
    variant, files = _shipped_files(weights, wanted)
    if variant in _VARIANTS:
        return _described(index, config, _VARIANTS[variant])
    if not files:
        return None
    counts = hub.HfApi().parse_safetensors_file_metadata(model, files[0].as_posix()).parameter_count
    return _described(index, config, _most(collections.Counter(counts)))


def _described(index: Mapping[str, Any] | None, config: Mapping[str, Any], dtype: Dtype | None) -> Shipped | None:
    if dtype is None:
        return None
    kind = config.get("_class_name")
    pix2pix = index is not None and "InstructPix2Pix" in str(index.get("_class_name"))
    return Shipped(
        dtype,
        upcast=str(kind).startswith("Autoencoder") and config.get("force_upcast") is True,
        guided=kind == "UNet2DConditionModel" and config.get("time_cond_proj_dim") is None and not pix2pix,
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # what loads the model reports it
        return None
    return found if isinstance(found, dict) else None


def _dtype(folder: Path, wanted: str | None) -> Dtype | None:
    """Return the type of most weights in a component's folder: of a variant, or of the small one if there is one."""
    sizes: collections.Counter[str] = collections.Counter()
    for path in _shipped_files(sorted(folder.glob("*.safetensors")), wanted)[1]:
        for entry in _header(path).values():
            if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                sizes[str(entry.get("dtype"))] += math.prod(entry["shape"])
    return _most(sizes)


def _shipped_files(paths: Iterable[Path], wanted: str | None = None) -> tuple[str | None, list[Path]]:
    """Return the weight files of ``wanted`` or the small variant, and its name; without one, the plain files."""
    groups: dict[str | None, list[Path]] = collections.defaultdict(list)
    for path in paths:
        found = re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$", path.name)
        groups[None if found is None else found[1]].append(path)
    variant = next((v for v in (*([wanted] if wanted else ()), *_VARIANTS, None, *groups) if v in groups), None)
    return variant, groups[variant]


def _most(sizes: collections.Counter[str]) -> Dtype | None:
    return _TYPES.get(sizes.most_common(1)[0][0], "float32") if sizes else None


def _header(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(length)) if length < _LARGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
