"""Libraries that look like TensorRT: they have the interface that a version has, and note what is asked of them."""

from __future__ import annotations

import enum
import types
from pathlib import Path
from typing import Any

from districompile.backends.tensorrt.library import Library


def members(*names: str) -> Any:
    return enum.IntEnum("Members", {name: i for i, name in enumerate(names)})


class Tensor:
    def __init__(self, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, dtype


class Network:
    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = 0

    def get_input(self, i: int) -> Tensor:
        return self._inputs[i]


class TimingCache:
    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> bytes:
        return self.known + b"+"

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.known = b" ".join(sorted({*self.known.split(), *input_cache.known.split()}))
        return not ignore_mismatch


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = {"TF32"}
        self.sources: int | None = None
        self.cache: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_tactic_sources(self, sources: int) -> bool:
        self.sources = sources
        return True

    def create_timing_cache(self, known: bytes) -> TimingCache:
        return TimingCache(known)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class V8:
    """The module ``tensorrt`` 8.6, as far as it is used: an attribute that it lacks is an ``AttributeError``."""

    __version__ = "8.6.0"
    INetworkDefinition = object
    DataType = members("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8")
    BuilderFlag = members("FP16", "INT8", "REFIT", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
    NetworkDefinitionCreationFlag = members("EXPLICIT_BATCH", "EXPLICIT_PRECISION")
    TacticSource = members("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    PreviewFeature = members("FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806")
    TensorIOMode = members("NONE", "INPUT", "OUTPUT")
    ILogger = types.SimpleNamespace

    def __init__(self, network: Network | None = None, errors: list[Any] | None = None) -> None:
        self.network, self.errors, self.config = network, errors or [], Config()
        self.network_flags: int | None = None
        self.parsed: list[str] = []
        outer = self

        class Builder:
            def __init__(self, log: Any) -> None:
                pass

            def create_network(self, flags: int = 0) -> Any:
                outer.network_flags = flags
                return outer.network

            def create_builder_config(self) -> Config:
                return outer.config

            def build_serialized_network(self, network: Any, config: Config) -> bytes:
                assert network is outer.network and config is outer.config
                return b"a plan"

        class OnnxParser:
            num_errors = property(lambda self: len(outer.errors))

            def __init__(self, network: Any, log: Any) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                outer.parsed = sorted(p.name for p in Path(path).parent.iterdir())
                return not outer.errors

            def get_error(self, i: int) -> Any:
                return outer.errors[i]

        self.Builder, self.OnnxParser = Builder, OnnxParser


class Log:
    """A logger with one message."""

    def take(self) -> list[str]:
        return ["the reason"]


def library_of(module: Any, flavour: Any = "tensorrt") -> Library:
    library = Library(flavour, module)
    library.__dict__["log"] = Log()
    return library
