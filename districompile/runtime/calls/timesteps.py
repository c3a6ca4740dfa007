# SPDX-License-Identifier: Apache-2.0
"""Timesteps as numbers, without waiting for the device at every step.

Samplers keep all timesteps of an image in one tensor, often on the GPU, and pass its elements one by one. These are
views of one memory. It is copied to the host once, and again after it was written to.
"""

from __future__ import annotations

from typing import Any

import torch

from districompile.errors import InputError

_HOST = "cpu"
_LARGEST = 1 << 20  # bytes; a larger tensor is no list of timesteps


class Timesteps:
    """Read timesteps, whatever device they are on."""

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None  # kept, so that no other tensor gets its memory
        self._version = -1
        self._copy = torch.empty(0)

    def read(self, value: Any, name: str = "timestep") -> float | None:
        """Return the number of ``value``: a number, or a tensor of one or several equal elements. None if it is empty.

        Raises :class:`InputError` for a tensor of unequal ones.
        """
        if not isinstance(value, torch.Tensor):
            try:
                return float(value)
            except OverflowError:
                raise InputError(f"{name!r} is too large") from None
        if value.numel() == 0:
            return None
        found = self._on_host(value.detach()).double().flatten()
        first, *others = found.tolist()
        if any(other != first for other in others):
            raise InputError(
                f"{name}: the timesteps of one call must be equal, but are {_brief([first, *others])}: call once for "
                "each of them"
            )
        return float(first)

    def _on_host(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        # Inference tensors do not count writes.
        if value.device.type == _HOST or value.is_inference() or storage.nbytes() > _LARGEST:
            return value
        known = self._source
        same = (
            known is not None
            and known.untyped_storage().data_ptr() == storage.data_ptr()
            and known.dtype == value.dtype
            and value._version == self._version
        )
        if not same:
            count = storage.nbytes() // value.element_size()
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage, 0, (count,), (1,))
            self._source, self._version, self._copy = value, value._version, whole.cpu()
        return self._copy.as_strided(value.shape, value.stride(), value.storage_offset())


def steps_left(value: Any) -> int | None:
    """Return how many timesteps follow in the tensor that ``value`` is an element of, itself included.

    None if it is no element of a larger tensor: then nothing shows how many steps an image has.
    """
    if not isinstance(value, torch.Tensor) or any(value.stride()) or value.device.type == "meta":
        return None
    count = value.untyped_storage().nbytes() // value.element_size()
    return count - int(value.storage_offset()) if count > 1 else None


def _brief(numbers: list[float]) -> str:
    """Return the first few of ``numbers`` as text."""
    shown = ", ".join(f"{n:g}" for n in numbers[:4])
    return f"[{shown}{', ...' if len(numbers) > 4 else ''}]"
