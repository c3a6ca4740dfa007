# SPDX-License-Identifier: Apache-2.0
"""Build an engine file from an ONNX file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from districompile.backends.tensorrt import v8
from districompile.backends.tensorrt.collectives import add_collectives, check_collectives
from districompile.backends.tensorrt.library import Library, format_errors, required, set_optional
from districompile.common.locks import held
from districompile.errors import BackendError
from districompile.ir.segment import InnerCollective

if TYPE_CHECKING:  # published type stubs: whichever flavour is used, its objects have these types
    import tensorrt as types

WeightMode = Literal["bound", "refit", "inside"]
"""Source of the weights of an engine: inputs; put into it when it is loaded (TensorRT's strip plan); stored in it."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    ``targets`` are kinds of GPU (``sm89``), or nothing where the library builds for the present one only.
    ``timing_cache`` is a file that is read and extended, for libraries that time kernels when they build. ``effort`` is
    the library's optimisation level, from 0 to 5.
    """

    targets: tuple[str, ...] = ()
    weights: WeightMode = "bound"
    timing_cache: Path | None = None
    effort: int | None = None


@contextlib.contextmanager
def beside_weights(onnx: Path, weights: Path) -> Iterator[Path]:
    """Give ``onnx`` a path in a folder with the weight file, where parsers look for external data."""
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch:
        for source in (onnx, weights):
            os.symlink(source.absolute(), Path(scratch) / source.name)
        yield Path(scratch) / onnx.name


@contextlib.contextmanager
def _to_parse(library: Library, onnx: Path, weights: Path) -> Iterator[tuple[Path, frozenset[str] | None]]:
    """Give the file to parse, and the float16 inputs and outputs of a model that had to be widened, else None."""
    if not (library.is_v8 and v8.has_half(onnx)):
        with beside_weights(onnx, weights) as file:
            yield file, None
        return
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch:
        file = Path(scratch) / onnx.name
        yield file, v8.write_widened(onnx, weights, file)


def build_engine(
    library: Library,
    onnx: Path,
    weights: Path,
    path: Path,
    options: BuildOptions,
    *,
    collectives: Sequence[InnerCollective] = (),
    sources: Mapping[str, str] | None = None,
) -> None:
    """Parse ``onnx``, whose external data is in ``weights``, and write the engine to ``path``.

    Each of ``collectives`` takes the place of an output and an input of the model, and is in the engine afterwards.
    Raises :class:`BackendError` with TensorRT's error, the operator and its source line (``sources``).
    """
    plan, config = _built(library, onnx, weights, options, collectives, sources or {})
    if plan is None and library.is_v8 and options.timing_cache is not None:
        # Seen on H200s: the library could not read back what it had kept for its fused regions ("myelinCache.h
        # deserializeFromBuffer")
        options = dataclasses.replace(options, timing_cache=None)
        plan, config = _built(library, onnx, weights, options, collectives, sources or {})
    if plan is None:
        raise BackendError(f"{library.flavour} cannot build {onnx.name}: {format_errors(library.log.take(), sources)}")
    if collectives:
        check_collectives(library, plan, collectives, onnx.name)
    _write(path, memoryview(plan))
    if options.timing_cache is not None:
        _keep_timings(config, options.timing_cache)


def _built(
    library: Library,
    onnx: Path,
    weights: Path,
    options: BuildOptions,
    collectives: Sequence[InnerCollective],
    sources: Mapping[str, str],
) -> tuple[types.IHostMemory | None, types.IBuilderConfig]:
    """Parse and build once. Return the plan, or None if the builder failed, and the configuration."""
    trt, log = library.module, library.log
    log.take()
    builder: types.Builder = trt.Builder(log)
    network: types.INetworkDefinition = (
        v8.create_network(trt, builder)
        if library.is_v8
        else builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    )
    parser: types.OnnxParser = trt.OnnxParser(network, log)
    with _to_parse(library, onnx, weights) as (file, narrow):
        if not parser.parse_from_file(str(file)):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            errors = [v8.describe_parser_error(e, onnx) if library.is_v8 else _parser_error(e) for e in found]
            raise BackendError(
                f"{library.flavour} cannot read {onnx.name}: {format_errors(errors or log.take(), sources)}"
            )
        config = _config(library, builder, options)
        if collectives:
            add_collectives(library, network, collectives)
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if library.is_v8:
            v8.configure(trt, config, network, narrow)
        return cast("types.IHostMemory | None", builder.build_serialized_network(network, config)), config


def _parser_error(error: types.ParserError) -> str:
    return f"{error.node_name()}: {error.desc()} ({error.node_operator()})"


def _config(library: Library, builder: types.Builder, options: BuildOptions) -> types.IBuilderConfig:
    trt = library.module
    config = builder.create_builder_config()
    # TF32 keeps three decimal digits, and the exact phase must be exact in float32
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.weights == "refit":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    if library.ahead_of_time:
        capabilities = [getattr(trt.ComputeCapability, sm.upper()) for sm in options.targets]
        set_optional(config, "num_compute_capabilities", len(capabilities))
        set_capability = required(config, "set_compute_capability")
        for i, capability in enumerate(capabilities):
            set_capability(capability, i)
    preview = getattr(trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
    if preview is not None:
        config.set_preview_feature(preview, True)
    if options.effort is not None:
        config.builder_optimization_level = options.effort
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _keep_timings(config: types.IBuilderConfig, file: Path) -> None:
    """Add what a build has timed to the file, which other processes extend meanwhile."""
    with held(file.parent):
        timed = config.get_timing_cache()
        known = file.read_bytes() if file.is_file() else b""
        if known:
            timed.combine(config.create_timing_cache(known), ignore_mismatch=False)
        _write(file, memoryview(timed.serialize()))


def _write(path: Path, data: memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(data)
    temporary.replace(path)
