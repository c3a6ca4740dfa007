# SPDX-License-Identifier: Apache-2.0
"""Changes to a captured CUDA graph before it is instantiated."""

from __future__ import annotations

import ctypes

from districompile.cuda.driver import DriverError, KernelNode, MemsetNode, call

_MEMSET = 2  # CU_GRAPH_NODE_TYPE_MEMSET
_MOST = 4096  # bytes; larger ones are worth a memset
_THREADS = 256
_REPEAT = {1: 0x01010101, 2: 0x00010001, 4: 1}  # of a value of so many bytes, in a word


def replace_memsets(graph: int, fill_words: ctypes.c_void_p) -> int:
    """Replace small memsets of ``graph`` (a cudaGraph_t that no executable was made of) by kernels. Return how many.

    cuDNN clears four bytes before each attention. In a profiler's timeline of an H100 a memset node between two kernel
    nodes takes some 7 us, a kernel 2; less without the profiler. ``fill_words`` is the function of ``exchange.cu``.
    What cannot be replaced stays as it is.
    """
    try:
        return sum(_replace(ctypes.c_void_p(graph), node, fill_words) for node in _nodes(graph))
    except DriverError:
        return 0  # each step leaves a graph that does the same


def _nodes(graph: int) -> list[ctypes.c_void_p]:
    found = _listed("cuGraphGetNodes", ctypes.c_void_p(graph))
    return [node for node in found if _type(node) == _MEMSET]


def _listed(name: str, of: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    """What a function of the driver that is asked twice lists: first for the number."""
    count = ctypes.c_size_t(0)
    call(name, of, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * max(1, count.value))()
    if count.value:
        call(name, of, nodes, ctypes.byref(count))
    return [ctypes.c_void_p(node) for node in nodes[: count.value]]


def _type(node: ctypes.c_void_p) -> int:
    found = ctypes.c_int(-1)
    call("cuGraphNodeGetType", node, ctypes.byref(found))
    return found.value


def _replace(graph: ctypes.c_void_p, node: ctypes.c_void_p, fill_words: ctypes.c_void_p) -> bool:
    memset = MemsetNode()
    call("cuGraphMemsetNodeGetParams", node, ctypes.byref(memset))
    words = words_of(memset)
    if words is None:
        return False
    value, count = words
    before = _listed("cuGraphNodeGetDependencies", node)
    after = _listed("cuGraphNodeGetDependentNodes", node)
    arguments = (ctypes.c_uint64(memset.target), ctypes.c_uint(value), ctypes.c_uint(count))
    pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(a) for a in arguments))
    params = KernelNode(
        function=fill_words, grid=(-(-count // _THREADS), 1, 1), block=(min(count, _THREADS), 1, 1), params=pointers
    )
    new = ctypes.c_void_p()
    call("cuGraphAddKernelNode_v2", ctypes.byref(new), graph, _array(before), ctypes.c_size_t(len(before)),
         ctypes.byref(params))  # fmt: skip
    call("cuGraphAddDependencies", graph, _array([new] * len(after)), _array(after), ctypes.c_size_t(len(after)))
    call("cuGraphDestroyNode", node)
    return True


def _array(nodes: list[ctypes.c_void_p]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(nodes)))(*nodes)


def words_of(memset: MemsetNode) -> tuple[int, int] | None:
    """(value, count) of the 32-bit words that a memset writes, if it is small and writes whole ones."""
    size = memset.width * memset.element_bytes
    if memset.height != 1 or not 0 < size <= _MOST or size % 4 or memset.target % 4:
        return None
    mask = (1 << 8 * memset.element_bytes) - 1
    return (memset.value & mask) * _REPEAT[memset.element_bytes], size // 4
