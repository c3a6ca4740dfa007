# SPDX-License-Identifier: Apache-2.0
"""Flatten calls and outputs: nested arguments become named values, and an output is rebuilt from its leaves.

A call is flattened to ``{path: leaf}``, where a path is where a user passes the leaf: ``"sample"``,
``"added_cond_kwargs.time_ids"``, ``"residuals.0"``. An output is described by plain JSON data, its tensors numbered in
order. The bundle therefore holds no pickle, and the class of the output need not exist where a bundle is inspected.

A class that a description names is imported and called only if it is one of :data:`OUTPUT_CLASSES`, or of a package
that the caller trusts. Any other output is an :class:`OutputNamespace`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from districompile.errors import BundleError, CaptureError, InputError

Description = dict[str, Any]
_CONSTANTS = (type(None), bool, int, float, str)

OUTPUT_CLASSES = frozenset(
    {
        "diffusers.models.autoencoders.autoencoder_tiny:AutoencoderTinyOutput",
        "diffusers.models.autoencoders.vae:DecoderOutput",
        "diffusers.models.autoencoders.vae:EncoderOutput",
        "diffusers.models.autoencoders.vq_model:VQEncoderOutput",
        "diffusers.models.controlnets.controlnet:ControlNetOutput",
        "diffusers.models.controlnets.controlnet_sd3:SD3ControlNetOutput",
        "diffusers.models.controlnets.controlnet_flux:FluxControlNetOutput",
        "diffusers.models.controlnets.controlnet_xs:ControlNetXSOutput",
        "diffusers.models.modeling_outputs:AutoencoderKLOutput",
        "diffusers.models.modeling_outputs:Transformer2DModelOutput",
        "diffusers.models.transformers.prior_transformer:PriorTransformerOutput",
        "diffusers.models.transformers.transformer_temporal:TransformerTemporalModelOutput",
        "diffusers.models.unets.unet_1d:UNet1DOutput",
        "diffusers.models.unets.unet_2d:UNet2DOutput",
        "diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput",
        "diffusers.models.unets.unet_3d_condition:UNet3DConditionOutput",
        "diffusers.models.unets.unet_kandinsky3:Kandinsky3UNetOutput",
        "diffusers.models.unets.unet_motion_model:UNetMotionOutput",
        "diffusers.models.unets.unet_spatio_temporal_condition:UNetSpatioTemporalConditionOutput",
        "diffusers.models.unets.unet_stable_cascade:StableCascadeUNetOutput",
        "transformers.modeling_outputs:BaseModelOutput",
        "transformers.modeling_outputs:BaseModelOutputWithPooling",
    }
)
"""Records without code of their own, from libraries that are trusted in any case."""


def flatten_call(signature: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bind ``args`` and ``kwargs`` to the parameter names in ``signature`` and flatten containers to ``{path: leaf}``.

    Paths come in the order of ``signature``. Dicts, lists, tuples and dataclasses are containers; everything else
    (tensors, numbers, strings, ``None``, foreign objects) is a leaf, and an empty container has no leaf. A last name
    ``"*rest"`` takes further positional arguments (as a list), a name ``"**more"`` further keyword arguments under
    their own names. Parameters that are not passed are absent. Raise :class:`InputError` for too many or unknown
    arguments.
    """
    named = [n for n in signature if not n.startswith("*")]
    rest = next((n[1:] for n in signature if n.startswith("*") and not n.startswith("**")), None)
    takes_more = any(n.startswith("**") for n in signature)
    if len(args) > len(named) and rest is None:
        raise InputError(f"{len(args)} positional arguments given, but forward takes {len(named)}: {', '.join(named)}")
    bound: dict[str, Any] = dict(zip(named, args, strict=False))
    if len(args) > len(named) and rest is not None:
        bound[rest] = list(args[len(named) :])
    for name, value in kwargs.items():
        if name in bound:
            raise InputError(f"argument {name!r} is given twice: by position and by name")
        if name not in named and not takes_more:
            raise InputError(f"unknown argument {name!r}; forward takes: {', '.join(signature)}")
        bound[name] = value
    order = [n for n in (*named, rest) if n is not None and n in bound]
    leaves: dict[str, Any] = {}
    for name in (*order, *(n for n in bound if n not in order)):
        for path, leaf in _walk(name, bound[name]):
            if path in leaves:
                raise InputError(f"two arguments flatten to the same path {path!r}: rename the key that holds a dot")
            leaves[path] = leaf
    return leaves


def replace_leaves(
    signature: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the leaves at the paths of ``values`` replaced.

    Paths are those of :func:`flatten_call`. Containers keep their kind.
    """
    named = [n for n in signature if not n.startswith("*")]
    rest = next((n[1:] for n in signature if n.startswith("*") and not n.startswith("**")), None)
    paths = [*named[: len(args)], *(f"{rest}.{i}" for i in range(len(args) - len(named)))]
    return (
        tuple(_replaced(path, x, values) for path, x in zip(paths, args, strict=True)),
        {name: _replaced(name, x, values) for name, x in kwargs.items()},
    )


def _replaced(path: str, x: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(x, Mapping):
        return {key: _replaced(f"{path}.{key}", v, values) for key, v in x.items()}
    if isinstance(x, list | tuple):
        items = [_replaced(f"{path}.{i}", v, values) for i, v in enumerate(x)]
        return type(x)(*items) if _is_namedtuple(x) else type(x)(items)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        found = {f.name: _replaced(f"{path}.{f.name}", getattr(x, f.name), values) for f in dataclasses.fields(x)}
        return type(x)(**found)
    return values.get(path, x)


def _walk(path: str, x: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves below ``x`` as ``(path, leaf)``."""
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from _walk(f"{path}.{key}", value)
    elif isinstance(x, list | tuple):
        for i, value in enumerate(x):
            yield from _walk(f"{path}.{i}", value)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for field in dataclasses.fields(x):
            yield from _walk(f"{path}.{field.name}", getattr(x, field.name))
    else:
        yield path, x


def _is_namedtuple(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _fields(x: Any) -> list[tuple[str, Any]] | None:
    """Return the fields of an instance of a dataclass or namedtuple, in order; None for anything else."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    if _is_namedtuple(x):
        return list(zip(x._fields, x, strict=True))
    return None


def leaves_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a nested output, in the order in which :func:`describe_output` numbers them."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    fields = _fields(tree)
    items: list[Any] = []
    if fields is not None:
        items = [v for _, v in fields]
    elif isinstance(tree, Mapping):
        items = list(tree.values())
    elif isinstance(tree, list | tuple):
        items = list(tree)
    return [leaf for item in items for leaf in leaves_of(item)]


def describe_output(tree: Any) -> Description:
    """Describe a nested output by JSON data, with its tensors numbered in the order of :func:`leaves_of`.

    Tuples, lists, dicts, namedtuples and dataclasses (``ModelOutput`` of diffusers and transformers among them) keep
    their kind; ``None``, numbers and strings are kept as constants. Raise :class:`CaptureError` for anything else.
    """
    return _describe(tree, iter(range(len(leaves_of(tree)))), "output")


def _describe(x: Any, numbers: Iterator[int], where: str) -> Description:
    if isinstance(x, torch.Tensor):
        return {"kind": "leaf", "index": next(numbers)}
    fields = _fields(x)
    if fields is not None:
        items = tuple((name, _describe(v, numbers, f"{where}.{name}")) for name, v in fields)
        cls = type(x)
        return {"kind": "object", "class": f"{cls.__module__}:{cls.__qualname__}", "items": items}
    if isinstance(x, Mapping):
        return {"kind": "dict", "items": tuple((k, _describe(v, numbers, f"{where}.{k}")) for k, v in x.items())}
    if isinstance(x, list | tuple):
        kind = "list" if isinstance(x, list) else "tuple"
        return {"kind": kind, "items": tuple(_describe(v, numbers, f"{where}.{i}") for i, v in enumerate(x))}
    if isinstance(x, _CONSTANTS):
        return {"kind": "constant", "value": x}
    raise CaptureError(
        f"{where} is a {type(x).__module__}.{type(x).__qualname__}, which cannot be stored: return tensors, numbers, "
        "strings, None, or tuples, lists, dicts and dataclasses of them"
    )


def rebuild_output(
    description: Mapping[str, Any],
    leaves: Sequence[Any],
    return_dict: bool | None = None,
    trusted: Collection[str] = (),
) -> Any:
    """Rebuild the output that ``description`` describes, with ``leaves`` in place of its tensors.

    ``return_dict=False`` turns an output object into a tuple of its fields that are not None (the convention of
    diffusers' ``to_tuple``), and a dict into a tuple of its values. ``return_dict=True`` changes nothing: where a tuple
    was captured, no class is known, and the tuple is returned. A class that is neither of :data:`OUTPUT_CLASSES` nor of
    a package in ``trusted``, or that cannot be imported, is replaced by :class:`OutputNamespace`.
    """
    if return_dict is False and description["kind"] in ("object", "dict"):
        values = [_rebuild(d, leaves, trusted) for _, d in description["items"]]
        return tuple(v for v in values if v is not None)
    return _rebuild(description, leaves, trusted)


def _rebuild(description: Mapping[str, Any], leaves: Sequence[Any], trusted: Collection[str]) -> Any:
    kind = description["kind"]
    if kind == "leaf":
        return leaves[description["index"]]
    if kind == "constant":
        return description["value"]
    items = description["items"]
    if kind == "object":
        fields = {name: _rebuild(d, leaves, trusted) for name, d in items}
        cls = _import_class(description["class"], trusted)
        return OutputNamespace(fields) if cls is None else cls(**fields)
    if kind == "dict":
        return {k: _rebuild(d, leaves, trusted) for k, d in items}
    if kind in ("list", "tuple"):
        values = [_rebuild(d, leaves, trusted) for d in items]
        return values if kind == "list" else tuple(values)
    raise BundleError(f"unknown kind of output {kind!r} in the plan: written by another version? Convert again")


def check_classes(description: Mapping[str, Any], trusted: Collection[str] = ()) -> None:
    """Raise :class:`BundleError` for a class that does not take the fields of the description."""
    if description["kind"] == "object":
        cls = _import_class(description["class"], trusted)
        fields = [name for name, _ in description["items"]]
        try:
            if cls is not None:
                inspect.signature(cls).bind(**dict.fromkeys(fields))
        except TypeError as e:
            raise BundleError(f"the output class {description['class']} does not fit the plan: {e}") from None
    items = description.get("items", ())
    for item in items:
        check_classes(item[1] if description["kind"] in ("object", "dict") else item, trusted)


def packages_of(description: Mapping[str, Any]) -> frozenset[str]:
    """Return the top-level packages of a description's classes; it must describe an object of this process."""
    named = description["kind"] in ("object", "dict")
    found = [packages_of(item[1] if named else item) for item in description.get("items", ())]
    own = {description["class"].partition(":")[0].partition(".")[0]} if description["kind"] == "object" else set()
    return frozenset(own).union(*found)


def _import_class(name: str, trusted: Collection[str]) -> type[Any] | None:
    """Import the dataclass or namedtuple called ``module:qualname``.

    Return None where it is not trusted, cannot be imported, or is something else.
    """
    module, _, qualname = name.partition(":")
    if name not in OUTPUT_CLASSES and not any(module == p or module.startswith(f"{p}.") for p in trusted):
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, RuntimeError, ValueError):  # RuntimeError: a lazy module's failed import
        return None
    is_record = isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields"))
    return found if is_record else None


class OutputNamespace:
    """A stand-in for an output class that is not imported: fields by attribute, by name and by position."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        return tuple(v for v in self.__dict__.values() if v is not None)

    def keys(self) -> list[str]:
        return [k for k, v in self.__dict__.items() if v is not None]

    def __getitem__(self, key: int | slice | str) -> Any:
        return self.__dict__[key] if isinstance(key, str) else self.to_tuple()[key]

    def __repr__(self) -> str:
        return f"OutputNamespace({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"
