# SPDX-License-Identifier: Apache-2.0
"""Give a bundle other weights (a fine-tune or a LoRA) without compiling anything again.

Engines hold no weights: they use the bundle's one copy, or are filled from it when they are loaded. So only one file
changes. The new bundle shares every other file with the old one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from districompile.bundle.bundle import ENGINES, WEIGHTS, Bundle, BundleWriter, check_replaceable
from districompile.bundle.lora import RefitError, adapter_metadata, check_adapter, check_factors, number, rank_of
from districompile.bundle.own_vae import keep_vae
from districompile.bundle.weights import WeightFile
from districompile.common.locks import held
from districompile.errors import BundleError
from districompile.ir.quantised import dequantise_weight, read_quantised
from districompile.ir.report_builder import QuantisedLayer
from districompile.ir.spec import TensorSpec
from districompile.models.files import safetensors_fault
from districompile.progress import Progress, tasks

__all__ = ["Lora", "RefitError", "new_weights", "read_lora", "refit"]

Reader = Callable[[], Tensor]
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# torch.export's names of tensors that the forward makes, or holds outside parameters and buffers. A number follows
# where another shape of the bundle has another one of that name.
CONSTANT = re.compile(r"(.*\.)?_?(lifted_tensor|tensor_constant|lifted_tensor_constant)_?\d*(@\d+)?")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank change (arXiv 2106.09685): the weight W of module ``name`` becomes W + ``scale`` * up @ down.

    ``down`` (r, in) and ``up`` (out, r) for a linear; (r, in, kh, kw) and (out, r, 1, 1) for a convolution.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rows(self) -> int:
        return int(self.up.shape[0])

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the changed weight in its dtype, computed in float32. Raises :class:`RefitError` for other shapes."""
        down, up = self.down.float(), self.up.float()
        try:
            delta = torch.einsum("or,r...->o...", up.reshape(up.shape[0], -1), down)
            return (weight.float() + self.scale * delta.reshape(weight.shape)).to(weight.dtype)
        except RuntimeError as e:
            raise RefitError(
                f"the LoRA's change of {self.name} ({list(up.shape)} times {list(down.shape)}) does not fit its weight "
                f"{list(weight.shape)}: it was made for another model"
            ) from e


def read_lora(path: Path, config: Mapping[str, Any] | None = None, scale: float = 1.0) -> tuple[list[Lora], int]:
    """Return the changes that a LoRA file makes to the UNet, and how many of its tensors are for other networks.

    Formats are those that diffusers reads: its own, PEFT's and kohya's. ``config`` is the UNet's configuration, which
    the block names of some files depend on. Raises :class:`RefitError` for a file that is no LoRA.
    """
    state, metadata = _read_safetensors(path)
    alien = next((k for k in state if "lora" not in k and not k.endswith((".alpha", "dora_scale"))), None)
    if alien is not None:
        raise RefitError(f"{path} is not a LoRA: it holds {alien}; a whole model's folder is given as --weights")
    if any(k.endswith("dora_scale") for k in state):
        raise RefitError(f"{path} is a DoRA, which also scales the weights it changes: merge it and give --weights")
    check_factors(path, state)
    check_adapter(path, metadata)
    state, alphas = _in_diffusers_names(path, state, config or {})
    found_keys = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
    other = len(state) - len(found_keys)
    if not found_keys and not any(k.startswith(("text_encoder", "transformer")) for k in state):
        found_keys, other = dict(state), 0  # a UNet's adapter alone has no prefix
    found: list[Lora] = []
    for key, down in found_keys.items():
        if not key.endswith(_DOWN):
            if not key.endswith((_UP, ".alpha")):
                raise RefitError(f"{path} also holds {key}, which is not read: merge the LoRA and give --weights")
            continue
        module = key.removesuffix(_DOWN)
        up = found_keys.get(module + _UP)
        if up is None:
            raise RefitError(f"{path}: {module} has one half of a low-rank change only")
        rank = rank_of(path, module, down, up)
        given = (
            alphas.get(module),
            alphas.get(f"unet.{module}"),
            found_keys.get(f"{module}.alpha"),
            metadata.get("lora_alpha"),
        )
        alpha = next((a for a in given if a is not None), rank)
        found.append(Lora(module, down, up, scale * number(path, f"alpha of {module}", alpha) / rank))
    lone = next((k for k in found_keys if k.endswith(_UP) and k.removesuffix(_UP) + _DOWN not in found_keys), None)
    if lone is not None:
        raise RefitError(f"{path}: {lone.removesuffix(_UP)} has one half of a low-rank change only")
    if not found:
        raise RefitError(f"{path} changes nothing in the UNet: {len(state)} tensors are for other networks")
    return found, other


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix != ".safetensors":
        raise RefitError(f"{path}: a LoRA is read from a .safetensors file, never from a pickle")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if (fault := safetensors_fault(path)) is not None:  # a fault in a file that is read nevertheless
            raise RefitError(f"{path} cannot be read: {fault}")
    except FileNotFoundError:
        raise RefitError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as e:
        reason = safetensors_fault(path) or str(e).splitlines()[0]
        raise RefitError(f"{path} cannot be read: {reason}") from e
    return state, adapter_metadata(path, metadata)


def _in_diffusers_names(
    path: Path, state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors under the keys of diffusers and PEFT, and the alphas by module.

    Keys are of the form ``unet.MODULE.lora_A.weight``.
    """
    from districompile.models.sources import import_diffusers

    import_diffusers()
    from diffusers.configuration_utils import FrozenDict
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        named, alphas = Loader.lora_state_dict(dict(state), unet_config=FrozenDict(config) if config else None)
        named = convert_unet_state_dict_to_peft(named)
    except Exception as e:  # its converters index, split and look up any names and shapes
        reason = (str(e).strip().splitlines() or ["no reason given"])[0]
        raise RefitError(f"{path} is in a format that diffusers does not read ({type(e).__name__}: {reason})") from e
    return named, {k.removesuffix(".alpha"): number(path, k, v) for k, v in (alphas or {}).items()}


def new_weights(
    bundle: Bundle, old: WeightFile, module: nn.Module | None, loras: Iterable[Lora]
) -> tuple[dict[str, Reader], int]:
    """Return a reader of every weight of the bundle, and how many weights change.

    ``module`` provides the base weights; without it, they are the bundle's own. Raises :class:`RefitError` for a weight
    that the module lacks or has in another shape, and for a low-rank change of a weight that the bundle does not have.
    """
    state: dict[str, Tensor] = {}
    if module is not None:
        state = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
    joined, layers = bundle.joined, bundle.quantised
    changes: dict[str, list[Lora]] = {}
    for lora in loras:
        changes.setdefault(f"{lora.name}.weight", []).append(lora)
    readers: dict[str, Reader] = {}
    changed = 0
    items: dict[str, tuple[TensorSpec, Reader]] = {
        n: (s, functools.partial(old.tensor, n)) for n, s in bundle.weights.items() if n not in layers
    }
    items |= {x.weight: _dequantised(old, x) for x in layers.values()}
    for name, (spec, stored) in items.items():
        parts = joined.get(name) or ((name, spec.shape[0] if spec.shape else 1),)
        mine = [changes.pop(p, []) for p, _ in parts]
        constant = CONSTANT.fullmatch(name) is not None
        given = [state.get(p) for p, _ in parts]
        if module is not None and not constant:
            missing = next((p for (p, _), t in zip(parts, given, strict=True) if t is None), None)
            if missing is not None:
                raise RefitError(f"the new model has no weight {missing}: it is another architecture; convert it")
            base: Reader = functools.partial(_joined, name, spec.shape, [t for t in given if t is not None])
        else:
            base = stored
        changed += bool(any(mine) or (module is not None and not constant))
        readers[name] = (
            functools.partial(_changed, base, spec.dtype, [r for _, r in parts], mine) if any(mine) else base
        )
    if changes:
        name = next(iter(changes)).removesuffix(".weight")
        raise RefitError(f"the LoRA changes {name}, which the bundle does not have: it was made for another model")
    for name, layer in layers.items():
        if name in bundle.weights:
            readers[name] = _quantised(layer, name, readers[layer.weight], old)
    return {name: readers[name] for name in bundle.weights}, changed


def _dequantised(old: WeightFile, layer: QuantisedLayer) -> tuple[TensorSpec, Reader]:
    """Return spec and reader of the weight of a layer in 8 bits, as its module has it, from the stored values."""

    def read() -> Tensor:
        weight = dequantise_weight(old.tensor(layer.values_name), old.tensor(layer.scale_name))
        return weight.t() if layer.transposed else weight

    shape = old.spec(layer.values_name).shape
    return TensorSpec(shape[::-1] if layer.transposed else shape, torch.float32), read


def _quantised(layer: QuantisedLayer, name: str, weight: Reader, old: WeightFile) -> Reader:
    """Return the reader of one of a layer's stored tensors, from the reader of its weight."""
    if name == layer.input_scale_name:  # from the calibration: it is not of the weights
        return functools.partial(old.tensor, name)
    return functools.partial(read_quantised, weight, layer.transposed, name == layer.scale_name)


def _joined(name: str, shape: tuple[int, ...], parts: Sequence[Tensor]) -> Tensor:
    tensor = parts[0].detach() if len(parts) == 1 else torch.cat([p.detach() for p in parts])
    if tuple(tensor.shape) != shape:
        raise RefitError(
            f"the new model has {name} as {list(tensor.shape)}, the bundle as {list(shape)}: it is another "
            "architecture; convert it"
        )
    return tensor


def _changed(base: Reader, dtype: torch.dtype, rows: Sequence[int], changes: Sequence[Sequence[Lora]]) -> Tensor:
    tensor = base().to(dtype)
    pieces = torch.split(tensor, list(rows)) if len(rows) > 1 else (tensor,)
    out = []
    for piece, loras in zip(pieces, changes, strict=True):
        for lora in loras:
            piece = lora.added_to(piece)
        out.append(piece)
    return torch.cat(out) if len(out) > 1 else out[0]


def refit(
    path: Path,
    out: Path | None = None,
    *,
    module: nn.Module | None = None,
    loras: Sequence[Lora] = (),
    note: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> int:
    """Write the bundle at ``path`` with other weights to ``out`` (None: in its place). Return how many weights changed.

    ``note`` goes into the manifest's ``refits``. Another bundle at ``out`` is replaced if it was made in the same way,
    or with ``force``. The old bundle stays complete until the new one is. Raises :class:`RefitError` if weights do not
    fit, and :class:`BundleError` for a bundle whose engines hold their weights themselves.
    """
    with held(out or path):
        return _refit(Bundle.open(path), out, module, loras, note, progress, force)


def _refit(
    bundle: Bundle, out: Path | None, module: nn.Module | None, loras: Sequence[Lora],
    note: Mapping[str, Any] | None, progress: Progress | None, force: bool,
) -> int:  # fmt: skip
    path = bundle.path
    if (bundle.manifest.get("engines") or {}).get("weights") == "inside":
        raise BundleError(f"{path}: its engines hold their weights (--engine-weights inside): convert again")
    check_target(bundle, out, note or {}, force)
    old = WeightFile.open(bundle.weights_path)
    readers, changed = new_weights(bundle, old, module, loras)
    bars = tasks(progress)
    with BundleWriter(out or path) as writer:
        items = [(name, spec, readers[name]) for name, spec in bundle.weights.items()]
        target = writer.path(WEIGHTS)
        with bars.task("writing weights", 1.0) as task:
            shown = 0.0

            def advance(done: int, total: int) -> None:
                nonlocal shown
                task.advance(done / max(1, total) - shown)
                shown = done / max(1, total)

            writer.known(WEIGHTS, WeightFile.write(target, items, advance))
        fresh = WeightFile.open(target)
        with bars.task("sharing engines"):
            share_files(bundle, writer, old, fresh)
            keep_vae(bundle, writer)
            entry = {"weights_sha256": writer.hash_of(WEIGHTS), **(note or {})}
            writer.finish_like(bundle, refits=[*bundle.manifest.get("refits", ()), entry])
    return changed


def check_target(bundle: Bundle, out: Path | None, note: Mapping[str, Any], force: bool) -> None:
    """Check that the result of a refit can be written.

    Raises :class:`BundleError`, also if it would replace something else.
    """
    target = bundle.path if out is None else out
    own = os.path.exists(target) and target.samefile(bundle.path)
    refits = [*bundle.manifest.get("refits", ()), note]
    check_replaceable(
        target, bundle.manifest.get("made_with") or {}, force or own, refits, bundle.manifest.get("added") or ()
    )


def share_files(
    bundle: Bundle, writer: BundleWriter, old: WeightFile, fresh: WeightFile, without: Collection[str] = ()
) -> None:
    """Add the files of the bundle to a new one, but for the weights and those named in ``without``.

    ONNX files get the new locations of their weights."""
    moved = any(old.location(n) != fresh.location(n) for n in old)
    for name in bundle.manifest["files"]:
        if name == WEIGHTS or name in without:
            continue
        if moved and name.startswith(f"{ENGINES}/") and name.endswith(".onnx"):
            writer.path(name).write_bytes(_relocated((bundle.path / name).read_bytes(), fresh))
        else:
            writer.share(name, bundle)


def _relocated(model: bytes, weights: WeightFile) -> bytes:
    """Update the locations of weights. Tensors that were equal share a location in the file, and may now differ."""
    import onnx

    proto = onnx.ModelProto.FromString(model)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset, length = weights.location(tensor.name)
            del tensor.external_data[:]
            for key, value in (("location", weights.path.name), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=key, value=value)
    return bytes(proto.SerializeToString())
