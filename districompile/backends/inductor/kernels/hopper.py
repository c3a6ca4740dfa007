# SPDX-License-Identifier: Apache-2.0
"""Compile, load and launch the CUDA kernel ``products.cu``: gated linear layers and convolutions on Hopper GPUs.

Those of 8-bit numbers are in :mod:`.eight_bit`.

The kernel uses what Triton cannot express: tiles of 160 columns, tiles of several rows of pixels, and clusters of
blocks that share their copies. An engine calls it as an operator. NVRTC, which comes with PyTorch, compiles it once for
each shape of tile. A bundle contains the compiled kernels that its engines call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from districompile.backends.inductor.fragment import library_fragment, register_fake
from districompile.backends.inductor.kernels import launch
from districompile.cuda.driver import DriverError, call
from districompile.errors import BackendError

# (columns, parts) of a tile. The numbers of channels of many networks are multiples of 160: 2048 x 1280 is then 128
# tiles for 132 multiprocessors, where tiles of 128 columns give 160.
TILES = ((160, 1), (160, 2), (128, 1), (128, 2), (256, 1), (80, 1))
GATED_TILES = (160, 128, 80)

_SHARED = 232448  # bytes of shared memory of a block, at most
_PIXELS, _STEP, _CLUSTER, _THREADS = 128, 128, 2, 384  # as in products.cu
_MAX_STAGES = 8
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}  # PTX's names
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float8_e4m3fn: 0}  # CUtensorMapDataType; 0: any 8 bits
_SWIZZLE_128B, _PROMOTE_256B, _SHARED_SIZE = 3, 3, 8  # CUtensorMapSwizzle, ...L2promotion, CUfunction_attribute

_LIB = library_fragment()
_LIB.define("tiled_gated_product(Tensor x, Tensor weight, Tensor? bias, int columns) -> Tensor")
_LIB.define("tiled_convolution(Tensor x, Tensor weight, int[] kernel, int[] padding, int[] tile) -> Tensor")


def unavailable_reason() -> str | None:
    """Say why the kernel cannot be used on this machine, or None if it can."""
    return launch.unavailable_reason() or _no_compiler()


@functools.cache
def _no_compiler() -> str | None:
    try:
        code, *version = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as e:  # an ImportError, or an error of the code that looks for the library
        return f"cuda.bindings cannot load NVRTC ({e})"
    return None if int(code) == 0 else f"NVRTC failed: {code.name} {version}"


class Kernel(NamedTuple):
    """One compiled variant: tiles of ``parts`` times ``columns`` columns, gated or not, with a bias or not.

    ``dtype`` is that of results and biases. Other operands have it too, or the 8 bits of float8_e4m3fn.
    """

    columns: int
    parts: int
    gated: bool
    bias: bool
    dtype: torch.dtype
    bits: int = 16

    @property
    def file(self) -> str:
        """The name of its file in a bundle."""
        flags = f"{'gated' if self.gated else 'plain'}-{'bias' if self.bias else 'bare'}-{_KINDS[self.dtype]}"
        return f"products{_VERSION}-{self.columns}-{self.parts}-{flags}{'' if self.bits == 16 else '-f8'}.cubin"

    @classmethod
    def of_file(cls, name: str) -> tuple[Kernel, int]:
        """Return the variant in a file of a bundle, and its version. Raises ``ValueError`` for another name."""
        found = _FILE.fullmatch(name)
        if found is None:
            raise ValueError(name)
        version, columns, parts, gated, bias, kind, eight = found.groups()
        dtype = next(d for d, k in _KINDS.items() if k == kind)
        kernel = cls(int(columns), int(parts), gated == "gated", bias == "bias", dtype, 8 if eight else 16)
        return kernel, int(version)


def gated_kernel(columns: int, bias: bool, dtype: torch.dtype) -> Kernel:
    """Return the variant that :func:`tiled_gated_linear` calls."""
    return Kernel(columns, 2, True, bias, dtype)


def convolution_kernel(tile: Sequence[int], dtype: torch.dtype) -> Kernel:
    """Return the variant that :func:`tiled_convolution` calls."""
    columns, parts = tile
    return Kernel(columns, parts, False, False, dtype)


_VERSION = 3  # to be raised when the arguments of the kernel change, or when a fault in it is fixed
_FILE = re.compile(r"products(\d+)-(\d+)-(\d+)-(gated|plain)-(bias|bare)-(f16|bf16)(-f8)?\.cubin")
_CUBINS: dict[Kernel, bytes] = {}


def load_kernels(folder: Path, names: Iterable[str], device: torch.device) -> None:
    """Read kernels from a bundle, and load them on ``device`` if that is a GPU.

    Kernels of another version, and kernels that this driver refuses, are compiled here. Raises :class:`BackendError` if
    that fails, or if a file is missing.
    """
    for name in names:
        try:
            kernel, version = Kernel.of_file(name)
        except ValueError:
            raise BackendError(f"{folder} names {name!r}, which is no kernel file") from None
        if version == _VERSION and kernel not in _CUBINS:
            try:
                _CUBINS[kernel] = (folder / name).read_bytes()
            except OSError as e:
                raise BackendError(f"cannot read {folder / name}: {e.strerror or e}") from e
        if device.type == "cuda":
            try:
                _load(kernel, device)
            except DriverError as e:
                raise BackendError(f"{folder / name} cannot be used here: {e}: convert again on this machine") from e


def _load(kernel: Kernel, device: torch.device) -> None:
    try:
        _function_of(kernel, device)
    except DriverError:
        if _CUBINS.pop(kernel, None) is None:
            raise
        _function_of(kernel, device)  # compiles it here


def tiled_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    """Compute the first half of ``linear(x, weight, bias)`` times the GELU of the second, for matrices.

    ``columns`` is the width of a tile in each half.
    """
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    bias = None if bias is None else aligned(bias)
    kernel = gated_kernel(columns, bias is not None, x.dtype)
    launch_tiles(kernel, aligned(x)[None, None], aligned(weight), bias, out, (1, 1), (0, 0))
    return out


def tiled_convolution(
    x: Tensor, weight: Tensor, kernel: Sequence[int], padding: Sequence[int], tile: Sequence[int]
) -> Tensor:
    """Convolve ``x`` (batch, height, width, channels) with a matrix (columns, pixels of the kernel x channels).

    Returns (batch, height, width, columns). The stride is 1.
    """
    out = x.new_empty(output_shape(x.shape, weight.shape[0], kernel, padding))
    launch_tiles(convolution_kernel(tile, x.dtype), aligned(x), aligned(weight), None, out, kernel, padding)
    return out


def output_shape(shape: Sequence[int], columns: int, kernel: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return (batch, height, width, columns) of a convolution of an image of that shape, with stride 1."""
    height, width = (n + 2 * p - k + 1 for n, p, k in zip(shape[1:3], padding, kernel, strict=True))
    return [shape[0], height, width, columns]


_LIB.impl("tiled_gated_product", tiled_gated_linear, "CUDA")
_LIB.impl("tiled_convolution", tiled_convolution, "CUDA")
register_fake("tiled_gated_product", lambda x, w, b, columns: x.new_empty(x.shape[0], w.shape[0] // 2), _LIB)
register_fake(
    "tiled_convolution",
    lambda x, w, kernel, padding, tile: x.new_empty(output_shape(x.shape, w.shape[0], kernel, padding)),
    _LIB,
)
TILED_GATED_LINEAR = torch.ops.districompile.tiled_gated_product.default
TILED_CONVOLUTION = torch.ops.districompile.tiled_convolution.default


def aligned(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and at a multiple of 16 bytes, as the tensor memory accelerator reads it."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


class _Sizes(ctypes.Structure):
    """The argument ``Sizes`` of products.cu."""

    _fields_ = tuple((name, ctypes.c_int) for name in (
        "batch", "height", "width", "columns", "channels", "taps", "across", "above", "left", "shift", "each"
    ))  # fmt: skip


def launch_tiles(
    kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, taps: Sequence[int],
    padding: Sequence[int], pixel_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the convolution of ``x`` (batch, height, width, channels) with a matrix (columns, taps x channels) to
    ``out``. All tensors are :func:`aligned`.

    Operands of 8 bits have scales in float32, one for each column, and one for each pixel or for all of them.
    """
    columns, parts = kernel.columns, kernel.parts
    batch, height, width, _ = output_shape(x.shape, 0, taps, padding)
    wide = _tile_width(height, width)
    tall = _PIXELS // wide
    sizes = _Sizes(
        batch, height, width, out.shape[-1], x.shape[-1], math.prod(taps), taps[1], *padding,
        wide.bit_length() - 1, 0 if pixel_scale is None or pixel_scale.numel() == 1 else 1,
    )  # fmt: skip
    pixels = batch * launch.blocks_of(height, tall) * launch.blocks_of(width, wide)
    tiles = launch.blocks_of(pixels, _CLUSTER) * (out.shape[-1] // (columns if kernel.gated else parts * columns))
    maps = [_tensor_map(x, (1, tall, wide)), _tensor_map(weight, (columns // _CLUSTER,))]
    given = (bias, out, pixel_scale, column_scale)
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in given]
    arguments = (ctypes.c_void_p * 7)(*(ctypes.addressof(a) for a in (*maps, *pointers, sizes)))
    blocks = _CLUSTER * min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count // _CLUSTER)
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    function, shared = _function_of(kernel, x.device), _bytes(kernel)
    call("cuLaunchKernel", function, blocks, 1, 1, _THREADS, 1, 1, shared, stream, arguments, None)


def _tile_width(height: int, width: int) -> int:
    """Choose the pixels of a row that a tile has, a power of 2, for the fewest tiles."""

    def count(wide: int) -> int:
        return launch.blocks_of(width, wide) * launch.blocks_of(height, _PIXELS // wide)

    widths = [_PIXELS >> i for i in range(_PIXELS.bit_length())]
    return min(widths, key=count)


def _tensor_map(tensor: Tensor, block: Sequence[int]) -> ctypes.Array[ctypes.c_char]:
    """Return a CUtensorMap of the contiguous ``tensor``, read in blocks of (*block, _STEP bytes), with 0 outside."""
    rank, size = tensor.ndim, tensor.itemsize
    memory = (ctypes.c_char * 192)()
    offset = -ctypes.addressof(memory) % 64  # a CUtensorMap lies at a multiple of 64 bytes
    found = (ctypes.c_char * 128).from_buffer(memory, offset)  # keeps ``memory`` alive
    dims = (ctypes.c_uint64 * rank)(*reversed(tensor.shape))
    # From the shape: PyTorch gives dims of size 1 any stride
    dense = itertools.accumulate(reversed(tensor.shape[1:]), operator.mul)
    strides = (ctypes.c_uint64 * (rank - 1))(*(n * size for n in dense))
    box, steps = (ctypes.c_uint32 * rank)(_STEP // size, *reversed(block)), (ctypes.c_uint32 * rank)(*[1] * rank)
    address = ctypes.c_void_p(tensor.data_ptr())
    call(
        "cuTensorMapEncodeTiled", ctypes.byref(found), _MAP_TYPES[tensor.dtype], rank, address, dims, strides, box,
        steps, 0, _SWIZZLE_128B, _PROMOTE_256B, 0,
    )  # fmt: skip
    return found


@functools.cache
def _function_of(kernel: Kernel, device: torch.device) -> ctypes.c_void_p:
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    code = _CUBINS.get(kernel) or compile_kernel(kernel)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # creates the CUDA context
        call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
        call("cuModuleGetFunction", ctypes.byref(found), module, ctypes.c_char_p(b"product"))
        call("cuFuncSetAttribute", found, _SHARED_SIZE, _bytes(kernel))
    return found


def _bytes(kernel: Kernel) -> int:
    """Return the bytes of shared memory of a block: its stages, with two barriers each, and what 8 bits need."""
    return stages(kernel) * (_stage(kernel) + 16) + _factors(kernel)


def stages(kernel: Kernel) -> int:
    """Return the number of stages of a block: the steps of the inner dimension that are copied ahead."""
    return min(_MAX_STAGES, (_SHARED - _factors(kernel)) // (_stage(kernel) + 16))


def _factors(kernel: Kernel) -> int:
    """Return the bytes of scales and biases in float32 of the columns of a tile, for each of two warp groups."""
    return 2 * 2 * 4 * kernel.columns * kernel.parts if kernel.bits == 8 else 0


def _stage(kernel: Kernel) -> int:
    return (_PIXELS + kernel.parts * kernel.columns) * _STEP


@functools.cache
def compile_kernel(kernel: Kernel) -> bytes:
    """Compile the kernel to the cubin that the driver loads. Needs NVRTC, and no GPU. Raises :class:`DriverError`."""
    if (reason := _no_compiler()) is not None:
        raise DriverError(reason)
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise DriverError(f"NVRTC failed: {result[0].name}")
        return result[1] if len(result) > 1 else None

    header = _header(kernel).encode()
    columns, parts, gated, bias, _, bits = kernel
    values = {
        "COLUMNS": columns, "PARTS": parts, "STAGES": stages(kernel), "GATED": gated, "BIAS": bias,
        "BYTES": bits // 8,
    }  # fmt: skip
    flags = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={int(n)}" for name, n in values.items())]
    text, options = Path(__file__).with_name("products.cu").read_bytes(), [flag.encode() for flag in flags]
    program = checked(nvrtc.nvrtcCreateProgram(text, b"products.cu", 1, [header], [b"wgmma.cuh"]))
    [code] = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise DriverError(f"NVRTC does not compile products.cu: {log.decode(errors='replace').strip()}")
    result: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, result))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return result


def _header(kernel: Kernel) -> str:
    """Generate wgmma.cuh.

    A thread holds columns / 2 numbers of a product of 64 rows, ``columns`` columns, and 32 bytes of the inner dim. That
    of 16-bit numbers is added to them. Of 8-bit numbers the first one of a step (``number`` 0) replaces them.
    """
    count, kind, eight = kernel.columns // 2, _KINDS[kernel.dtype], kernel.bits == 8
    numbers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(y[{i}])' for i in range(count))
    shape, added, order = ("k32.f32.e4m3.e4m3", "more", "") if eight else (f"k16.f32.{kind}.{kind}", "1", ", 0, 0")
    compare, given = (f"setp.ne.b32 more, %{count + 2}, 0;", ', "r"(number)') if eight else ("", "")
    return f"""
__device__ __forceinline__ void wgmma(float (&y)[{count}], unsigned long long a, unsigned long long b, int number) {{
    asm volatile(
        "{{\\n.reg .pred more;\\n{compare}\\n"
        "wgmma.mma_async.sync.aligned.m64n{kernel.columns}{shape} "
        "{{{numbers}}}, %{count}, %{count + 1}, {added}, 1, 1{order};\\n}}"
        : {operands} : "l"(a), "l"(b){given});
}}
// What is written to y before is there, and what reads it afterwards comes after.
__device__ __forceinline__ void hold(float (&y)[{count}]) {{ asm volatile("" : {operands} :: "memory"); }}
__device__ __forceinline__ unsigned int pack(float low, float high) {{
    unsigned int word;
    asm("cvt.rn.{kind}x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}}
__device__ __forceinline__ void unpack(unsigned int word, float (&numbers)[2]) {{
    {_UNPACK[kind]}
}}
__device__ __forceinline__ float widen(unsigned short word) {{
    float numbers[2];
    unpack(word, numbers);
    return numbers[0];
}}
"""


_UNPACK = {
    "f16": 'asm("{\\n.reg .b16 low, high;\\nmov.b32 {low, high}, %2;\\n'
    'cvt.f32.f16 %0, low;\\ncvt.f32.f16 %1, high;\\n}" : "=f"(numbers[0]), "=f"(numbers[1]) : "r"(word));',
    "bf16": "numbers[0] = __uint_as_float(word << 16);\n    numbers[1] = __uint_as_float(word & 0xffff0000u);",
}
