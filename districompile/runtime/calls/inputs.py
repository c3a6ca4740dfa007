# SPDX-License-Identifier: Apache-2.0
"""Check a call against the conversion, and turn it into the plan's input tensors."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from districompile.common.tensors import unusual
from districompile.errors import InputError
from districompile.frontend.call_tree import flatten_call
from districompile.ir.spec import InputSpec, TensorSpec, dtype_name
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.calls.timesteps import Timesteps

RETURN_DICT = "return_dict"


class OtherShapeError(InputError):
    """A tensor of a call has another shape than at conversion."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its inputs by path, its timestep, and the requested form of the output.

    ``given`` has the tensors as the caller passed them, and ``tensors`` those on the device. ``timestep`` is None if
    the module takes none.
    """

    given: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    timestep: float | None
    given_timestep: Any  # as the caller passed it
    return_dict: bool | None


class InputChecker:
    """Bind calls to ``plan.inputs``, and move tensors to ``device``."""

    def __init__(self, plan: ExecutionPlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._specs = {i.path: plan.called_spec(i) for i in plan.inputs}
        self.timestep_path = plan.timestep_path
        self._timesteps = Timesteps()

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Check and bind a call. Raises :class:`InputError` if it does not fit the conversion.

        It is an :class:`OtherShapeError` if nothing but the shape of a tensor differs, as far as that was checked.
        """
        leaves = flatten_call(self._plan.signature, args, kwargs)
        return_dict = leaves.pop(RETURN_DICT, None) if RETURN_DICT not in self._specs else None
        self._check_constants(leaves)
        # Read as passed: its value is often available without waiting for the device.
        timestep = None
        given = leaves.get(self.timestep_path or "")
        if isinstance(given, torch.Tensor) or _is_number(given):  # others are refused below
            timestep = self._timesteps.read(given, str(self.timestep_path))
            leaves[str(self.timestep_path)] = self._one_timestep(given)
        tensors = {}
        for spec in self._plan.inputs:
            if leaves.get(spec.path) is None:
                raise InputError(f"input {spec.path!r} is missing: the module was converted with it")
            tensors[spec.path] = self._tensor(spec, leaves[spec.path])
        return Call(tensors, {path: self._moved(t) for path, t in tensors.items()}, timestep, given, return_dict)

    def _one_timestep(self, given: Any) -> Any:
        """Return one of the equal timesteps of a batch, if the module was converted with a single one."""
        if not isinstance(given, torch.Tensor):
            return given
        want = self._specs[str(self.timestep_path)].shape
        batch = next(self._specs[i.path].shape[:1] for i in self._plan.inputs if i.rows is not None)
        if given.numel() > 1 and math.prod(want) == 1 and tuple(given.shape) == batch:
            return given[0].reshape(want)
        return given

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` on the device.

        The host does not wait for work that it queued there before. CUDA copies pageable memory at once, whatever the
        caller does to it next.
        """
        ordinary = self._device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned()
        return tensor.to(self._device, non_blocking=ordinary)

    def _check_constants(self, leaves: Mapping[str, Any]) -> None:
        constants = {p: v for p, v in self._plan.constants.items() if p != RETURN_DICT}
        for path, value in leaves.items():
            if path in self._specs or (value is None and constants.get(path) is None):
                continue
            if path not in constants:
                raise InputError(f"input {path!r} was not given at conversion: leave it out, or convert again with it")
            if isinstance(value, torch.dtype):
                value = str(value)
            if isinstance(value, torch.Tensor):
                value = value.item() if value.numel() == 1 else "a tensor"
            if value != constants[path]:
                raise InputError(
                    f"{path} was {constants[path]!r} at conversion and is built in, but is {value!r} in this call: "
                    "convert again with that value"
                )
        for path, value in constants.items():
            if value is not None and path not in leaves:
                raise InputError(f"{path} was {value!r} at conversion and is built in: pass {path}={value!r}")

    def _tensor(self, spec: InputSpec, value: Any) -> torch.Tensor:
        want = self._specs[spec.path]
        if _is_number(value):
            value = _as_tensor(spec.path, value)
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {spec.path!r} must be a tensor like {_text(want)}, not a {type(value).__name__}")
        kind = "meta" if value.device.type == "meta" else unusual(value)
        if kind is not None:
            raise InputError(
                f"input {spec.path!r} is a {kind} tensor: pass an ordinary one like {_text(want)}, of strided memory"
            )
        tensor = value.detach()
        if spec.rows is None and tensor.ndim <= 1 and len(want.shape) <= 1:
            tensor = _vector(spec.path, tensor, want)
        self._check_shape(spec, tuple(tensor.shape), want)
        if tensor.dtype != want.dtype:
            if tensor.is_floating_point() or want.dtype.is_floating_point or tensor.is_complex():
                raise InputError(
                    f"{spec.path} was converted as {dtype_name(want.dtype)}, but is {dtype_name(tensor.dtype)} in this "
                    f"call: cast it with .to(torch.{dtype_name(want.dtype)}), or convert again with this dtype"
                )
            tensor = tensor.to(want.dtype)
        return tensor

    def _check_shape(self, spec: InputSpec, got: tuple[int, ...], want: TensorSpec) -> None:
        if got == want.shape:
            return
        if len(got) == len(want.shape) and got[1:] == want.shape[1:]:
            raise OtherShapeError(
                f"{spec.path}: converted for batch {want.shape[0]}, called with {got[0]}: convert again with another "
                f"--batch or --cfg (guidance above 1 doubles the batch), or call it with batch {want.shape[0]}"
            )
        if spec.rows is not None and len(got) == len(want.shape) and got[: spec.rows] == want.shape[: spec.rows]:
            raise OtherShapeError(
                f"{spec.path}: converted for {_sizes(want.shape[spec.rows :])}, called with "
                f"{_sizes(got[spec.rows :])}: convert again with that --height and --width"
            )
        raise OtherShapeError(
            f"{spec.path}: converted for shape {list(want.shape)}, called with {list(got)}: convert again with an "
            "example of that shape"
        )


def _vector(path: str, tensor: torch.Tensor, want: TensorSpec) -> torch.Tensor:
    """Return a number or a vector (a timestep, a label) in the converted shape and dtype, if no value changes."""
    if tensor.dtype != want.dtype:
        cast = tensor.to(want.dtype)
        if not want.dtype.is_floating_point and bool((cast.to(tensor.dtype) != tensor).any()):
            raise InputError(
                f"{path} was converted as {dtype_name(want.dtype)}, but is {tensor.tolist()} in this call: "
                "convert again with a float example"
            )
        tensor = cast
    if tensor.numel() == 1 and tuple(tensor.shape) != want.shape:
        return tensor.reshape(()).expand(want.shape).contiguous()
    return tensor


def _as_tensor(path: str, value: Any) -> torch.Tensor:
    try:
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, numbers.Integral) else torch.float64)
    except (OverflowError, ValueError, RuntimeError, TypeError) as e:
        raise InputError(f"input {path!r} is too large a number to be a tensor") from e


def _is_number(x: Any) -> bool:
    """Return whether ``x`` is a number of Python or NumPy. A bool is none."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _text(spec: TensorSpec) -> str:
    return f"{dtype_name(spec.dtype)}{list(spec.shape)}"


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) + (" rows" if len(shape) == 1 else "")
