# SPDX-License-Identifier: Apache-2.0
"""A component of a pipeline that is computed by all ranks: each kind of call is converted at its first use.

The component stays the object that it was, with its class, configuration, weights and methods. Only its ``forward`` is
replaced. So whatever a library reads or changes on it works as on one device, and the next call follows the change: a
change of structure by another conversion, a change of weights by a refit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from districompile.errors import CaptureError, ConvertError, Error, InputError
from districompile.frontend.call_tree import leaves_of
from districompile.ir.spec import Phase
from districompile.live.adapters import merged_weights, unmerge_disabled
from districompile.live.build import Settings, bundle_for, refitted
from districompile.live.call import LiveCall, bind, rows_of_call
from districompile.live.consensus import Consensus
from districompile.live.state import Describer, State, Watch, adapted_layers, base_weights
from districompile.progress import Progress
from districompile.runtime.calls.timesteps import Timesteps
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule
from districompile.runtime.weights import replace_weights

_MOST = 8  # loaded conversions of one component; the one that was called longest ago is closed


class _NumbersAreConstants(Exception):
    """The component cannot be captured with its numbers as inputs."""


@dataclasses.dataclass
class _Loaded:
    """A conversion that is loaded, the weights it has, and the step of its last call."""

    module: DistributedModule
    bundle: Path
    tensors: Mapping[str, str]  # by name in the original, what tells one value from another
    weights: tuple[str, float]
    step: int = -2


class LiveModule:
    """Stand for ``forward`` of ``module``. All ranks construct and call it alike.

    ``required``: raise what a conversion refuses. Otherwise each rank computes such a call by itself, and a warning
    says so. ``loading`` are options of :func:`districompile.load`.
    """

    def __init__(
        self, name: str, module: nn.Module, settings: Settings, consensus: Consensus, loading: Mapping[str, Any],
        required: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.name, self.module = name, module
        self._settings, self._consensus, self._progress = settings, consensus, progress
        self._loading, self._required = dict(loading), required
        self._forward = type(module).forward.__get__(module)
        if "forward" in module.__dict__:
            raise InputError(f"{name} has a forward that is not its class's: enable it before anything wraps it")
        self._describer = Describer()
        self._watch: Watch | None = None
        self._state: State | None = None
        self._adapted: dict[str, nn.Module] = {}
        self._loaded: collections.OrderedDict[tuple[str, str], _Loaded] = collections.OrderedDict()
        self._refused: dict[tuple[str, str], str] = {}
        self._numbers_are_inputs = True
        self._timesteps = Timesteps()
        self._last_timestep: float | None = None
        self._step = 0
        self._scratch: Path | None = None
        self._refits = 0
        self._chosen_phase: Phase | None = None
        self._stated: contextlib.ExitStack | None = None  # inside of :meth:`image`

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        forward.image = self.image  # type: ignore[attr-defined]  # found by districompile.image
        module.__dict__["forward"] = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original's ``forward`` returns, computed by all ranks."""
        state = self._current()
        call, loaded = self._bound(state, args, kwargs)
        if loaded is None:
            return self._forward(*args, **kwargs)
        self._follow(call, loaded)
        return _on_device_of(call.arguments, loaded.module(**call.passed()))

    def _bound(self, state: State, args: Any, kwargs: Any) -> tuple[LiveCall, _Loaded | None]:
        """Bind a call, and find its conversion. Numbers are constants if the component cannot take them as inputs."""
        call = bind(self._forward, args, kwargs, bool(self._adapted), self._numbers_are_inputs)
        self._consensus.agree(self.name, call.key, state.structure, f"{state.weights}{call.adapter_scale}")
        try:
            return call, self._find(call, state)
        except _NumbersAreConstants:
            self._numbers_are_inputs = False
            return self._bound(state, args, kwargs)

    # What belongs to all conversions of the component

    @property
    def modules(self) -> list[DistributedModule]:
        """The conversions that are loaded, the one of the last call last."""
        return [loaded.module for loaded in self._loaded.values()]

    @property
    def phase(self) -> Phase | None:
        """The phase that all calls run in; None follows the timesteps."""
        return self._chosen_phase

    @phase.setter
    def phase(self, phase: Phase | None) -> None:
        self._chosen_phase = phase
        for module in self.modules:
            module.phase = phase

    @contextlib.contextmanager
    def image(self) -> Iterator[None]:
        """Treat the calls inside as steps of one image, as :meth:`DistributedModule.image` does."""
        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.image())
            self._stated = stack
            try:
                yield
            finally:
                self._stated = None

    def reset(self) -> None:
        """Start a new image with the next call."""
        for module in self.modules:
            module.reset()

    def close(self) -> None:
        """Give the component its own ``forward`` back, and close its conversions."""
        self.module.__dict__.pop("forward", None)
        self._unload()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # The original as it is now

    def _current(self) -> State:
        if self._state is None or self._watch is None or self._watch.changed():
            _check_hooks(self.name, self.module)
            self._adapted = adapted_layers(self.module)
            unmerge_disabled(self._adapted.values())
            earlier, self._state = self._state, self._describer.state(self.module)
            self._watch = Watch(self.module)
            if earlier is not None and earlier.structure != self._state.structure:
                self._refused.clear()
        return self._state

    # Conversions

    def _find(self, call: LiveCall, state: State) -> _Loaded | None:
        """Return the conversion for a call with the weights of now; None if each rank computes the call itself."""
        key = call.key, state.structure
        if key in self._refused:
            return None
        if key not in self._loaded:
            try:
                if rows_of_call(call.arguments) is None:
                    raise ConvertError("its first input is neither an image nor a sequence of tokens")
                self._add(key, call, state)
            except Error as e:
                if self._required and rows_of_call(call.arguments) is not None:
                    raise
                warnings.warn(f"{self.name} is not divided, each rank computes all of it: {e}", stacklevel=4)
                self._refused[key] = str(e)
                return None
        self._loaded.move_to_end(key)
        loaded = self._loaded[key]
        if loaded.weights != (state.weights, call.adapter_scale):
            self._refit(loaded, state, call.adapter_scale)
        return loaded

    def _add(self, key: tuple[str, str], call: LiveCall, state: State) -> None:
        def make() -> str:
            try:
                return str(bundle_for(self.name, self.module, state, call, self._settings, self._progress))
            except CaptureError:
                if not call.numbers:
                    raise
                return ""

        found = self._consensus.first_does(make)
        if not found:
            raise _NumbersAreConstants
        bundle = Path(found)
        while len(self._loaded) >= _MOST:
            self._loaded.popitem(last=False)[1].module.close()
        module = self._load(bundle)
        self._loaded[key] = _Loaded(module, bundle, state.tensors, ("", 1.0))

    def _load(self, bundle: Path) -> DistributedModule:
        module = load(bundle, **self._loading)
        module.phase = self._chosen_phase
        if self._stated is not None:
            self._stated.enter_context(module.image())
        return module

    def _refit(self, loaded: _Loaded, state: State, scale: float) -> None:
        """Give a conversion the weights of now, in place where its engines read the bundle's weights directly."""
        merged = merged_weights(self._adapted, scale)
        weights = {**base_weights(self.module), **merged}
        now = {**state.tensors, **{name: f"{state.weights} {scale}" for name in merged}}
        changed = {name: weights[name] for name in now if loaded.tensors.get(name) != now[name]}
        if changed and not replace_weights(loaded.module, changed):
            self._reload(loaded, weights)
        loaded.tensors, loaded.weights = now, (state.weights, scale)
        loaded.module.reset()

    def _reload(self, loaded: _Loaded, weights: Mapping[str, Tensor]) -> None:
        self._refits += 1

        def write() -> str:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="districompile-"))
                self._cleaner = weakref.finalize(self, shutil.rmtree, str(self._scratch), ignore_errors=True)
            return str(refitted(loaded.bundle, self._scratch / str(self._refits), weights, self._progress))

        bundle = Path(self._consensus.first_does(write))
        loaded.module.close()
        loaded.module = self._load(bundle)
        self._consensus.first_does(lambda: "loaded")  # by all: its files may go, as they are mapped
        if self._scratch is not None:
            shutil.rmtree(bundle, ignore_errors=True)

    def _follow(self, call: LiveCall, loaded: _Loaded) -> None:
        """Start a new image for a conversion that had no call at the last timestep: its state would be older."""
        timestep = None if call.timestep is None else self._timesteps.read(call.timestep)
        if timestep != self._last_timestep:
            self._last_timestep, self._step = timestep, self._step + 1
        if loaded.step < self._step - 1:
            loaded.module.reset()
        loaded.step = self._step

    def _unload(self) -> None:
        for loaded in self._loaded.values():
            loaded.module.close()
        self._loaded.clear()


def _check_hooks(name: str, module: nn.Module) -> None:
    """Raise :class:`InputError` for a hook on a layer, which a conversion would leave out."""
    for path, part in module.named_modules():
        if path and (part._forward_hooks or part._forward_pre_hooks):
            raise InputError(
                f"{name}.{path} has a forward hook, which cannot run inside an engine: remove it, or leave {name} out "
                "of components"
            )


def _on_device_of(arguments: Mapping[str, Any], output: Any) -> Any:
    """Return ``output`` on the device of the first tensor among the arguments, where the caller continues."""
    given = leaves_of(dict(arguments))
    tensors = leaves_of(output.to_tuple() if hasattr(output, "to_tuple") else output)
    if not given or not tensors or given[0].device == tensors[0].device:
        return output
    device = given[0].device
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, output)
