# SPDX-License-Identifier: Apache-2.0
"""Replace weights of a loaded module in the memory that its engines read, without loading anything again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from districompile.errors import InputError
from districompile.runtime.module import DistributedModule


def replace_weights(module: DistributedModule, changed: Mapping[str, Tensor]) -> bool:
    """Write ``changed``, tensors by their names in the original module, into the memory of this process's engines.

    Weights that the module does not use are left out. Returns False, with nothing written, if engines hold copies of
    their own, or if two weights that share memory would differ: then refit the bundle and load the result. Raises
    :class:`InputError` for a tensor of another shape.
    """
    file = module.weight_file
    if file is None:
        return False
    joined = module.plan.report.joined
    new: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, spec in module.plan.weights.items():
            parts = joined.get(name) or ((name, spec.shape[0] if spec.shape else 1),)
            if not any(part in changed for part, _ in parts):
                continue
            held = file.tensor(name)
            pieces = torch.split(held, [rows for _, rows in parts]) if len(parts) > 1 else (held,)
            given = [changed.get(part, piece) for (part, _), piece in zip(parts, pieces, strict=True)]
            for (part, _), tensor, piece in zip(parts, given, pieces, strict=True):
                if tensor.shape != piece.shape:
                    raise InputError(f"the weight {part} has shape {list(tensor.shape)}, not {list(piece.shape)}")
            device = next(changed[part].device for part, _ in parts if part in changed)
            given = [t.detach().to(device, held.dtype) for t in given]
            new[name] = torch.cat(given) if len(given) > 1 else given[0]
    if not all(_equal(new.get(other), tensor) for name, tensor in new.items() for other in _sharing(module, name)):
        return False
    for name, tensor in new.items():
        file.replace(name, tensor)
    return True


def _sharing(module: DistributedModule, name: str) -> list[str]:
    """Return the other weights that the module reads in the memory of ``name``."""
    assert module.weight_file is not None
    return [other for other in module.weight_file.sharing(name) if other in module.plan.weights]


def _equal(other: Tensor | None, tensor: Tensor) -> bool:
    return other is not None and torch.equal(other.to(tensor.device), tensor)
