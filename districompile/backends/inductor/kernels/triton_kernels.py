# SPDX-License-Identifier: Apache-2.0
"""The custom Triton kernels. Imports Triton: only for processes that compile or time on a GPU.

Sizes are compile-time constants. Strides are in elements, and 1 in the last dim. Sums are in float32.
"""

# Without annotations from __future__: Triton and Inductor read the annotations.
import triton
import triton.language as tl


@triton.jit
def gate(product, out, COLUMNS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Gate a matrix of 2 COLUMNS columns: the second kernel of the unfused baseline, for timing only."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = product + places // COLUMNS * (2 * COLUMNS) + places % COLUMNS
    inside = places < SIZE
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    y = value * other * 0.5 * (1.0 + tl.math.erf(other * 0.7071067811865476))
    tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantise(
    x, values, scales, INNER: tl.constexpr, PADDED: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    """Round each row of ``x`` (rows, INNER) to 8 bits, after a division by a scale that makes its largest LARGEST."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < INNER
    wide = tl.load(x + row * INNER + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0) / LARGEST, TINY)
    y = tl.clamp(wide / scale, -LARGEST, LARGEST, tl.PropagateNan.ALL)
    tl.store(values + row * INNER + columns, y.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def product_apart(
    x, weight, first, second,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply descriptors of ``x`` (ROWS, INNER) and ``weight`` (COLUMNS, INNER): write the first SPLIT columns to
    ``first``, the others to ``second`` from the element OFFSET on, each contiguously. BLOCK_N divides both numbers."""
    blocks_m: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    blocks_n: tl.constexpr = COLUMNS // BLOCK_N
    number = tl.program_id(0)
    group = number // (GROUP * blocks_n)
    height = min(blocks_m - group * GROUP, GROUP)
    top = (group * GROUP + number % height) * BLOCK_M
    left = (number % (GROUP * blocks_n)) // height * BLOCK_N
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, INNER, BLOCK_K):
        a = x.load([top, k])
        b = weight.load([left, k])
        y = tl.dot(a, b.T, y)
    columns = left + tl.arange(0, BLOCK_N)
    rows = (top + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = (rows < ROWS)[:, None]
    if left < SPLIT:
        tl.store(first + rows[:, None] * SPLIT + columns[None, :], y.to(first.dtype.element_ty), mask=inside)
    else:
        places = second + OFFSET + rows[:, None] * (COLUMNS - SPLIT) + (columns - SPLIT)[None, :]
        tl.store(places, y.to(second.dtype.element_ty), mask=inside)


@triton.jit
def attend_few(
    queries, k, v,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Attention of ``queries`` (rows, PADDED) to the keys and values of one head at ``k`` and ``v``, in float32: the
    first FIRST keys, and up to REST more (0: none), both powers of 2."""
    width = tl.arange(0, PADDED)
    one = tl.arange(0, FIRST)
    known = (one < KEYS)[:, None] & (width < WIDTH)[None, :]
    keys = tl.load(k + one[:, None] * K_ROW + width[None, :], mask=known, other=0.0)
    values = tl.load(v + one[:, None] * V_ROW + width[None, :], mask=known, other=0.0)
    scores = tl.dot(queries, tl.trans(keys)) * SCALE
    scores = tl.where((one < KEYS)[None, :], scores, float("-inf"))
    largest = tl.max(scores, 1)
    if REST:
        two = FIRST + tl.arange(0, REST)
        more = (two < KEYS)[:, None] & (width < WIDTH)[None, :]
        keys_2 = tl.load(k + two[:, None] * K_ROW + width[None, :], mask=more, other=0.0)
        values_2 = tl.load(v + two[:, None] * V_ROW + width[None, :], mask=more, other=0.0)
        scores_2 = tl.dot(queries, tl.trans(keys_2)) * SCALE
        scores_2 = tl.where((two < KEYS)[None, :], scores_2, float("-inf"))
        largest = tl.maximum(largest, tl.max(scores_2, 1))
    shares = tl.exp2(scores - largest[:, None])
    total = tl.sum(shares, 1)
    y = tl.dot(shares.to(values.dtype), values)
    if REST:
        shares_2 = tl.exp2(scores_2 - largest[:, None])
        total += tl.sum(shares_2, 1)
        y = tl.dot(shares_2.to(values.dtype), values_2, y)
    return y / total[:, None]


@triton.jit
def attention_few(
    q, k, v, out,
    Q_BATCH: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
    K_BATCH: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
    V_BATCH: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Attention to at most FIRST + REST keys, all at once. Operands are (batch, length, heads, WIDTH). PADDED is WIDTH
    or the next power of 2. SCALE is for exponents of 2."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.arange(0, PADDED)
    q += batch * Q_BATCH + head * Q_HEAD
    k += batch * K_BATCH + head * K_HEAD
    v += batch * V_BATCH + head * V_HEAD
    inside = (rows < QUERIES)[:, None] & (width < WIDTH)[None, :]
    queries = tl.load(q + rows[:, None] * Q_ROW + width[None, :], mask=inside, other=0.0)
    y = attend_few(queries, k, v, K_ROW, V_ROW, KEYS, WIDTH, SCALE, FIRST, REST, PADDED)
    places = ((batch * QUERIES + rows[:, None]) * HEADS + head) * WIDTH + width[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_attention(
    x, weight, k, v, out,
    K_BATCH: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
    V_BATCH: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`attention_few` with the projection of queries: the product of descriptors of ``x`` (batch x QUERIES,
    INNER) and ``weight`` (heads x WIDTH, INNER). WIDTH is a power of 2. A program projects the queries of one head."""
    batch = tl.program_id(2)
    head = tl.program_id(1)
    top = tl.program_id(0) * BLOCK_M
    queries = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        a = x.load([batch * QUERIES + top, start])
        queries = tl.dot(a, weight.load([head * WIDTH, start]).T, queries)
    batch = batch.to(tl.int64)
    k += batch * K_BATCH + head * K_HEAD
    v += batch * V_BATCH + head * V_HEAD
    queries = queries.to(out.dtype.element_ty)
    y = attend_few(queries, k, v, K_ROW, V_ROW, KEYS, WIDTH, SCALE, FIRST, REST, WIDTH)
    rows = top + tl.arange(0, BLOCK_M)
    width = tl.arange(0, WIDTH)
    places = ((batch * QUERIES + rows[:, None]) * HEADS + head) * WIDTH + width[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), mask=(rows < QUERIES)[:, None])


@triton.jit
def attention_many(
    q, k, v, out,
    Q_BATCH: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
    K_BATCH: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
    V_BATCH: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Attention block by block of keys (Dao, arXiv 2307.08691). Operands are those of :func:`attention_few`, but if
    DESCRIBED, keys and values are descriptors of (batch x length, heads x WIDTH). If a head is narrower than PADDED, a
    descriptor reads elements of the next head: queries are 0 there, and results are not written."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.arange(0, PADDED)
    block = tl.arange(0, BLOCK_N)
    q += batch * Q_BATCH + head * Q_HEAD
    inside = (rows < QUERIES)[:, None] & (width < WIDTH)[None, :]
    queries = tl.load(q + rows[:, None].to(tl.int64) * Q_ROW + width[None, :], mask=inside, other=0.0)
    if not DESCRIBED:
        k += batch * K_BATCH + head * K_HEAD + block[None, :] * K_ROW + width[:, None]
        v += batch * V_BATCH + head * V_HEAD + block[:, None] * V_ROW + width[None, :]
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, PADDED), tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        if DESCRIBED:
            scores = tl.dot(queries, k.load([(batch * KEYS).to(tl.int32) + start, head * WIDTH]).T)
        else:
            known = (start + block < KEYS)[None, :] & (width < WIDTH)[:, None]
            scores = tl.dot(queries, tl.load(k, mask=known, other=0.0))
            k += BLOCK_N * K_ROW
        if KEYS % BLOCK_N != 0:
            scores = tl.where((start + block < KEYS)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        shares = tl.exp2(scores * SCALE - new[:, None])
        less = tl.exp2(largest - new)
        total = total * less + tl.sum(shares, 1)
        if DESCRIBED:
            values = v.load([(batch * KEYS).to(tl.int32) + start, head * WIDTH])
        else:
            known = (start + block < KEYS)[:, None] & (width < WIDTH)[None, :]
            values = tl.load(v, mask=known, other=0.0)
            v += BLOCK_N * V_ROW
        y = tl.dot(shares.to(values.dtype), values, y * less[:, None])
        largest = new
    places = ((batch * QUERIES + rows[:, None]) * HEADS + head) * WIDTH + width[None, :]
    tl.store(out + places, (y / total[:, None]).to(out.dtype.element_ty), mask=inside)
