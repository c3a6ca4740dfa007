// Matrix products and convolutions of 16-bit or 8-bit numbers on Hopper GPUs. Tiles need not be powers of two, and one
// thread copies ahead of the threads that multiply.
//
// A block of three warp groups computes tiles of 128 pixels by PARTS x COLUMNS columns of a convolution of x (batch,
// height, width, channels) with weight (columns, taps x channels). A matrix product is a convolution of an image of one
// row with a kernel of one pixel. One thread of the first warp group lets the tensor memory accelerator copy the
// operands of the other two, STAGES steps of 128 bytes ahead, also past the end of a tile. A copy has pixels of several
// rows, and zeros outside of the image. A cluster is two blocks with the same columns and consecutive pixels: each block
// copies half of the weights to both, which halves the reads from the L2 cache.
//
// Numbers of 8 bits (float8_e4m3fn) are multiplied by a scale of their column of the weight, and by one of their pixel or
// of all pixels. The tensor cores keep few bits of a sum of their products. So their sums of one step are added up in
// float32, which takes as many registers again: PARTS x COLUMNS is at most 160.
//
// Compile-time constants: COLUMNS (a multiple of 16, up to 256), PARTS (1 or 2; 2 if GATED), STAGES, GATED, BIAS, BYTES
// (of an operand, 1 or 2), and the header wgmma.cuh for COLUMNS columns of a type, and float16 or bfloat16 results. Sizes
// are arguments.
#include "wgmma.cuh"

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int PIXELS = 128;      // of a tile
constexpr int STEP = 128;        // bytes of the channels of a step: the widest row of a swizzled copy
constexpr int INNER = STEP / BYTES;
constexpr int CLUSTER = 2;
constexpr int CONSUMERS = 2;     // warp groups, each of 64 pixels
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int GROUP = 8;         // clusters in a row that use the same block of columns, which then stays in the cache
constexpr u32 X_BYTES = PIXELS * STEP;
constexpr u32 WEIGHT_BYTES = COLUMNS * STEP;
constexpr u32 STAGE_BYTES = X_BYTES + PARTS * WEIGHT_BYTES;
constexpr u32 BARRIERS = STAGES * STAGE_BYTES;
constexpr u32 FACTORS = BARRIERS + 16 * STAGES;  // scales and biases of the columns of a tile, for each consumer
constexpr int WIDE = PARTS * COLUMNS;

struct alignas(64) TensorMap { unsigned char opaque[128]; };

struct Sizes {
    int batch, height, width;    // of the output
    int columns;                 // of the result
    int channels, taps, across;  // taps: pixels of the kernel; across: pixels of a row of it
    int above, left;             // zeros around x
    int shift;                   // a tile has 1 << shift pixels of a row, and PIXELS >> shift rows
    int each;                    // whether each pixel has a scale, or one is that of all
};

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Arrive at a barrier of a block of the cluster: the operands of a step were read, and copies may overwrite them. A
// fence over the cluster (.release.cluster) would order neither reads nor copies, and takes longer than a step.
__device__ __forceinline__ void arrive(u32 barrier, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" :: "r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void copy(
    u32 to, const TensorMap* from, int channel, int column, int row, int image, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5}], [%6];"
        :: "r"(to), "l"(from), "r"(channel), "r"(column), "r"(row), "r"(image), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_to_all(u32 to, const TensorMap* from, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(to), "l"(from), "r"(column), "r"(row), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}

// Descriptor of a swizzled matrix in shared memory with rows of 128 bytes: 8 rows are 1024 bytes (PTX, "matrix
// descriptor").
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// GELU: gate - |gate| tail if gate is positive, else -|gate| tail. The tail of the normal distribution, erfc(|gate| /
// sqrt 2) / 2, is within 3e-7 (Abramowitz and Stegun, 7.1.26: 1e-7, and the rounding of float32).
__device__ __forceinline__ float gelu(float gate) {
    float size = fabsf(gate), t, e;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.3275911f * 0.7071067811865476f, size, 1.0f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-0.5f * 1.4426950408889634f * gate * gate));
    float series = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
    series = fmaf(t, series, 0.5f * 1.421413741f);
    series = fmaf(t, series, 0.5f * -0.284496736f);
    series = fmaf(t, series, 0.5f * 0.254829592f);
    return fmaf(-size * t, series * e, fmaxf(gate, 0.0f));
}

// Wait for the other threads of a consumer.
__device__ __forceinline__ void meet(int consumer) {
    asm volatile("bar.sync %0, 128;" :: "r"(1 + consumer) : "memory");
}

// Transpose four words of 32 bits in each of four threads: thread i then holds word i of all threads, in order.
__device__ __forceinline__ void transpose(u32 (&word)[4], int lane) {
    #pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        bool upper = lane & step;
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            u32 got = __shfl_xor_sync(0xffffffff, upper ? word[i] : word[i + step], step);
            (upper ? word[i] : word[i + step]) = got;
        }
    }
}

struct Grid { int across, down, tall; };
struct Tile { int image, row, column, first; };

__device__ __forceinline__ Grid grid_of(const Sizes& sizes) {
    int tall = PIXELS >> sizes.shift;
    return {(sizes.width + (1 << sizes.shift) - 1) >> sizes.shift, (sizes.height + tall - 1) / tall, tall};
}

// The tile of a number: clusters (pairs of blocks of pixels) by blocks of columns, in groups of GROUP clusters.
__device__ __forceinline__ Tile tile_at(int number, int pairs, int blocks, const Sizes& sizes, u32 rank) {
    int group = number / (GROUP * blocks);
    int height = min(pairs - group * GROUP, GROUP);
    int inside = number % (GROUP * blocks);
    int block = (group * GROUP + inside % height) * CLUSTER + (int)rank;
    Grid grid = grid_of(sizes);
    int row = block / grid.across;
    return {row / grid.down, row % grid.down * grid.tall, block % grid.across << sizes.shift,
            inside / height * (GATED ? COLUMNS : PARTS * COLUMNS)};
}

// The place of a pixel of a tile in the result, or -1 if it is outside of the image.
__device__ __forceinline__ long long place_of(const Tile& tile, const Sizes& sizes, int number) {
    int row = tile.row + (number >> sizes.shift), column = tile.column + (number & (1 << sizes.shift) - 1);
    if (tile.image >= sizes.batch || row >= sizes.height || column >= sizes.width) return -1;
    return ((long long)tile.image * sizes.height + row) * sizes.width + column;
}

// Compute out (pixels, columns), with bias if BIAS. If GATED, weight has twice as many columns, and the first half of the
// product is multiplied by the GELU of the second. The scales are those of 8-bit numbers.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1) product(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* bias,
    u16* out, const float* pixel_scale, const float* column_scale, const __grid_constant__ Sizes sizes) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 base = (u32)__cvta_generic_to_shared(memory);
    const u32 full = base + BARRIERS, empty = full + 8 * STAGES;
    const u32 rank = cluster_rank();
    const Grid grid = grid_of(sizes);
    const int pairs = (sizes.batch * grid.down * grid.across + CLUSTER - 1) / CLUSTER;
    const int blocks = sizes.columns / (GATED ? COLUMNS : PARTS * COLUMNS);
    const int steps = sizes.taps * ((sizes.channels + INNER - 1) / INNER);
    const int clusters = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(full + 8 * i), "r"(1));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + 8 * i), "r"(4 * CONSUMERS * CLUSTER));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_cluster();

    u32 stage = 0, parity = 0;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == 0) {
            constexpr int share = COLUMNS / CLUSTER;
            for (int number = blockIdx.x / CLUSTER; number < pairs * blocks; number += clusters) {
                const Tile tile = tile_at(number, pairs, blocks, sizes, rank);
                int tap = 0, row = 0, column = 0, channel = 0;
                for (int step = 0; step < steps; ++step) {
                    u32 to = base + stage * STAGE_BYTES, barrier = full + 8 * stage;
                    wait(empty + 8 * stage, parity ^ 1);
                    expect(barrier, STAGE_BYTES);
                    copy(to, &x, channel, tile.column + column - sizes.left, tile.row + row - sizes.above, tile.image,
                         barrier);
                    #pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        int above = tile.first + part * (GATED ? sizes.columns : COLUMNS) + (int)rank * share;
                        u32 place = to + X_BYTES + part * WEIGHT_BYTES + rank * (WEIGHT_BYTES / CLUSTER);
                        copy_to_all(place, &weight, tap * sizes.channels + channel, above, barrier);
                    }
                    if (++stage == STAGES) { stage = 0; parity ^= 1; }
                    if ((channel += INNER) >= sizes.channels) {  // go on to the next pixel of the kernel
                        channel = 0, ++tap;
                        if (++column == sizes.across) column = 0, ++row;
                    }
                }
            }
            // The other block arrives at barriers of this block, which must exist until then: wait for all arrivals.
            // (The consumers of this block have waited for all copies.)
            for (int i = 0; i < STAGES; ++i) {
                wait(empty + 8 * stage, parity ^ 1);
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const int lane = threadIdx.x % 32;
        const int consumer = threadIdx.x / 128 - 1;
        const int height = consumer * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
        for (int number = blockIdx.x / CLUSTER; number < pairs * blocks; number += clusters) {
            const Tile tile = tile_at(number, pairs, blocks, sizes, rank);
            float y[PARTS][COLUMNS / 2];
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const u16* here = bias + tile.first + part * (GATED ? sizes.columns : COLUMNS) + 2 * (lane % 4);
                #pragma unroll
                for (int i = 0; i < COLUMNS / 8; ++i) {
                    float added[2] = {0, 0};
                    if (BIAS && BYTES == 2) unpack(*(const u32*)(here + 8 * i), added);
                    y[part][4 * i] = y[part][4 * i + 2] = added[0];
                    y[part][4 * i + 1] = y[part][4 * i + 3] = added[1];
                }
            }
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) hold(y[part]);
#if BYTES == 2
            auto& sums = y;
            u32 before = 0;
#else
            float sums[PARTS][COLUMNS / 2];  // of one step
            // Read now, so that they are there when the sums are
            float own[2];  // scales of the pixels
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                long long place = place_of(tile, sizes, height + 8 * half);
                own[half] = place < 0 ? 1.0f : pixel_scale[sizes.each ? place : 0];
            }
            constexpr int EACH = (WIDE + 127) / 128;
            float scale[EACH];
            u16 added[EACH];
            #pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int column = threadIdx.x % 128 + 128 * i;
                if (column >= WIDE) continue;
                column += tile.first + (column < COLUMNS ? 0 : (GATED ? sizes.columns : COLUMNS) - COLUMNS);
                scale[i] = column_scale[column];
                if (BIAS) added[i] = bias[column];
            }
#endif
            for (int step = 0; step < steps; ++step) {
                u32 from = base + stage * STAGE_BYTES;
                wait(full + 8 * stage, parity);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                #pragma unroll
                for (int i = 0; i < STEP / 32; ++i) {
                    u64 a = descriptor(from + consumer * (X_BYTES / CONSUMERS)) + 2 * i;
                    #pragma unroll
                    for (int part = 0; part < PARTS; ++part)
                        wgmma(sums[part], a, descriptor(from + X_BYTES + part * WEIGHT_BYTES) + 2 * i, i);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#if BYTES == 2
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (step > 0 && lane < CLUSTER) arrive(empty + 8 * before, lane);
                before = stage;
#else
                // The other warp group multiplies meanwhile
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                #pragma unroll
                for (int part = 0; part < PARTS; ++part) hold(sums[part]);
                if (lane < CLUSTER) arrive(empty + 8 * stage, lane);
                #pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    #pragma unroll
                    for (int i = 0; i < COLUMNS / 2; ++i) y[part][i] += sums[part][i];
#endif
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
#if BYTES == 2
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) hold(y[part]);
            if (lane < CLUSTER) arrive(empty + 8 * before, lane);
#endif

#if BYTES == 1
            float* const factors = (float*)(memory + FACTORS) + 2 * WIDE * consumer;
            meet(consumer);  // all have read those of the last tile
            #pragma unroll
            for (int i = 0; i < EACH; ++i) {
                int column = threadIdx.x % 128 + 128 * i;
                if (column >= WIDE) continue;
                factors[column] = scale[i];
                if (BIAS) factors[WIDE + column] = widen(added[i]);
            }
            meet(consumer);
#endif
            long long place[2];
            #pragma unroll
            for (int half = 0; half < 2; ++half) place[half] = place_of(tile, sizes, height + 8 * half);
            // The two columns of this thread among 8 i to 8 i + 7, before gating
            auto pair_at = [&](int part, int i, int half) {
                float2 found = make_float2(y[part][4 * i + 2 * half], y[part][4 * i + 2 * half + 1]);
#if BYTES == 1
                const float2* here = (const float2*)(factors + part * COLUMNS + 8 * i + 2 * (lane % 4));
                float2 scale = here[0], added = BIAS ? here[WIDE / 2] : make_float2(0, 0);
                found.x = fmaf(found.x, own[half] * scale.x, added.x);
                found.y = fmaf(found.y, own[half] * scale.y, added.y);
#endif
                return found;
            };
            #pragma unroll
            for (int part = 0; part < (GATED ? 1 : PARTS); ++part) {
                auto word_at = [&](int i, int half) {
                    float2 found = pair_at(part, i, half);
                    if (GATED) {
                        float2 gate = pair_at(PARTS - 1, i, half);
                        found.x *= gelu(gate.x), found.y *= gelu(gate.y);
                    }
                    return pack(found.x, found.y);
                };
                const int left = tile.first + part * COLUMNS;
                #pragma unroll
                for (int set = 0; set < COLUMNS / 32; ++set) {
                    #pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        u32 words[4];
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) words[i] = word_at(4 * set + i, half);
                        transpose(words, lane);
                        if (place[half] >= 0)
                            *(uint4*)(out + place[half] * sizes.columns + left + 32 * set + 8 * (lane % 4)) =
                                make_uint4(words[0], words[1], words[2], words[3]);
                    }
                }
                #pragma unroll
                for (int i = COLUMNS / 32 * 4; i < COLUMNS / 8; ++i) {
                    #pragma unroll
                    for (int half = 0; half < 2; ++half)
                        if (place[half] >= 0)
                            *(u32*)(out + place[half] * sizes.columns + left + 8 * i + 2 * (lane % 4)) =
                                word_at(i, half);
                }
            }
        }
    }
}
