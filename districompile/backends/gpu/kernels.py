"""The kernels. Imports Triton: for processes that compile, or time, on a GPU.

Sizes are known when compiling, but for convolutions. Strides are in elements; the last dim's is 1. Accumulation is in
float32.
"""

# No annotations from __future__: Triton, and what puts these kernels into a program, read them.
import triton
import triton.language as tl


@triton.jit
def gelu_times(value, gate):
    """``value`` times the GELU of ``gate``. The normal distribution's tail, erfc(|gate| / sqrt 2) / 2, is within 1e-7
    (Abramowitz and Stegun, 7.1.26), for less than half of what the library's erf takes: that is not hidden behind
    products."""
    z = tl.abs(gate) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * series * tl.exp(-z * z)
    return value * gate * tl.where(gate < 0, tail, 1.0 - tail)


@triton.jit
def gated_product(
    x, weight, rest, bias, out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (ROWS, COLUMNS) of descriptors of ``x`` (ROWS, INNER) and ``weight`` (2 COLUMNS, INNER): the first
    COLUMNS columns of the product, times the GELU of the others. A program has BLOCK_N columns of each, and REST more
    (of ``rest``, another descriptor of ``weight``; 0: none): blocks need not be powers of 2 then, so that they fill a
    GPU. GROUP blocks of rows share a block of columns while it is in the cache."""
    blocks_m: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    blocks_n: tl.constexpr = COLUMNS // (BLOCK_N + REST)
    number = tl.program_id(0)
    group = number // (GROUP * blocks_n)
    height = min(blocks_m - group * GROUP, GROUP)
    top = (group * GROUP + number % height) * BLOCK_M
    left = (number % (GROUP * blocks_n)) // height * (BLOCK_N + REST)
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if REST:
        value_2 = tl.zeros((BLOCK_M, REST), tl.float32)
        gate_2 = tl.zeros((BLOCK_M, REST), tl.float32)
    for k in range(0, INNER, BLOCK_K):
        a = x.load([top, k])
        value = tl.dot(a, weight.load([left, k]).T, value)
        gate = tl.dot(a, weight.load([COLUMNS + left, k]).T, gate)
        if REST:
            value_2 = tl.dot(a, rest.load([left + BLOCK_N, k]).T, value_2)
            gate_2 = tl.dot(a, rest.load([COLUMNS + left + BLOCK_N, k]).T, gate_2)
    rows = top + tl.arange(0, BLOCK_M)
    columns = left + tl.arange(0, BLOCK_N)
    if BIAS:
        value += tl.load(bias + columns)[None, :].to(tl.float32)
        gate += tl.load(bias + COLUMNS + columns)[None, :].to(tl.float32)
    places = out + rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    tl.store(places, gelu_times(value, gate).to(out.dtype.element_ty), mask=(rows < ROWS)[:, None])
    if REST:
        columns_2 = left + BLOCK_N + tl.arange(0, REST)
        if BIAS:
            value_2 += tl.load(bias + columns_2)[None, :].to(tl.float32)
            gate_2 += tl.load(bias + COLUMNS + columns_2)[None, :].to(tl.float32)
        places_2 = out + rows[:, None].to(tl.int64) * COLUMNS + columns_2[None, :]
        tl.store(places_2, gelu_times(value_2, gate_2).to(out.dtype.element_ty), mask=(rows < ROWS)[:, None])


@triton.jit
def gate(product, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """What reads a product of 2 COLUMNS columns where :func:`gated_product` is not used: to compare with."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = product + places // COLUMNS * (2 * COLUMNS) + places % COLUMNS
    value = tl.load(at).to(tl.float32)
    other = tl.load(at + COLUMNS).to(tl.float32)
    y = value * other * 0.5 * (1.0 + tl.math.erf(other * 0.7071067811865476))
    tl.store(out + places, y.to(out.dtype.element_ty))


@triton.jit
def product_apart(
    x, weight, first, second,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The product of descriptors of ``x`` (ROWS, INNER) and ``weight`` (COLUMNS, INNER): its first SPLIT columns to
    ``first``, the others to ``second`` from the element OFFSET on, each without gaps. BLOCK_N divides both."""
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
    """What ``queries`` (rows, PADDED) see of one head's keys and values at ``k`` and ``v``, in float32: FIRST of them,
    and up to REST more (0: none), both powers of 2."""
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
    """Attention to no more keys than fit beside each other (FIRST + REST). Operands are (batch, length, heads, WIDTH);
    PADDED is WIDTH or the next power of 2. SCALE is for exponents of 2."""
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
    """:func:`attention_few` whose queries are the product of descriptors of ``x`` (batch x QUERIES, INNER) and
    ``weight`` (heads x WIDTH, INNER), WIDTH a power of 2: a program makes one head's for itself."""
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
    """Attention block by block of keys (Dao, arXiv 2307.08691). Operands as of :func:`attention_few`, but if DESCRIBED
    keys and values are descriptors of (batch x length, heads x WIDTH). Those give the next head's elements where a head
    is narrower than PADDED: queries are 0 there, and results are not written."""
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


@triton.jit
def convolution(
    x, weight, rest, out,
    HEIGHT, WIDTH, CHANNELS, COLUMNS, ABOVE, LEFT,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BLOCK_W: tl.constexpr, PAIR: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (batch, HEIGHT, WIDTH, COLUMNS), the convolution of a descriptor of ``x`` (batch, height, width,
    CHANNELS) with one of ``weight`` (COLUMNS, KERNEL_H x KERNEL_W x CHANNELS), padded by ABOVE and LEFT with zeros,
    which is what descriptors give outside. A program has BLOCK_W pixels of a row, or of two (PAIR), and BLOCK_N + REST
    columns, as those of :func:`gated_product`. What it reads of ``x`` are rows of pixels: blocks of several rows would
    pass through registers. Sizes are arguments, as a network has dozens of them, and each would be a kernel to
    compile."""
    tall: tl.constexpr = 2 if PAIR else 1
    across = (WIDTH + BLOCK_W - 1) // BLOCK_W
    blocks_m = across * ((HEIGHT + tall - 1) // tall)
    blocks_n = COLUMNS // (BLOCK_N + REST)
    parts = CHANNELS // BLOCK_K
    number = tl.program_id(0)
    batch = tl.program_id(1)
    group = number // (GROUP * blocks_n)
    height = min(blocks_m - group * GROUP, GROUP)
    block = group * GROUP + number % height
    first = (number % (GROUP * blocks_n)) // height * (BLOCK_N + REST)
    top = block // across * tall
    left = block % across * BLOCK_W
    y = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
    if REST:
        y_2 = tl.zeros((BLOCK_W, REST), tl.float32)
    if PAIR:
        z = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
        if REST:
            z_2 = tl.zeros((BLOCK_W, REST), tl.float32)
    for step in range(0, KERNEL_H * KERNEL_W * parts):
        tap = step // parts
        channel = step % parts * BLOCK_K
        row = top + tap // KERNEL_W - ABOVE
        column = left + tap % KERNEL_W - LEFT
        b = weight.load([first, step * BLOCK_K])
        a = x.load([batch, row, column, channel]).reshape(BLOCK_W, BLOCK_K)
        y = tl.dot(a, b.T, y)
        if REST:
            c = rest.load([first + BLOCK_N, step * BLOCK_K])
            y_2 = tl.dot(a, c.T, y_2)
        if PAIR:
            a = x.load([batch, row + 1, column, channel]).reshape(BLOCK_W, BLOCK_K)
            z = tl.dot(a, b.T, z)
            if REST:
                z_2 = tl.dot(a, c.T, z_2)
    pixels = left + tl.arange(0, BLOCK_W)
    places = out + ((batch * HEIGHT + top) * WIDTH + pixels).to(tl.int64)[:, None] * COLUMNS + first
    columns = tl.arange(0, BLOCK_N)[None, :]
    inside = (pixels < WIDTH)[:, None]
    tl.store(places + columns, y.to(out.dtype.element_ty), mask=inside)
    if REST:
        columns_2 = BLOCK_N + tl.arange(0, REST)[None, :]
        tl.store(places + columns_2, y_2.to(out.dtype.element_ty), mask=inside)
    if PAIR:
        places += WIDTH * COLUMNS
        inside = ((pixels < WIDTH) & (tl.zeros_like(pixels) + top + 1 < HEIGHT))[:, None]
        tl.store(places + columns, z.to(out.dtype.element_ty), mask=inside)
        if REST:
            tl.store(places + columns_2, z_2.to(out.dtype.element_ty), mask=inside)
