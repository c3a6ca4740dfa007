# SPDX-License-Identifier: Apache-2.0
"""The backend protocol over TensorRT: translate segments to ONNX files, and build engines from these."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from districompile.backends.base import Backend, Engine, source_line
from districompile.backends.onnx import opset17_writer
from districompile.backends.onnx.export import Translator, kind_of
from districompile.backends.onnx.proto import OPSET, WEIGHT, Kind, Template, probe_model
from districompile.backends.tensorrt import v8, worker
from districompile.backends.tensorrt.builder import BuildOptions, WeightMode, build_engine
from districompile.backends.tensorrt.collectives import nccl_missing
from districompile.backends.tensorrt.engine import RuntimeCache, load_engine
from districompile.backends.tensorrt.library import (
    Flavour,
    Library,
    check_flavour,
    find_library,
    parse_targets,
    present_gpu,
    split_targets,
)
from districompile.backends.worker_pool import WorkerPool
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, EngineWarning
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import needed

_DTYPES = frozenset({
    torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn,
})  # fmt: skip
_MOST_EFFORT = 5
_REFIT_LOSES_BIAS = "11.3."
"""Known issue in the release notes of TensorRT 11.3.0: an engine built with REFIT may drop the bias of a GEMM."""


class TensorRTBackend(Backend):
    """Build engines with ``tensorrt`` or ``tensorrt_rtx``.

    Beside every engine lies the ONNX file it was built from, which ONNX Runtime reads as well.

    :data:`OPTION_HELP` describes the options; :func:`~districompile.backends.tensorrt.library.parse_targets` resolves
    ``target``. A stripped engine (``weights="refit"``) can only be built with a GPU. Raises :class:`BackendError` for a
    malformed option. The library is searched for when it is first needed.
    """

    OPTION_HELP: ClassVar[dict[str, str]] = {
        "flavour": "library to use: tensorrt (8.6, or 10.1 and later, as installed) or tensorrt_rtx (default: the one "
        "that fits this machine)",
        "target": "GPUs to build for, separated by commas: current, or kinds of GPU such as sm89; tensorrt_rtx builds "
        "for other GPUs than the present one: its support matrices list sm75, sm86, sm89, sm120 and sm121, and sm80 is "
        "accepted by the builder (default: the present GPU, or the listed ones from sm86 on)",
        "weights": "source of the weights of an engine: bound (inputs, one copy on a GPU), refit (put into the engine "
        "when it is loaded) or inside (stored in the engine) (default: refit where there is a GPU to build with, else "
        "bound; inside with TensorRT 8.6)",
        "effort": "how much TensorRT tries when it builds, from 0 (quickly built) to 5 (default: its own, 3)",
        "workers": "number of processes that build, each with a GPU of its own where the library needs one (default: "
        "one for each equal GPU here; for tensorrt_rtx one for two cores, at most 8)",
    }

    name = "tensorrt"
    suffix = ".engine"
    native_code = True
    calls_operators = False
    device = "cuda"

    def __init__(
        self, *, flavour: Flavour | None = None, target: str | None = None, weights: WeightMode | None = None,
        effort: int | None = None, workers: int | None = None,
    ) -> None:  # fmt: skip
        check_flavour(flavour)
        if target is not None:
            split_targets(target)
        if weights is not None and weights not in get_args(WeightMode):
            raise BackendError(f"weights={weights}: give one of {', '.join(get_args(WeightMode))}")
        if effort is not None and not 0 <= effort <= _MOST_EFFORT:
            raise BackendError(f"effort={effort}: give 0 to {_MOST_EFFORT}")
        if workers is not None and workers < 1:
            raise BackendError(f"workers={workers}: give 1 or more")
        self._flavour, self._target, self._weights = flavour, target, weights
        self._effort, self._workers = effort, workers
        self._pool: WorkerPool | None = None
        self._translating, self._building = threading.Lock(), threading.Lock()
        self._gpu = present_gpu()
        self._found: tuple[Library, BuildOptions] | None = None
        self._caches: dict[Path, RuntimeCache] = {}
        self._refused: dict[Kind, str | None] = {}  # by the parser of TensorRT 8.6
        self.translator = Translator()

    @property
    def library(self) -> Library:
        """The library in use. Raises :class:`BackendError` if there is none."""
        return find_library(self._flavour, self._gpu)

    @property
    def options(self) -> BuildOptions:
        """The resolved options of a build. Raises :class:`BackendError` for a target that cannot be built for."""
        if self._found is None:
            library = self.library
            targets = parse_targets(self._target, library, self._gpu)
            usable = self._gpu is not None and library.runs_on(self._gpu) is None
            safe = not (library.flavour == "tensorrt" and library.version.startswith(_REFIT_LOSES_BIAS))
            usual: WeightMode = "inside" if library.is_v8 else "refit" if usable and safe else "bound"
            mode = self._weights or usual
            if library.is_v8 and mode != "inside":
                raise BackendError(
                    f"weights={mode}: the parser of tensorrt {library.version} takes weights as constants only, and "
                    "does not find them again in an engine: give weights=inside"
                )
            if mode == "refit" and not usable:
                raise BackendError(
                    f"weights=refit: {library.flavour} {library.version} needs a GPU to build engines without weights, "
                    "and there is none here that it runs on: give weights=bound"
                )
            self._found = library, BuildOptions(targets, mode, effort=self._effort)
        return self._found[1]

    @property
    def version(self) -> str:
        """Everything that changes an engine file."""
        form, opset = (2, opset17_writer.OPSET) if self.library.is_v8 else (1, OPSET)
        return f"{form}, opset {opset}, {self.library.flavour} {self.library.version}, {self.options}"

    @property
    def collectives_inside(self) -> str | None:
        """Say why an engine cannot contain collectives, or None if it can."""
        library = self.library
        if not library.has_collectives:
            return f"{library.flavour} {library.version} has no collective layer"
        return None if library.ahead_of_time else nccl_missing(library)

    @property
    def all_to_all_inside(self) -> bool:
        return self.library.has_all_to_all

    def unavailable_reason(self) -> str | None:
        missing = [m for m in ("onnx", "onnxscript") if importlib.util.find_spec(m) is None]
        if missing:
            return f'the tensorrt backend needs {", ".join(missing)}: pip install "districompile[tensorrt-rtx]"'
        try:
            _ = self.library
        except BackendError as e:
            return str(e)
        return None

    def describe(self) -> dict[str, object]:
        """Describe for the manifest how and for which GPUs the engines were built."""
        return {
            "flavour": self.library.flavour,
            "version": self.library.version,
            "targets": list(self.options.targets),
            "weights": self.options.weights,
        }

    def prepare(self, segments: Sequence[SegmentGraph]) -> None:
        _ = self.options  # an unavailable target is an error before anything is translated
        specs = [spec for segment in segments for _, spec in (*segment.inputs, *segment.weights, *segment.outputs)]
        if self.library.is_v8 and any(spec.dtype == torch.float16 for spec in specs):
            warnings.warn(v8.NOTE, EngineWarning, stacklevel=2)
        self.translator.prepare(segments)

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        """List operators without an ONNX translation. TensorRT's parser may refuse more, in :meth:`build`."""
        reasons = self.translator.unsupported_ops(segment)
        is_v8 = self.library.is_v8
        table, which = (v8.DTYPES, "TensorRT 8.6") if is_v8 else (_DTYPES, "TensorRT")
        for kind, group in (("input", segment.inputs), ("weight", segment.weights), ("output", segment.outputs)):
            for name, spec in group:
                if spec.dtype not in table:
                    reasons.append(f"the {kind} {name} is {spec.dtype}, which {which} does not have")
        return [*reasons, *(self._not_legal(segment) if is_v8 else ())]

    def _not_legal(self, segment: SegmentGraph) -> list[str]:
        """List operators whose translation the parser of TensorRT 8.6 does not take."""
        found: dict[str, str] = {}
        for node in needed(segment.graph.graph):
            kind = kind_of(node)
            template = self.translator.template(kind) if isinstance(kind, Kind) else None
            if not isinstance(kind, Kind) or not isinstance(template, Template):
                continue
            if kind not in self._refused:
                self._refused[kind] = v8.unsupported(probe_model([(kind, template)]))
            if (reason := self._refused[kind]) is not None:
                text = f"{node.target} ({node.name}{source_line(node)}): {reason}"
                found.setdefault(f"{node.target} {reason}", text)
        return list(found.values())

    @property
    def builds_at_once(self) -> int:
        return self._workers or worker.default_workers(self.library)

    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        onnx = path.with_suffix(".onnx")
        with self._translating:
            onnx.write_bytes(self.model(segment, weights).SerializeToString())
            options, sources = self.options, _sources(segment)
            inside = self.builds_at_once < 2 or segment.collectives
            if not inside and self._pool is None:
                self._pool = worker.worker_pool(self.library, self.builds_at_once)
        if self.library.flavour == "tensorrt":
            options = dataclasses.replace(options, timing_cache=path.parent / "timing.cache")
        if inside:
            with self._building:  # a process has one logger
                build_engine(
                    self.library, onnx, weights.path, path, options, collectives=segment.collectives, sources=sources
                )
        else:
            assert self._pool is not None
            (done,) = self._pool.submit([worker.job(self.library, onnx, weights.path, path, options, sources)])
            done.result()

    def __del__(self) -> None:
        pool: WorkerPool | None = self.__dict__.get("_pool")
        if pool is not None:
            pool.close()

    def model(self, segment: SegmentGraph, weights: WeightFile) -> Any:
        """Return the ONNX model from which the engine of a segment is built."""
        if self.options.weights != "bound":
            model = self.translator.model(segment, weights)
            return v8.legalised(model) if self.library.is_v8 else model
        renamed = tuple((WEIGHT + name, spec) for name, spec in segment.weights)
        return self.translator.model(dataclasses.replace(segment, weights=renamed), None)

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        if device.type != "cuda":
            raise BackendError(
                f"the tensorrt backend runs on an NVIDIA GPU, not on {device}. Its ONNX files can be checked here: "
                "districompile verify BUNDLE --backend onnxruntime"
            )
        library, gpu = self.library, present_gpu(device)
        if gpu is not None and (reason := library.runs_on(gpu)) is not None:
            raise BackendError(reason)
        folder = path.parent.parent / "cache"
        name = f"{library.flavour}-{library.version}-{torch.cuda.get_device_name(device)}".replace(" ", "-")
        cache = self._caches.setdefault(folder, RuntimeCache(folder / f"{name}.cache"))
        return load_engine(library, path, segment, weights, device, cache)


def _sources(segment: SegmentGraph) -> Mapping[str, str]:
    """Map each operator to its line in the source of the model."""
    return {node.name: source_line(node) for node in needed(segment.graph.graph)}
