"""Segments compiled ahead of time by AOTInductor, for the GPU or the CPU of the machine that converts.

A package (``engines/HASH.pt2``) holds no weights and no names: weights are inputs of the compiled program, so that one
copy on a device serves all segments of both phases, and segments that differ in names alone share one package. Beside
it each segment has a small JSON file that says what its inputs, weights and outputs are called.

Packages are compiled machine code: loading one runs it. A bundle's hashes are checked before, which tells damage, not
malice: use bundles from whom you would take a program.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from districompile.backends import flash_attention
from districompile.backends.attention import use_fastest
from districompile.backends.base import BuildSegment, Engine
from districompile.backends.eager import EagerBackend
from districompile.backends.gpu import hopper
from districompile.backends.gpu.gated import use_gated_products
from districompile.backends.inductor_called import called_kernels, has_kernels
from districompile.backends.inductor_compiler import choose_compiler
from districompile.backends.inductor_direct import split_products
from districompile.backends.inductor_engine import CHANNELS_LAST, MEMORY_FORMATS, InductorEngine
from districompile.backends.inductor_graph import Job, Operand, Part, Room, image_values, lift_parts, rooms
from districompile.backends.inductor_pool import Pool, compile_here, default_workers
from districompile.backends.inductor_target import capability, check_here, target_of, torch_version
from districompile.backends.inductor_unfold import use_fastest as use_fastest_convolutions
from districompile.errors import BackendError, BundleError
from districompile.ir.plan import TensorSpec
from districompile.ir.serialize import content_hash, graph_to_json
from districompile.weights import WeightFile

TIMED = ("products", "convolutions", "kernels")
_FORMAT = "districompile inductor 4"
_OPTIMISE_HOST = "aot_inductor.compile_wrapper_opt_level"
# How many operands an expression may have that each of its readers computes anew. A group norm has its table, what a
# convolution gave with its bias, and the time embedding or the other summand of a residual, with its bias. By default
# (4) many would be written to memory, and read again by the convolution's padded input and by the rows that travel.
_FUSION = {"realize_reads_threshold": 6}
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}


class InductorBackend:
    """Compiles for ``device``, a kind of device of this machine ("cuda", "cpu"); by default the GPU if there is one.

    ``max_autotune`` measures several kernels for each matrix product and convolution: slower to compile, usually
    faster to run. ``attention``: "torch" for the kernels that PyTorch chooses, "flash3" for FlashAttention-3, "auto"
    for whichever is faster if that can be used here. ``timed``: what else is decided by measuring, of :data:`TIMED`
    (by default all of it on GPUs): "products", own keys and values written where they are sent from by a product of
    their own; "convolutions" by products; "kernels" of our own. ``channels_last`` stores weights of convolutions with
    their channels innermost (by default on GPUs; on the CPU it would cost each process a copy of them). ``workers``
    is how many processes compile, ``options`` further settings of ``torch._inductor.config``.
    """

    name = "inductor"
    suffix = ".aoti.json"
    native_code = True

    def __init__(
        self, device: str | None = None, *, max_autotune: bool = False, attention: str = "auto",
        timed: str | Collection[str] | None = None, channels_last: bool | None = None, workers: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._channels_last = self._kind == "cuda" if channels_last is None else channels_last
        self._workers = workers if workers is not None else default_workers(self._kind, max_autotune)
        # What a GPU's program does on the host needs no vector instructions, which take a minute to try out, and no
        # optimising compiler
        gpu = {"cpp.vec_isa_ok": False, _OPTIMISE_HOST: "O0", **_FUSION} if self._kind == "cuda" else {}
        self._options = tuple(sorted({"max_autotune": max_autotune, **gpu, **(options or {})}.items()))
        self._attention = flash_attention.choose(attention, self._kind)
        self._timed = _timed(timed, self._kind)
        self._own_attention = attention == "auto" and "kernels" in self._timed
        # Engines differ by torch, by the machine's device and by the options
        target = target_of(self._kind)
        self.version = f"4, torch {torch.__version__}, {target}, {self._channels_last}, {self._options}"
        self._plans: dict[int, tuple[BuildSegment, _Package]] = {}  # by id of the segment, which is kept alive
        self._images: set[str] = set()  # values that go from segment to segment as images
        self._futures: dict[str, Future[None]] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._pool: Pool | None = None
        self._loaded: dict[tuple[str, torch.device], Any] = {}

    @property
    def device(self) -> str:
        """What a bundle's manifest says of the device its engines are for."""
        if self._kind != "cuda":
            return self._kind
        return f"cuda: {torch.cuda.get_device_name()}, compute capability {capability()}"

    def unavailable(self) -> str | None:
        if not hasattr(torch._inductor, "aoti_compile_and_package"):
            return "the inductor backend needs PyTorch 2.9 or newer: pip install -U torch"
        return None

    def cannot_build(self) -> str | None:
        """What this machine lacks for compiling; running a bundle needs none of it."""
        if self._kind == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here, and the inductor backend compiles for the GPU it is run on"
        if self._kind == "cuda" and importlib.util.find_spec("triton") is None:
            return "the inductor backend needs triton for a GPU: pip install triton"
        reason = choose_compiler()[1]
        return reason and f"the inductor backend {reason}"

    def prepare(self, segments: Sequence[BuildSegment]) -> None:
        """Start compiling everything, the largest first."""
        if self.cannot_build() is not None:
            return
        read = {name for s in segments for name, _ in s.inputs}
        made = {name for s in segments for name, _ in s.outputs if name in read}
        self._images |= made & {name for s in segments for name in image_values(s)}
        new = [s for s in segments if id(s) not in self._plans and not self.refuses(s)]
        for segment in new:
            self._plans[id(segment)] = segment, self._package(segment)
        packages = {p.key: p for s in new for p in [self._plans[id(s)][1]] if p.key not in self._futures}
        ordered = sorted(packages.values(), key=lambda p: -len(p.job.graph))
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="districompile-")
        if len(ordered) == 1 or self._workers == 1:
            return  # in this process, one by one, as they are built
        if self._pool is None:
            self._pool = Pool(self._workers)
        futures = self._pool.submit((p.job, self._made(p)) for p in ordered)
        self._futures.update(zip((p.key for p in ordered), futures, strict=True))

    def refuses(self, segment: BuildSegment) -> list[str]:
        if (reason := self.cannot_build()) is not None:
            return [reason]
        return EagerBackend().refuses(segment)

    def build(self, segment: BuildSegment, weights: WeightFile, path: Path) -> None:
        if id(segment) not in self._plans:
            self.prepare([segment])
        if (reasons := self.refuses(segment)) or id(segment) not in self._plans:
            raise BackendError(f"segment {segment.name} cannot be compiled: {'; '.join(reasons)}")
        package = self._plans[id(segment)][1]
        for name, spec in segment.weights:
            _check_weight(path, weights, name, spec)
        target = path.parent / f"{package.key}.pt2"
        if not target.exists():
            try:
                if package.key in self._futures:
                    self._futures[package.key].result()
                else:
                    compile_here(package.job, self._made(package))
            except BackendError as e:
                hint = ": without kernels of ours (--timed products,convolutions) it may be" if package.ours else ""
                raise BackendError(f"segment {segment.name} cannot be compiled by AOTInductor: {e}{hint}") from e
            shutil.copyfile(self._made(package), target)
        for kernel in package.kernels:
            if not (path.parent / kernel.file).exists():
                (path.parent / kernel.file).write_bytes(hopper.compiled(kernel))
        path.write_text(json.dumps(package.describe(self._kind), separators=(",", ":")))

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        try:
            data = json.loads(path.read_text())
            if data["format"] != _FORMAT:
                raise BackendError(f"{path} is of another version: {data['format']!r}, not {_FORMAT!r}: convert again")
            groups = [{str(n): Operand.from_json(o) for n, *o in data[k]} for k in _GROUPS]
            package = str(data["package"])
            parts = {str(n): [Part(*map(int, p)) for p in listed] for n, listed in data["parts"].items()}
            found = {str(n): Room(str(source), int(a), int(b)) for n, (source, a, b) in data["rooms"].items()}
            calls = [str(name) for name in data["calls"]]
            kernels = [str(name) for name in data["kernels"]]
            target, kind, built = str(data["target"]), str(data["device"]), str(data["torch"])
        except (OSError, ValueError, KeyError, TypeError, BundleError) as e:
            raise BackendError(f"{path} is not a segment: {type(e).__name__} {e}") from e
        inputs, needed, outputs = groups
        if {*outputs, *found} != set(segment) or any(room.source not in inputs for room in found.values()):
            raise BackendError(f"{path} is another segment: it gives {(*outputs, *found)}, not {tuple(segment)}")
        check_here(kind, target, built, device)
        if calls:
            flash_attention.load(device)
        if str(device) == "cuda":  # without a number
            device = torch.device("cuda", torch.cuda.current_device())
        hopper.provide(path.parent, kernels, device)
        if not re.fullmatch(r"[0-9a-f]+\.pt2", package):
            raise BackendError(f"{path} names {package!r}, which is no package of a bundle")
        loader = self._load_package(path.parent / package, device)
        for name, operand in needed.items():
            _check_weight(path, weights, name, operand.spec)
        tensors = [weights.tensor(n, device, MEMORY_FORMATS[o.format]) for n, o in needed.items()]
        return InductorEngine(loader, inputs, tensors, outputs, parts, found, device)

    def _load_package(self, path: Path, device: torch.device) -> Any:
        key = str(path.absolute()), device
        if key not in self._loaded:
            index = device.index if device.type == "cuda" else -1
            try:
                # What torch's aoti_load_package ends in. Before, that compiles probes for vector instructions, only to
                # compare them with those of the machine that compiled; check_here does its own comparison.
                loader = torch._C._aoti.AOTIModelPackageLoader
                self._loaded[key] = loader(str(path), "model", True, 1, index)  # one thread, one runner
            except Exception as e:  # it has no error class of its own
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
                raise BackendError(f"{path} cannot be loaded: {reason}: copy the bundle again, or convert again") from e
        return self._loaded[key]

    def _made(self, package: _Package) -> Path:
        assert self._scratch is not None
        return Path(self._scratch.name) / f"{package.key}.pt2"

    def _package(self, segment: BuildSegment) -> _Package:
        formats = _weight_formats(segment) if self._channels_last else {}
        inside = rooms(segment)
        kept = [i for i, (name, _) in enumerate(segment.outputs) if name not in inside]
        written = [segment.outputs[i] for i in kept]
        graph, parts = lift_parts(segment.graph.graph, len(segment.inputs), kept)
        own = "kernels" in self._timed
        if "products" in self._timed:
            split_products(graph.graph, own)
        if self._channels_last and self._timed & {"convolutions", "kernels"}:
            use_fastest_convolutions(graph.graph, "convolutions" in self._timed, own)
        if own:
            use_gated_products(graph.graph)
        calls_flash = use_fastest(graph.graph, self._attention, self._own_attention)
        inputs = [Operand(s, self._value_format(name, s)) for name, s in segment.inputs]
        weights = [Operand(s, formats.get(name, "contiguous")) for name, s in segment.weights]
        outputs = [Operand(s, self._value_format(name, s)) for name, s in written]
        given: list[Operand] = []
        for operand, taken in zip(inputs, parts, strict=True):
            given += [operand] if taken is None else [_part_operand(operand, part) for part in taken]
        compiler = choose_compiler()[0]
        options = self._options if compiler is None else (*self._options, ("cpp.cxx", [None, compiler]))
        job = Job(graph_to_json(graph), (*given, *weights), tuple(outputs), self._kind, options)
        key = content_hash(json.dumps([self.version, job.to_json()]))
        named = {
            group: [[name, *operand.to_json()] for (name, _), operand in zip(specs, operands, strict=True)]
            for group, specs, operands in zip(
                _GROUPS, (segment.inputs, segment.weights, written), (inputs, weights, outputs), strict=True
            )
        }
        views = {
            name: [dataclasses.astuple(part) for part in taken]
            for (name, _), taken in zip(segment.inputs, parts, strict=True)
            if taken is not None
        }
        places = {name: dataclasses.astuple(room) for name, room in inside.items()}
        return _Package(
            key,
            job,
            calls_flash,
            called_kernels(graph.graph),
            has_kernels(graph.graph),
            {**named, "parts": views, "rooms": places},
        )

    def _value_format(self, name: str, spec: TensorSpec) -> str:
        """Images that go from segment to segment keep the format convolutions want; what transports move is plain."""
        plain = name not in self._images or not spec.dtype.is_floating_point or spec.shape[1] < 8
        return "contiguous" if plain else CHANNELS_LAST[len(spec.shape)][0]

    def __del__(self) -> None:
        pool: Pool | None = self.__dict__.get("_pool")
        if pool is not None:
            pool.close()


def _timed(asked: str | Collection[str] | None, kind: str) -> frozenset[str]:
    """Words of :data:`TIMED`, as they are given to the backend, or on the command line."""
    if asked is None:
        return frozenset(TIMED if kind == "cuda" else ())
    if isinstance(asked, str):
        asked = {"all": TIMED, "none": ()}.get(asked) or [w.strip() for w in asked.split(",") if w.strip() != "none"]
    if unknown := {*asked} - {*TIMED}:
        raise BackendError(f"nothing named {min(unknown)!r} is timed: there are {', '.join(TIMED)}")
    return frozenset(asked)


@dataclasses.dataclass(frozen=True)
class _Package:
    """One compiled program, by its content, and what a segment calls its operands."""

    key: str
    job: Job
    calls_flash: bool
    kernels: tuple[hopper.Kernel, ...]
    ours: bool
    operands: dict[str, Any]

    def describe(self, kind: str) -> dict[str, Any]:
        """The JSON beside the package."""
        return {
            "format": _FORMAT, "package": f"{self.key}.pt2", "device": kind, "target": target_of(kind),
            "torch": torch_version(), "calls": [flash_attention.PACKAGE] if self.calls_flash else [],
            "kernels": [kernel.file for kernel in self.kernels], **self.operands,
        }  # fmt: skip


_GROUPS = ("inputs", "weights", "outputs")


def _part_operand(whole: Operand, part: Part) -> Operand:
    shape = list(whole.spec.shape)
    shape[part.dim] = part.stop - part.start
    return Operand(TensorSpec(tuple(shape), whole.spec.dtype), whole.format, whole.spec.shape)


def _weight_formats(segment: BuildSegment) -> dict[str, str]:
    """Weights that are a convolution's, and nothing else's."""
    placeholders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"][len(segment.inputs) :]
    formats = {}
    for (name, spec), node in zip(segment.weights, placeholders, strict=True):
        known = CHANNELS_LAST.get(len(spec.shape))
        if known and node.users and all(u.target in _CONVOLUTIONS and u.args[1] is node for u in node.users):
            formats[name] = known[0]
    return formats


def _check_weight(path: Path, weights: WeightFile, name: str, spec: TensorSpec) -> None:
    if weights.spec(name) != spec:
        raise BackendError(f"{path} needs the weight {name!r} as {spec}, not as {weights.spec(name)}")
