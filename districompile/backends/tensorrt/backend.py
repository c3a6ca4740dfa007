"""The backend protocol over TensorRT: segments become ONNX files, those become engines."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from districompile.backends.base import BuildSegment, Engine, source_line
from districompile.backends.onnx_export import Translator
from districompile.backends.onnx_proto import OPSET, WEIGHT
from districompile.backends.tensorrt.builder import BuildOptions, WeightMode, build_engine
from districompile.backends.tensorrt.engine import RuntimeCache, load_engine
from districompile.backends.tensorrt.library import Library, find_library, parse_targets, present_gpu
from districompile.errors import BackendError
from districompile.ir.serialize import needed
from districompile.weights import WeightFile

_REFIT_LOSES_BIAS = "11.3."
"""TensorRT 11.3.0's release notes, known issues: an engine built with REFIT may drop the bias of a GEMM."""


class TensorRTBackend:
    """Engines of ``tensorrt`` or ``tensorrt_rtx``. Beside every engine lies the ONNX file it was built from, which
    ONNX Runtime reads as well.

    ``flavour``: which of the two; None is what fits this machine. ``target``: the GPUs to build for, see
    :func:`~districompile.backends.tensorrt.library.parse_targets`. ``weights``: where engines have their weights from;
    None is ``"refit"`` where the machine has a GPU that the flavour can use, else ``"bound"``: a stripped engine can
    only be built with a GPU. Nothing is looked up before it is needed.
    """

    name = "tensorrt"
    suffix = ".engine"
    native_code = True
    device = "cuda"

    def __init__(
        self, flavour: str | None = None, target: str | None = None, weights: WeightMode | None = None
    ) -> None:
        self._flavour, self._target, self._weights = flavour, target, weights
        self._gpu = present_gpu()
        self._found: tuple[Library, BuildOptions] | None = None
        self._caches: dict[Path, RuntimeCache] = {}
        self.translator = Translator()

    @property
    def library(self) -> Library:
        """The flavour in use. Raises :class:`BackendError` without one."""
        return find_library(self._flavour, self._gpu)

    @property
    def options(self) -> BuildOptions:
        """What engines are built with. Raises :class:`BackendError` for a target that cannot be built for."""
        if self._found is None:
            library = self.library
            targets = parse_targets(self._target, library, self._gpu)
            usable = self._gpu is not None and library.runs_on(self._gpu) is None
            safe = not (library.flavour == "tensorrt" and library.version.startswith(_REFIT_LOSES_BIAS))
            mode: WeightMode = self._weights or ("refit" if usable and safe else "bound")
            if mode == "refit" and not usable:
                raise BackendError(
                    f"--engine-weights refit: {library.flavour} {library.version} needs a GPU to build engines without "
                    "weights, and there is none here that it runs on: use --engine-weights bound"
                )
            self._found = library, BuildOptions(targets, mode)
        return self._found[1]

    @property
    def version(self) -> str:
        """Whatever changes an engine file."""
        return f"1, opset {OPSET}, {self.library.flavour} {self.library.version}, {self.options}"

    @property
    def collectives_inside(self) -> str | None:
        """Why an engine cannot hold collectives, or None."""
        library = self.library
        return None if library.has_collectives else f"{library.flavour} {library.version} has no collective layer"

    def unavailable(self) -> str | None:
        missing = [m for m in ("onnx", "onnxscript") if importlib.util.find_spec(m) is None]
        if missing:
            return f'the tensorrt backend needs {", ".join(missing)}: pip install "districompile[tensorrt-rtx]"'
        try:
            _ = self.library
        except BackendError as e:
            return str(e)
        return None

    def describe(self) -> dict[str, Any]:
        """For the manifest: what built the engines, for which GPUs."""
        return {
            "flavour": self.library.flavour,
            "version": self.library.version,
            "targets": list(self.options.targets),
            "weights": self.options.weights,
        }

    def prepare(self, segments: Sequence[BuildSegment]) -> None:
        _ = self.options  # a target that cannot be had is told before anything is translated
        self.translator.prepare(segments)

    def refuses(self, segment: BuildSegment) -> list[str]:
        """Operators without an ONNX translation. What TensorRT's parser refuses shows when the engine is built."""
        reasons = self.translator.refuses(segment)
        table = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8}
        for kind, group in (("input", segment.inputs), ("weight", segment.weights), ("output", segment.outputs)):
            for name, spec in group:
                if spec.dtype not in table | {torch.bool}:
                    reasons.append(f"the {kind} {name} is {spec.dtype}, which TensorRT does not have")
        return reasons

    def build(self, segment: BuildSegment, weights: WeightFile, path: Path) -> None:
        onnx = path.with_suffix(".onnx")
        onnx.write_bytes(self.model(segment, weights).SerializeToString())
        options = self.options
        if self.library.flavour == "tensorrt":
            options = dataclasses.replace(options, timing_cache=path.parent / "timing.cache")
        specs = {**dict(segment.inputs), **dict(segment.outputs)}
        ranks = {math.prod(specs[b].shape) // math.prod(specs[a].shape) for a, b in segment.gathers}
        build_engine(
            self.library, onnx, weights.path, path, options,
            gathers=segment.gathers, ranks=max(ranks, default=1), sources=_sources(segment),
        )  # fmt: skip

    def model(self, segment: BuildSegment, weights: WeightFile) -> Any:
        """The ONNX model that an engine is built from."""
        if self.options.weights != "bound":
            return self.translator.model(segment, weights)
        renamed = tuple((WEIGHT + name, spec) for name, spec in segment.weights)
        return self.translator.model(dataclasses.replace(segment, weights=renamed), None)

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        if device.type != "cuda":
            raise BackendError(
                f"the tensorrt backend runs on an NVIDIA GPU, not on {device}. What its engines were built from can be "
                "checked here: districompile verify BUNDLE --backend onnxruntime"
            )
        library, gpu = self.library, present_gpu(device)
        if gpu is not None and (reason := library.runs_on(gpu)) is not None:
            raise BackendError(reason)
        folder = path.parent.parent / "cache"
        name = f"{library.flavour}-{library.version}-{torch.cuda.get_device_name(device)}".replace(" ", "-")
        cache = self._caches.setdefault(folder, RuntimeCache(folder / f"{name}.cache"))
        return load_engine(library, path, segment, weights, device, cache)


def _sources(segment: BuildSegment) -> Mapping[str, str]:
    """Where the model's author wrote each operator."""
    return {node.name: source_line(node) for node in needed(segment.graph.graph)}
