# SPDX-License-Identifier: Apache-2.0
"""The backend protocol over AOTInductor: compile segments for the GPU or the CPU of the converting machine.

A package (``engines/HASH.pt2``) holds no weights and no names. Weights are inputs of the compiled program, so that one
copy on a device serves all segments of both phases. Segments that differ only in names share one package. Each segment
has a small JSON file beside the package, which names its inputs, weights and outputs.

Packages are compiled machine code: loading a package runs it. The hashes of a bundle detect damage, not malice. Load
bundles only from people whose programs you would run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch

from districompile.backends.base import Backend, Engine
from districompile.backends.eager import EagerBackend
from districompile.backends.inductor import flash_attention, pytorch_private
from districompile.backends.inductor.attention import autotune_attention
from districompile.backends.inductor.cache import CompileCache, folder_of, processor, source_hash, versions
from districompile.backends.inductor.compiler import select_compiler, way_out
from districompile.backends.inductor.convolution import autotune_convolutions
from districompile.backends.inductor.engine import MEMORY_FORMATS, InductorEngine
from districompile.backends.inductor.fp8 import select_fp8_kernels
from districompile.backends.inductor.fp8_speed import faster_in_8_bits
from districompile.backends.inductor.gated import fuse_gated_linears
from districompile.backends.inductor.kernel_deps import called_kernels, has_kernels
from districompile.backends.inductor.kernels import hopper
from districompile.backends.inductor.package import (
    CHANNELS_LAST,
    AliasedOutput,
    CompileJob,
    ConfigValue,
    InputSlice,
    Operand,
    aliased_outputs,
    image_values,
    lift_input_slices,
    slice_operand,
    weight_formats,
)
from districompile.backends.inductor.pytorch_private import PackageLoader
from districompile.backends.inductor.split_linear import split_linears
from districompile.backends.inductor.target import capability, check_here, check_weight, target_of, torch_version
from districompile.backends.inductor.workers import compile_here, default_workers, first_job, spare_gpus, worker_pool
from districompile.backends.worker_pool import WorkerPool
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, BundleError
from districompile.ir.layer_size import LayerSize
from districompile.ir.operators import foreign_operators
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import content_hash, graph_to_json
from districompile.ir.spec import TensorSpec

DeviceKind = Literal["cuda", "cpu"]
AUTOTUNABLE = ("linear", "conv", "custom-kernels")
"""Kinds of operator that the option ``autotune`` takes."""

_FORMAT = "districompile inductor 6"
_OPTIMISE_HOST = "aot_inductor.compile_wrapper_opt_level"
# The number of reads above which Inductor writes an expression to memory. The normalised input of a convolution reads
# the table of its group norm and the result of the previous convolution with its bias. It also reads the time embedding
# or the other summand of a residual, with its bias. With the default (4) Inductor would write many of these to memory,
# and both the padded input of the convolution and the rows to send would read them again.
_FUSION: dict[str, ConfigValue] = {"realize_reads_threshold": 6}


class InductorBackend(Backend):
    """Compile segments by AOTInductor, with custom kernels where they are measured to be faster.

    :data:`OPTION_HELP` describes the options. ``inductor_config`` holds further settings of
    ``torch._inductor.config`` by name; they take precedence over those of this backend. Raises :class:`BackendError`
    for an unknown value of an option, and for a FlashAttention that cannot be used.
    """

    name = "inductor"
    reads_weights = True
    suffix = ".aoti.json"
    version = ""  # of an object: torch, device and options
    native_code = True

    OPTION_HELP: ClassVar[dict[str, str]] = {
        "device": "kind of device to compile for: cuda or cpu (default: cuda if there is a GPU, else cpu)",
        "max_autotune": "let Inductor time several kernels for each matrix product and convolution: slower to compile, "
        "usually faster to run (default: false)",
        "attention": "kernels for attention: torch (PyTorch's choice), flash3, flash4 (FlashAttention-3, -4), or "
        "auto (the fastest by timing, of those that this machine has) (default: auto)",
        "autotune": "what else to choose by timing, any of linear, conv, custom-kernels; or all, or none (default: all "
        "on a GPU, none on a CPU)",
        "channels_last": "store weights of convolutions with their channels innermost; on a CPU each process then has "
        "a copy of them (default: true on a GPU, false on a CPU)",
        "workers": "number of processes that compile (default: one a core on a CPU; on GPUs one for two cores, at most "
        "8 and one for 2 GiB of free memory, or 2 with max_autotune)",
        "cache": "folder that keeps compiled packages and timings for later conversions, or none (default: "
        "districompile/inductor in the user's cache)",
    }

    def __init__(
        self, device: DeviceKind | None = None, *, max_autotune: bool = False,
        attention: flash_attention.Implementation = "auto", autotune: tuple[str, ...] | None = None,
        channels_last: bool | None = None, workers: int | None = None, cache: str | None = None,
        inductor_config: Mapping[str, ConfigValue] | None = None,
    ) -> None:  # fmt: skip
        self._kind: DeviceKind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self._kind not in get_args(DeviceKind):
            raise BackendError(
                f"device={device}: the inductor backend compiles for {' or '.join(get_args(DeviceKind))}"
            )
        if workers is not None and workers < 1:
            raise BackendError(f"workers={workers}: give 1 or more")
        self._channels_last = self._kind == "cuda" if channels_last is None else channels_last
        self._workers = workers if workers is not None else default_workers(self._kind, max_autotune)
        # Host code needs no optimising compiler, as kernels are compiled apart. That of a GPU's program needs no vector
        # instructions either, which take a minute to probe.
        gpu: dict[str, ConfigValue] = {"cpp.vec_isa_ok": False, **_FUSION} if self._kind == "cuda" else {}
        host: dict[str, ConfigValue] = {_OPTIMISE_HOST: "O0"}
        settings: dict[str, ConfigValue] = {"max_autotune": max_autotune, **host, **gpu, **(inductor_config or {})}
        self._settings = tuple(sorted(settings.items(), key=lambda item: item[0]))
        self._libraries = flash_attention.select_libraries(attention, self._kind)
        self._forced = attention not in ("auto", "torch")
        self._autotune = _autotuned(autotune, self._kind)
        self._custom_attention = attention == "auto" and "custom-kernels" in self._autotune
        # Engines differ by the version of torch, by the device and by the options
        target = target_of(self._kind)
        self.version = f"4, torch {torch.__version__}, {target}, {self._channels_last}, {self._settings}"
        self._plans: dict[int, tuple[SegmentGraph, _Package]] = {}  # by the id of the segment, which is kept alive
        self._images: set[str] = set()  # values that go from segment to segment as images
        self._futures: dict[str, Future[None]] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._pool: WorkerPool | None = None
        self._cache = CompileCache(folder_of(cache))
        self._own: set[str] = set()  # packages that call operators of other packages, whose code no key covers
        self._loaded: dict[tuple[str, torch.device], PackageLoader] = {}

    @property
    def device(self) -> str:
        """Name the device that the engines are for, as the manifest of a bundle records it."""
        if self._kind != "cuda":
            return self._kind
        return f"cuda: {torch.cuda.get_device_name()}, compute capability {capability()}"

    def unavailable_reason(self) -> str | None:
        if not pytorch_private.has_aoti():
            return "the inductor backend needs PyTorch 2.9 or newer: pip install -U torch"
        return None

    def build_unavailable_reason(self) -> str | None:
        """Say why this machine cannot compile, or None if it can. Running a bundle needs none of this."""
        if self._kind == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here, and the inductor backend compiles for the GPU it is run on"
        if self._kind == "cuda" and importlib.util.find_spec("triton") is None:
            return "the inductor backend needs triton for a GPU: pip install triton"
        reason = select_compiler()[1]
        return reason and f"the inductor backend {reason}"

    def begin(self) -> None:
        """Start the workers where there are cores to spare: a worker takes long until its first package is done."""
        usable = self.build_unavailable_reason() is None and self._pool is None
        if usable and self._workers > 1 and (os.cpu_count() or 1) >= 2 * self._workers:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="districompile-")
            self._pool = worker_pool(self._workers)
            jobs = [first_job(self._kind, self._all_settings(), i).to_json() for i in range(self._workers)]
            self._pool.submit([job, str(Path(self._scratch.name, f"first{i}.pt2"))] for i, job in enumerate(jobs))

    def faster_in_8_bits(self, size: LayerSize) -> bool | None:
        if self._kind != "cuda" or "custom-kernels" not in self._autotune:
            return None
        with self._cache.remembering():
            return faster_in_8_bits(size)

    def prepare(self, segments: Sequence[SegmentGraph]) -> None:
        """Start the compilation of all segments, the largest first."""
        if self.build_unavailable_reason() is not None:
            return
        read = {name for s in segments for name, _ in s.inputs}
        made = {name for s in segments for name, _ in s.outputs if name in read}
        self._images = made & {name for s in segments for name in image_values(s)}
        new = [s for s in segments if id(s) not in self._plans and not self.unsupported_ops(s)]
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="districompile-")
        missing: dict[str, _Package] = {}
        with self._cache.remembering():
            for segment in sorted(new, key=lambda s: -len(s.graph.graph.nodes)):
                package = self._package(segment)
                self._plans[id(segment)] = segment, package
                # A worker knows the operators of PyTorch alone: what calls others is compiled here, as it is built
                if foreign_operators(segment.graph.graph):
                    self._own.add(package.key)
                elif package.key not in self._futures and package.key not in missing:
                    if self._cache.fetch(self._cache_key(package), self._scratch_path(package)):
                        continue
                    missing[package.key] = package
                    if spare_gpus(self._kind):  # else workers would disturb what is timed here
                        self._submit([package])
        waiting = [p for p in missing.values() if p.key not in self._futures]
        if len(waiting) > 1:  # else in this process, as it is built
            self._submit(waiting)

    def _submit(self, packages: Sequence[_Package]) -> None:
        """Have packages compiled by workers, if there are any."""
        if self._workers == 1:
            return
        self._pool = self._pool or worker_pool(self._workers)
        futures = self._pool.submit([p.job.to_json(), str(self._scratch_path(p))] for p in packages)
        self._futures.update(zip((p.key for p in packages), futures, strict=True))

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        if (reason := self.build_unavailable_reason()) is not None:
            return [reason]
        return EagerBackend().unsupported_ops(segment)

    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        if id(segment) not in self._plans:
            self.prepare([segment])
        if (reasons := self.unsupported_ops(segment)) or id(segment) not in self._plans:
            raise BackendError(f"segment {segment.name} cannot be compiled: {'; '.join(reasons)}")
        package = self._plans[id(segment)][1]
        for name, spec in segment.weights:
            check_weight(path, weights, name, spec)
        target = path.parent / f"{package.key}.pt2"
        if not target.exists():
            try:
                self._compile(package)
            except BackendError as e:
                reason = f"{e}{way_out(str(e), package.custom_kernels)}"
                raise BackendError(f"segment {segment.name} cannot be compiled by AOTInductor: {reason}") from e
            shutil.copyfile(self._scratch_path(package), target)
        for kernel in package.kernels:
            if not (path.parent / kernel.file).exists():
                (path.parent / kernel.file).write_bytes(hopper.compile_kernel(kernel))
        path.write_text(json.dumps(package.describe(self._kind), separators=(",", ":")))

    def _compile(self, package: _Package) -> None:
        """Make the file of a package, unless the cache had it. Raises :class:`BackendError`."""
        made = self._scratch_path(package)
        if package.key in self._futures:
            self._futures[package.key].result()
        elif made.exists():
            return
        else:
            compile_here(package.job, made)
        if package.key not in self._own:
            self._cache.store(self._cache_key(package), made)

    def _cache_key(self, package: _Package) -> str:
        return json.dumps([package.key, self.device, versions(), processor(), source_hash()])

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        try:
            data = json.loads(path.read_text())
            if data["format"] != _FORMAT:
                raise BackendError(f"{path} is of another version: {data['format']!r}, not {_FORMAT!r}: convert again")
            groups = [{str(n): Operand.from_json(o) for n, *o in data[k]} for k in _GROUPS]
            package = str(data["package"])
            slices = {str(n): [InputSlice(*map(int, p)) for p in listed] for n, listed in data["slices"].items()}
            aliased = {str(n): AliasedOutput(str(i), int(a), int(b)) for n, (i, a, b) in data["aliased"].items()}
            calls = [str(name) for name in data["calls"]]
            kernels = [str(name) for name in data["kernels"]]
            target, kind, built = str(data["target"]), str(data["device"]), str(data["torch"])
        except (OSError, ValueError, KeyError, TypeError, BundleError) as e:
            raise BackendError(f"{path} is not a segment: {type(e).__name__} {e}") from e
        inputs, needed, outputs = groups
        if {*outputs, *aliased} != set(segment) or any(alias.source not in inputs for alias in aliased.values()):
            raise BackendError(f"{path} is another segment: it gives {(*outputs, *aliased)}, not {tuple(segment)}")
        check_here(kind, target, built, device)
        flash_attention.load_packages(calls, device)
        if str(device) == "cuda":  # without an index
            device = torch.device("cuda", torch.cuda.current_device())
        hopper.load_kernels(path.parent, kernels, device)
        if not re.fullmatch(r"[0-9a-f]+\.pt2", package):
            raise BackendError(f"{path} names {package!r}, which is no package of a bundle")
        loader = self._load_package(path.parent / package, device)
        for name, operand in needed.items():
            check_weight(path, weights, name, operand.spec)
        tensors = [weights.tensor(n, device, MEMORY_FORMATS[o.format]) for n, o in needed.items()]
        return InductorEngine(loader, inputs, tensors, outputs, slices, aliased, device)

    def _load_package(self, path: Path, device: torch.device) -> PackageLoader:
        key = str(path.absolute()), device
        if key not in self._loaded:
            try:
                self._loaded[key] = pytorch_private.load_package(path, device)
            except Exception as e:  # PyTorch has no error class for this
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
                raise BackendError(f"{path} cannot be loaded: {reason}: copy the bundle again, or convert again") from e
        return self._loaded[key]

    def _scratch_path(self, package: _Package) -> Path:
        assert self._scratch is not None
        return Path(self._scratch.name) / f"{package.key}.pt2"

    def _package(self, segment: SegmentGraph) -> _Package:
        formats = weight_formats(segment) if self._channels_last else {}
        aliased = aliased_outputs(segment)
        kept = [i for i, (name, _) in enumerate(segment.outputs) if name not in aliased]
        written = [segment.outputs[i] for i in kept]
        graph, slices = lift_input_slices(segment.graph.graph, len(segment.inputs), kept)
        custom = "custom-kernels" in self._autotune
        if "linear" in self._autotune:
            split_linears(graph.graph, custom)
        if self._channels_last and self._autotune & {"conv", "custom-kernels"}:
            autotune_convolutions(graph.graph, im2col="conv" in self._autotune, custom_kernels=custom)
        if custom:
            fuse_gated_linears(graph.graph)
            select_fp8_kernels(graph.graph)
        called = autotune_attention(graph.graph, self._libraries, self._custom_attention, forced=self._forced)
        inputs = [Operand(s, self._value_format(name, s)) for name, s in segment.inputs]
        weights = [Operand(s, formats.get(name, "contiguous")) for name, s in segment.weights]
        outputs = [Operand(s, self._value_format(name, s)) for name, s in written]
        passed: list[Operand] = []  # the arguments of the program before the weights
        for operand, taken in zip(inputs, slices, strict=True):
            passed += [operand] if taken is None else [slice_operand(operand, piece) for piece in taken]
        job = CompileJob(graph_to_json(graph), (*passed, *weights), tuple(outputs), self._kind, self._all_settings())
        key = content_hash(json.dumps([self.version, job.to_json()]))
        named = {
            group: [[name, *operand.to_json()] for (name, _), operand in zip(specs, operands, strict=True)]
            for group, specs, operands in zip(
                _GROUPS, (segment.inputs, segment.weights, written), (inputs, weights, outputs), strict=True
            )
        }
        views = {
            name: [dataclasses.astuple(piece) for piece in taken]
            for (name, _), taken in zip(segment.inputs, slices, strict=True)
            if taken is not None
        }
        aliases = {name: dataclasses.astuple(alias) for name, alias in aliased.items()}
        return _Package(
            key,
            job,
            tuple(flash_attention.LIBRARIES[v].package for v in sorted(called)),
            called_kernels(graph.graph),
            has_kernels(graph.graph),
            {**named, "slices": views, "aliased": aliases},
        )

    def _all_settings(self) -> tuple[tuple[str, ConfigValue], ...]:
        compiler = select_compiler()[0]
        return self._settings if compiler is None else (*self._settings, ("cpp.cxx", [None, compiler]))

    def _value_format(self, name: str, spec: TensorSpec) -> str:
        """Choose the memory format of a value between segments.

        Images that go from segment to segment keep the format of convolutions. Transports move contiguous values.
        """
        contiguous = name not in self._images or not spec.dtype.is_floating_point or spec.shape[1] < 8
        return "contiguous" if contiguous else CHANNELS_LAST[len(spec.shape)][0]

    def __del__(self) -> None:
        pool: WorkerPool | None = self.__dict__.get("_pool")
        if pool is not None:
            pool.close()


def _autotuned(requested: tuple[str, ...] | None, kind: DeviceKind) -> frozenset[str]:
    """Resolve the option ``autotune`` to a set of :data:`AUTOTUNABLE`; raises :class:`BackendError` for others."""
    if requested is None:
        requested = ("all",) if kind == "cuda" else ()
    if unknown := {*requested} - {*AUTOTUNABLE, "all", "none"}:
        choices = ", ".join(AUTOTUNABLE)
        raise BackendError(f"autotune={min(unknown)}: give any of {choices} (separated by commas), or all, or none")
    if len(requested) > 1 and {"all", "none"} & {*requested}:
        raise BackendError(f"autotune={','.join(requested)}: all and none stand alone")
    return frozenset(AUTOTUNABLE if requested == ("all",) else requested) - {"none"}


@dataclasses.dataclass(frozen=True)
class _Package:
    """A compiled program, named by its content, with the names of its operands in one segment."""

    key: str
    job: CompileJob
    calls: tuple[str, ...]
    kernels: tuple[hopper.Kernel, ...]
    custom_kernels: bool
    operands: dict[str, object]

    def describe(self, kind: DeviceKind) -> dict[str, object]:
        """Return the content of the JSON file beside the package."""
        return {
            "format": _FORMAT, "package": f"{self.key}.pt2", "device": kind, "target": target_of(kind),
            "torch": torch_version(), "calls": list(self.calls),
            "kernels": [kernel.file for kernel in self.kernels], **self.operands,
        }  # fmt: skip


_GROUPS = ("inputs", "weights", "outputs")
