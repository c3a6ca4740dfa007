"""From an ONNX file to an engine file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from districompile.backends.tensorrt.inside import add_gathers
from districompile.backends.tensorrt.library import Library, optional, set_optional, told
from districompile.errors import BackendError

if TYPE_CHECKING:  # published type stubs: whichever flavour is used, its objects have these types
    import tensorrt as types

WeightMode = Literal["bound", "refit", "inside"]
"""Where an engine has its weights from: given to it as inputs; put into it when it is loaded (TensorRT's strip plan);
or stored in it."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """``targets`` are kinds of GPU (``sm89``), empty where the library builds for the present one only.
    ``timing_cache`` is a file that is read and extended, where builds measure kernels."""

    targets: tuple[str, ...] = ()
    weights: WeightMode = "bound"
    timing_cache: Path | None = None


@contextlib.contextmanager
def beside_weights(onnx: Path, weights: Path) -> Iterator[Path]:
    """``onnx`` under a path that has the weight file in the same folder, where its external data is looked for."""
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch:
        for source in (onnx, weights):
            os.symlink(source.absolute(), Path(scratch) / source.name)
        yield Path(scratch) / onnx.name


def build_engine(
    library: Library,
    onnx: Path,
    weights: Path,
    path: Path,
    options: BuildOptions,
    *,
    gathers: Sequence[tuple[str, str]] = (),
    ranks: int = 1,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Parse ``onnx``, whose external data is in ``weights``, and write the engine to ``path``.

    ``gathers`` are pairs of an output and an input of the model, which become one all-gather over ``ranks`` inside.
    Raises :class:`BackendError` with what TensorRT said, the operator and its line in the model (``sources``).
    """
    trt, log = library.module, library.log
    log.take()
    builder: types.Builder = trt.Builder(log)
    network: types.INetworkDefinition = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser: types.OnnxParser = trt.OnnxParser(network, log)
    with beside_weights(onnx, weights) as file:
        if not parser.parse_from_file(str(file)):
            errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise BackendError(f"{library.flavour} cannot read {onnx.name}: {told(errors or log.take(), sources)}")
        if gathers:
            add_gathers(library, network, gathers, ranks)
        config = _config(library, builder, options)
        plan = cast("types.IHostMemory | None", builder.build_serialized_network(network, config))
    if plan is None:
        raise BackendError(f"{library.flavour} cannot build {onnx.name}: {told(log.take(), sources)}")
    _write(path, memoryview(plan))
    if options.timing_cache is not None:
        _write(options.timing_cache, memoryview(config.get_timing_cache().serialize()))


def _parser_error(error: types.ParserError) -> str:
    return f"{error.node_name()}: {error.desc()} ({error.node_operator()})"


def _config(library: Library, builder: types.Builder, options: BuildOptions) -> types.IBuilderConfig:
    trt = library.module
    config = builder.create_builder_config()
    # float32 means float32: TF32 keeps three decimal digits, and the exact phase is to be exact
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.weights == "refit":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    if library.ahead_of_time:
        capabilities = [getattr(trt.ComputeCapability, sm.upper()) for sm in options.targets]
        set_optional(config, "num_compute_capabilities", len(capabilities))
        set_capability = optional(config, "set_compute_capability")
        assert set_capability is not None
        for i, capability in enumerate(capabilities):
            set_capability(capability, i)
    preview = getattr(trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
    if preview is not None:
        config.set_preview_feature(preview, True)
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _write(path: Path, data: memoryview) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(data)
    temporary.replace(path)
